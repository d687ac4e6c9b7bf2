"""What is optimised together, as the optimisation sees it: outputs of the quantized part, and their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from repapq_plugin.core.losses import Alike
from repapq_plugin.method.learners import Learner


@dataclass(frozen=True)
class AlikeOutputs:
    """What lets samples on several ranks count alike, for each tensor of `Outputs`."""

    units: Mapping[str, Sequence[Alike]]
    stage: Sequence[Alike]


@dataclass(frozen=True)
class Outputs:
    """What a pass over one batch gave: each unit's outputs by call, and those at the end of the stage.

    Args:
        units: Outputs of units by their name.
        stage: Outputs at the end.
        alike: Set in targets of which other ranks have more samples.
    """

    units: Mapping[str, Sequence[Tensor]]
    stage: Sequence[Tensor]
    alike: AlikeOutputs | None = None


class Subject(Protocol):
    """What is optimised together."""

    name: str
    learners: Mapping[str, Learner]

    def student(self, batch: int) -> Outputs:
        """Run the quantized network's part on cached inputs of ``batch``."""

    def teacher(self, batch: int) -> Outputs:
        """Return the float network's outputs for ``batch``."""
