"""The steps of a quantization, written once: the test loop takes some of them, the command ``repapq`` takes all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from torch import Tensor, nn

from repapq_plugin.core import ranks
from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.core.origin import Origin
from repapq_plugin.errors import ResultError
from repapq_plugin.evaluation.processor import saturation_note
from repapq_plugin.export.origins import write_origin
from repapq_plugin.hosts.hosted import QuantizedNetwork, RunnableNetwork
from repapq_plugin.hosts.openmmlab.network import TensorPath, serving_points
from repapq_plugin.hosts.openmmlab.other_hosts import OWN, find_host, find_loader
from repapq_plugin.hosts.openmmlab.record import Record, made_from
from repapq_plugin.hosts.openmmlab.settings import RUNTIME_FORMATS, Settings
from repapq_plugin.hosts.openmmlab.work import (
    RESULT_FILE,
    Exported,
    calibrate,
    calibrate_on_host,
    compare_on_openvino,
    example_images,
    export_network,
    export_tensor_path,
    open_network,
)
from repapq_plugin.hosts.openmmlab.workbench import Workbench
from repapq_plugin.job import Progress, Report
from repapq_plugin.result import Calibrated, CalibrationResult

Step = Callable[[str, str], AbstractContextManager[Report]]
"""``step(name, text)`` is told that a step begins and ends, and yields what is told how far it is."""

EXPORTED = "repapq"
"""Name of exported files, without suffix."""


@dataclass(frozen=True)
class LoadedModel:
    """A quantized toolbox model, as a file brings it back.

    Args:
        model: The toolbox model to test: with quantizers in it, or the float one around another ``network``.
        result: How it came about; ``None`` where the file does not say.
        network: What computes the network part in the model's place; ``None`` lets the model do it.
        hosted: What the host returned that made ``network``; ``None`` where the plugin's own quantizers are in it.
    """

    model: nn.Module
    result: Calibrated | None
    network: nn.Module | None = None
    hosted: RunnableNetwork | None = None

    def export(self, kind: str, example: Tensor, path: Path, origin: Origin | None = None) -> Exported:
        """Write the network part for a runtime.

        Args:
            kind: ``'onnx'`` or ``'openvino'``.
            example: Preprocessed image, float ``(1, C, H, W)``.
            path: File to write, without suffix.
            origin: How the network was made, to stand in the file; ``None`` where nobody knows.

        Raises:
            HostError: The model has no network part that can be taken out.
            ExportError: It cannot be exported.
        """
        target = None if self.result is None else self.result.config.runs_on
        if self.hosted is not None:
            exported = Exported.of(self.hosted.export(kind, example, path))
        elif self.network is not None:
            exported = export_tensor_path(self.network, example, path, kind, target)
        else:
            exported = export_network(self.model, example, path, kind, target)
        return exported if origin is None else exported.made_by(origin)


@dataclass(frozen=True)
class QuantizedModel(LoadedModel):
    """A quantized toolbox model with its record, whichever host quantized it; arguments: see `LoadedModel`."""

    result: Calibrated
    hosted: QuantizedNetwork | None = None

    def save(self, folder: Path, origin: Origin) -> list[Path]:
        """Write what brings the network back into ``folder``, and how it was made; return the files.

        Raises:
            ResultError, ExportError: A file cannot be written.
        """
        if isinstance(self.result, CalibrationResult):
            files = [self.result.save(folder / RESULT_FILE)]
        else:
            files = [] if self.hosted is None else self.hosted.save(folder)
        for file in files:
            write_origin(file, origin)
        return files


def quantize(
    model: nn.Module,
    batches: Sequence[object],
    settings: Settings,
    progress: Report | None = None,
    checkpoints: Checkpoints | None = None,
) -> QuantizedModel:
    """Quantize a toolbox model as settings say: with the plugin's own quantizers, or by another host.

    Args:
        model: A float detector, classifier or segmentor; not changed.
        batches: Collated calibration batches.
        settings: See `Settings`.
        progress: Called as the work goes on.
        checkpoints: Keeps what is finished.

    Raises:
        HostError: Another host is asked for, and the model has no network part that can be taken out.
        ConfigError: The host does not take the configuration or its options.
        CalibrationError: See `quantize_model`.
    """
    if settings.host == OWN:
        result = calibrate(model, batches, settings.quantizer, progress, checkpoints)
        return QuantizedModel(result.model, result)
    host = find_host(settings.host)
    hosted = calibrate_on_host(host, model, batches, settings.quantizer, settings.options, progress, checkpoints)
    return QuantizedModel(model, hosted.result, hosted.network, hosted)


def load_quantized(path: Path, model: nn.Module, example: Callable[[], Tensor]) -> LoadedModel:
    """Rebuild a saved result on the toolbox model it was made from; it runs simulated, or as its host runs it.

    Args:
        path: A ``repapq.safetensors``: of a whole model, or of a network part that was calibrated for another host. Or
            what a host saved in a form of its own (``nncf.pth``).
        model: The float model of the config; not changed.
        example: Gives a preprocessed image, float ``(1, C, H, W)``; asked only for a form of a host's own.

    Raises:
        ResultError: The file is missing or no such result, or belongs to another model.
        HostError: The same of a host's own form; or the model has no network part that can be taken out.
    """
    load = find_loader(path.suffix)
    if load is not None:
        serving_points(model)
        hosted = load(path, TensorPath(model).eval(), example())
        return LoadedModel(model, None, hosted.network, hosted)
    try:
        result = CalibrationResult.load(path, model)
        return QuantizedModel(result.model, result)
    except ResultError as error:
        try:
            result = CalibrationResult.load(path, TensorPath(model).eval())
        except ResultError:
            raise error from None
        return QuantizedModel(model, result, result.model)


@dataclass(frozen=True)
class Quantization:
    """A quantized toolbox model with its files and its record.

    Args:
        quantized: The network.
        example: Preprocessed image, float ``(1, C, H, W)``, of the size that is exported.
        folder: Work folder.
        record: Grows with each step.
        origin: How the network was made; stands in each of its files.
    """

    quantized: QuantizedModel
    example: Tensor
    folder: Path
    record: Record
    origin: Origin

    @classmethod
    def start(
        cls,
        cfg: Config,
        checkpoint: str | None,
        model: nn.Module,
        batches: Sequence[object],
        settings: Settings,
        folder: Path,
        progress: Report | None = None,
        checkpoints: Checkpoints | None = None,
        cfg_options: Sequence[str] = (),
    ) -> Quantization:
        """Quantize a model, save the result and begin its record.

        Args:
            cfg: The whole config.
            checkpoint: Path of the float weights.
            model: The float model; not changed.
            batches: Collated calibration batches.
            settings: What the config says about RepAPQ.
            folder: Work folder.
            progress: Called as the work goes on.
            checkpoints: Keeps what is finished.
            cfg_options: Overrides that the config was read with.

        Raises:
            HostError, ConfigError, CalibrationError: See `quantize`.
            ResultError: The result cannot be written.
        """
        example = ranks.first(lambda: example_images(model, batches))
        quantized = quantize(model, batches, settings, progress, checkpoints)
        record = Record.start(cfg, checkpoint, settings, quantized.result)
        origin = made_from(cfg, cfg_options, checkpoint, settings, quantized.result)
        record.add_file("result", *ranks.first(lambda: quantized.save(folder, origin)))
        return cls(quantized, example, folder, record, origin)

    def export(self, kind: str) -> Exported:
        """Write the network part as ``'onnx'`` or ``'openvino'``.

        Raises:
            HostError, ExportError: See `QuantizedModel.export`.
        """
        where = self.folder / EXPORTED
        exported = ranks.first(lambda: self.quantized.export(kind, self.example, where, self.origin))
        self.record.add_exported(kind, exported)
        return exported

    def network_on(self, backend: str) -> nn.Module | None:
        """Return what computes the network part on a backend; ``None``: the model itself.

        Args:
            backend: One of `BACKENDS`; for a runtime its file must have been exported.
        """
        kind = RUNTIME_FORMATS.get(backend)
        return self.quantized.network if kind is None else open_network(self.record.files[kind][0], backend)

    def add_scores(self, backend: str, metrics: dict[str, float]) -> None:
        """Keep the metrics of an evaluation on a backend."""
        self.record.add_scores(backend if backend in RUNTIME_FORMATS else "repapq", metrics)

    @property
    def notes(self) -> list[str]:
        """What a reader of the scores should know."""
        notes = list(self.quantized.result.notes)
        if "openvino" in self.record.scores:
            notes.append(saturation_note(self.quantized.result.config.reduce_range))
        return notes


def quantize_and_compare(
    bench: Workbench, step: Step, *, compare: bool, threads: int | None, checkpoints: Checkpoints | None = None
) -> Quantization:
    """Quantize the model of a workbench, score it, export it, and set it beside the float one.

    Args:
        bench: Holds the float model with its weights.
        step: Told about each step.
        compare: Score the float network and plain PTQ too.
        threads: Threads of OpenVINO while it is timed; ``None`` lets it choose.
        checkpoints: Keeps what is finished of the calibration.

    Returns:
        The quantization; its record is not written yet.

    Raises:
        RepAPQError: A step cannot be done.
    """
    settings, scores = bench.settings, dict[str, dict[str, float]]()
    with step("load_data", "Loading calibration images") as report:
        images = len(bench.batches)
        report(Progress("calibration images", images, images))
    if compare:
        with step("score_float", "Scoring the float network") as report:
            scores["float"] = bench.score(bench.model, report=report)
        scores["plain_ptq"] = _score_plain(bench, step)
    with step("calibrate", "Calibrating RepAPQ") as report:
        done = Quantization.start(
            bench.cfg,
            bench.checkpoint,
            bench.model,
            bench.batches,
            settings,
            bench.folder,
            report,
            checkpoints,
            bench.cfg_options,
        )
    for name, metrics in scores.items():
        done.record.add_scores(name, metrics)
    model = done.quantized.model
    how = "simulated" if settings.host == OWN else settings.host
    with step("score_repapq", f"Scoring RepAPQ ({how})") as report:
        done.add_scores("simulated", bench.score(model, done.network_on("simulated"), report))
    for kind in settings.export:
        with step(f"export_{kind}", f"Exporting {kind}"):
            done.export(kind)
    if "openvino" in settings.export:
        with step("score_openvino", "Scoring OpenVINO INT8") as report:
            done.add_scores("openvino", bench.score(model, done.network_on("openvino"), report))
        example = bench.example
        with step("latency", "Measuring latency"):
            merged = ranks.first(lambda: _float_network(bench, example, done.origin))
            done.record.add_exported("float", merged)
            paths = {"float": merged.path, "openvino": Path(done.record.files["openvino"][0])}
            timed = ranks.first(lambda: compare_on_openvino(paths, example, threads))
            done.record.latency, done.record.kernels = timed
    return done


def _float_network(bench: Workbench, example: Tensor, origin: Origin) -> Exported:
    """Write the float network, merged, to compare with."""
    merged = export_network(bench.merged(), example, bench.folder / "float", "openvino")
    return merged.made_by(dataclasses.replace(origin, quantizer=None))


def _score_plain(bench: Workbench, step: Step) -> dict[str, float]:
    """Score plain PTQ by the same host; its network is gone when this returns."""
    settings = dataclasses.replace(bench.settings, quantizer=bench.settings.quantizer.plain())
    with step("calibrate_plain_ptq", "Plain PTQ") as report:
        plain = quantize(bench.model, bench.batches, settings, report)
    with step("score_plain_ptq", "Scoring plain PTQ") as report:
        return bench.score(plain.model, plain.network, report)
