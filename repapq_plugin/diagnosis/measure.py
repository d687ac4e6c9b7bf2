"""Looking at every unit before the merge, after it, with channels conditioned, and calibrated.

The one job does the work in between. What is looked at is summed up as it passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from repapq_plugin.backend import PlainBackend
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.core.copies import own_copy
from repapq_plugin.core.progress import Report, counted
from repapq_plugin.core.ranked_checkpoints import checkpoints_in
from repapq_plugin.core.running import Batch, ForwardFn, call_model, inference
from repapq_plugin.diagnosis.inputs import (
    Rounds,
    SeenInput,
    add_noise,
    branch_figures,
    moved_figures,
    see_inputs,
    weight_figures,
)
from repapq_plugin.diagnosis.judge import (
    Noise,
    bit_remedy,
    channel_remedies,
    final_noise,
    noise_of,
    outliers_of,
    wanted_snr,
)
from repapq_plugin.diagnosis.table import Diagnosis, Moment, MomentName, UnitDiagnosis
from repapq_plugin.job import Job, State
from repapq_plugin.method.partition import Unit, is_inside
from repapq_plugin.quantizers.layers import QUANTIZABLE
from repapq_plugin.quantizers.plan import LayerPlan
from repapq_plugin.result import Calibrated, CalibrationResult

PASSES = 7
"""Over all batches: two of the network with branches, the merged one and the conditioned one, one of the calibrated."""


class DiagnosisBackend(PlainBackend[Diagnosis]):
    """Carries the plugin's quantizers while a network is diagnosed."""

    phases = (
        *("merge", "plan", "keep_merged", "condition", "place", "see_float", "find_ranges", "learn", "fold"),
        "see_calibrated",
    )
    units: Sequence[UnitDiagnosis] = ()
    samples: int = 0

    def deliver(self, calibrated: Calibrated, batches: Sequence[Batch]) -> Diagnosis:
        """Return what was found."""
        return Diagnosis(CalibrationResult(**vars(calibrated)), tuple(self.units), self.samples)


class DiagnosisJob(Job[Diagnosis]):
    """Diagnoses one network; arguments: see `Job`."""

    backend: DiagnosisBackend

    def __init__(
        self,
        config: RepAPQConfig,
        forward: ForwardFn = call_model,
        report: Report | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        super().__init__(DiagnosisBackend(), config, forward, report, checkpoints)
        self._moments: dict[str, dict[MomentName, Moment]] = {}
        self._folded: dict[str, Moment] = {}
        self._merged: dict[str, SeenInput] = {}
        self._looked: list[Unit] = []

    def merge(self, state: State) -> None:
        """Keep the branched network to look at, then merge."""
        self._branched = state.teacher
        super().merge(state)

    def keep_merged(self, state: State) -> None:
        """Keep a copy of the merged network, whose channels nobody conditions."""
        self._plain = own_copy(state.teacher)

    def see_float(self, state: State) -> None:
        """Look at the network with branches, the merged one, and the merged one with channels conditioned."""
        self._advance = counted("diagnosis", PASSES * len(state.batches), self.report)
        teacher, config = self._plain, self.config
        self._looked = [unit for stage in state.stages for unit in stage.units]
        self._moments = {unit.name: {} for unit in self._looked}
        first = {unit.name: unit.layers[0] for unit in self._looked}
        bits = {name: state.plans[layer] for name, layer in first.items()}
        self._see_branched(state, bits)
        self._merged = self._see("merged", teacher, first, bits, state)
        conditioned = replace(state, merged=state.merged._replace(network=teacher), notes=[])  # looked at already
        with self._told(config.replace(fold_constants=True, equalize=False)):
            self.condition(conditioned)
        layers = {name: conditioned.teacher.get_submodule(layer) for name, layer in first.items()}
        for name, seen in self._merged.items():  # folding changes weights and biases, and no input
            weights = weight_figures(layers[name], bits[name].weight_bits, config)
            self._folded[name] = Moment(seen.figures, weights)
        with self._told(config.replace(fold_constants=False, equalize=True)):
            self.condition(conditioned)
        self._see("conditioned", conditioned.teacher, first, bits, state)

    @contextmanager
    def _told(self, config: RepAPQConfig) -> Iterator[None]:
        """Work by another configuration, for the time of a ``with`` block."""
        before, self.config = self.config, config
        try:
            yield
        finally:
            self.config = before

    def _see_branched(self, state: State, bits: Mapping[str, LayerPlan]) -> None:
        model, config = self._branched, self.config
        named = dict(model.named_modules())
        layers: dict[str, nn.Module] = {}
        for unit in self._looked:
            inside = [n for n, m in named.items() if is_inside(n, unit.name) and isinstance(m, QUANTIZABLE)]
            same = [name for name in unit.layers if name in inside]
            if same or inside:
                layers[unit.name] = named[(same or inside)[0]]
        run = partial(self.forward, model)
        activation_bits = {name: plan.activation_bits for name, plan in bits.items()}
        with inference(model):
            seen = see_inputs(layers, run, state.batches, advance=self._advance)
            add_noise(seen, layers, activation_bits, run, state.batches, config, self._advance)
            for name, it in seen.items():
                block = model.get_submodule(name)
                weights = branch_figures(block, bits[name].weight_bits, config)
                self._moments[name]["branched"] = Moment(it.figures, weights)

    def _see(
        self,
        moment: MomentName,
        model: nn.Module,
        first: Mapping[str, str],
        bits: Mapping[str, LayerPlan],
        state: State,
    ) -> dict[str, SeenInput]:
        layers = {name: model.get_submodule(layer) for name, layer in first.items()}
        activation_bits = {name: plan.activation_bits for name, plan in bits.items()}
        run = partial(self.forward, model)
        seen = see_inputs(layers, run, state.batches, advance=self._advance)
        add_noise(seen, layers, activation_bits, run, state.batches, self.config, self._advance)
        for name, it in seen.items():
            weights = weight_figures(layers[name], bits[name].weight_bits, self.config)
            self._moments[name][moment] = Moment(it.figures, weights)
        return seen

    @torch.no_grad()
    def see_calibrated(self, state: State) -> None:
        """Look at the calibrated network, and judge every unit."""
        backend, plans = self.backend, self.backend.plans
        units = [unit for unit in self._looked if unit.layers[0] in plans and unit.name in self._merged]
        layers = {unit.name: backend.layers[unit.layers[0]] for unit in units}
        rounds: dict[str, Rounds] = {name: layer.input_fake_quant for name, layer in layers.items()}
        run = partial(self.forward, backend.student)
        seen = see_inputs(layers, run, state.batches, rounds, self._advance)
        units = [unit for unit in units if unit.name in seen]
        finals: dict[str, Noise] = {}
        for unit in units:
            moments = self._moments[unit.name]
            weights = moved_figures(layers[unit.name], state.teacher.get_submodule(unit.layers[0]))
            moments["calibrated"] = Moment(seen[unit.name].figures, weights)
            finals[unit.name] = final_noise(self._start(unit.name), moments["calibrated"])
        wanted = wanted_snr([noise.snr for noise in finals.values()])
        backend.units = [self._judged(unit, plans[unit.layers[0]].bits, finals[unit.name], wanted) for unit in units]
        backend.samples = max((unit.peaks.shape[1] for unit in backend.units), default=0)

    def _start(self, name: str) -> Moment:
        """Return the float unit that calibration set out from."""
        if self.config.equalize:
            return self._moments[name]["conditioned"]
        return self._folded[name] if self.config.fold_constants else self._moments[name]["merged"]

    def _judged(self, unit: Unit, bits: tuple[int, int], final: Noise, wanted: float) -> UnitDiagnosis:
        moments, peaks = self._moments[unit.name], self._merged[unit.name].by_sample
        outliers = outliers_of(peaks)
        remedies = channel_remedies(moments, self._folded[unit.name], self.config)
        left, when = final, "as calibrated"
        if any(remedy.how for remedy in remedies):  # what costs nothing comes first
            left = noise_of(moments["conditioned"].inputs, moments["conditioned"].weights)
            when = "with these remedies"
        remedies += bit_remedy(unit.layers[0], bits, left, wanted, outliers, when)
        return UnitDiagnosis(unit.name, unit.layers[0], bits, moments, outliers, remedies, final.snr, peaks)


def diagnose(
    model: nn.Module,
    data: Iterable[Batch],
    config: RepAPQConfig | None = None,
    *,
    forward_fn: ForwardFn | None = None,
    progress: Report | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
) -> Diagnosis:
    """Find out why ``model`` loses by quantization: which units, channels and samples, and what helps.

    Args:
        model: As for `quantize_model`; it is not changed.
        data: Calibration batches, in an order that samples can be named by.
        config: Bits, ranges and calibration; with ``steps=0`` nothing is learned, which is quicker.
        forward_fn: See `quantize_model`.
        progress: See `quantize_model`.
        checkpoint_dir: See `quantize_model`.
        resume: See `quantize_model`.

    Raises:
        CalibrationError, ConfigError, CheckpointError: See `quantize_model`.
    """
    checkpoints = checkpoints_in(checkpoint_dir, resume)
    return DiagnosisJob(config or RepAPQConfig(), forward_fn or call_model, progress, checkpoints).run(model, data)
