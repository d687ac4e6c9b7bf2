"""`BackendContract`: what every backend owes the one job."""

from __future__ import annotations

from tests.contracts.learning import LearningLaws
from tests.contracts.placing import PlacingLaws
from tests.contracts.whole_job import JobLaws


class BackendContract(PlacingLaws, LearningLaws, JobLaws):
    """All laws of a `Backend`. A host's test subclasses it under a name that begins with ``Test``."""
