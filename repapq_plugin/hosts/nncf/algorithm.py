"""`RepAPQAlgorithm`: the calibration as one step of an NNCF pipeline that somebody composes himself."""

from __future__ import annotations

import copy
from pathlib import Path

import nncf
from torch import nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.ranked_checkpoints import checkpoints_in
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.nncf._compat import (
    ATR_HOOK_STORAGE,
    Algorithm,
    BackendType,
    GraphModelWrapper,
    NNCFGraph,
    StatisticPointsContainer,
)
from repapq_plugin.hosts.nncf.backend import PlacedBackend
from repapq_plugin.hosts.nncf.data import calibration_items, forward
from repapq_plugin.job import Job
from repapq_plugin.method.unit_result import UnitResult


class RepAPQAlgorithm(Algorithm):  # type: ignore[misc]
    """Calibrates across blocks what the steps before it have quantized.

    ``create_ptq_pipeline(...).pipeline_steps.append([RepAPQAlgorithm(model, dataset)])``, or a `Pipeline` of one's own
    that quantizes before. Branches are not merged here: give the pipeline and this what ``merge_branches`` returns.

    Args:
        teacher: The float network that the pipeline is run on; not changed. The model that arrives here will not do:
            the steps before have corrected its biases.
        dataset: Calibration samples; NNCF hands none to an algorithm.
        config: Bits, ranges and calibration; default: W8A8.
        subset_size: How many items of the dataset are used at most.
        checkpoint_dir: Folder that keeps each part that is finished; see `repapq_plugin.quantize_model`.
        resume: Go on with what it keeps.
    """

    def __init__(
        self,
        teacher: nn.Module,
        dataset: nncf.Dataset,
        config: RepAPQConfig | None = None,
        *,
        subset_size: int = 300,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        self.config = config or RepAPQConfig()
        self.checkpoints = checkpoints_in(checkpoint_dir, resume)
        self.items = calibration_items(dataset, subset_size)
        self.teacher = teacher
        self.units: tuple[UnitResult, ...] = ()

    @property
    def available_backends(self) -> list[BackendType]:
        """PyTorch only."""
        return [BackendType.TORCH]

    def get_statistic_points(self, model: GraphModelWrapper, graph: NNCFGraph) -> StatisticPointsContainer:
        """Ask for nothing: the calibration runs the model itself."""
        return StatisticPointsContainer()

    def apply(
        self,
        model: GraphModelWrapper,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> GraphModelWrapper:
        """Calibrate the wrapped model in place; ``units`` then says what became of each unit.

        Raises:
            HostError: The teacher has other modules than the model.
            ConfigError: The configuration names what the teacher has not, or asks for what NNCF cannot do.
            CalibrationError: No layer is quantized, or activations are not finite.
        """
        student = model.model
        teacher = copy.deepcopy(self.teacher).eval()
        missing = sorted(_paths(student) - _paths(teacher))
        if missing:
            raise HostError(
                f"The teacher has no module {missing[0]!r}, which the model has; give the float network that the "
                "pipeline was run on."
            )
        training = student.training
        try:
            backend = PlacedBackend(student.eval())
            done = Job(backend, self.config, forward, checkpoints=self.checkpoints).run(teacher, self.items)
        finally:
            student.train(training)
        self.units = done.units
        model.reset_graph()
        return model


def _paths(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules() if not name.startswith(ATR_HOOK_STORAGE)}
