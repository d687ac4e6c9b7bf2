"""`RepAPQTestLoop`: a test loop that quantizes first and then scores as its toolbox always does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner, TestLoop
from torch import nn

from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab.data import calibration_batches
from repapq_plugin.hosts.openmmlab.hooks import CheckpointFitHook, drop_hooks_on_weights
from repapq_plugin.hosts.openmmlab.network import serve_with
from repapq_plugin.hosts.openmmlab.other_hosts import OWN, find_engine
from repapq_plugin.hosts.openmmlab.record import Record
from repapq_plugin.hosts.openmmlab.settings import FORMATS, Settings
from repapq_plugin.hosts.openmmlab.work import (
    RESULT_FILE,
    RUNTIME_FORMATS,
    calibrate,
    calibrate_with_engine,
    example_images,
    export_network,
    exported_by_engine,
    open_network,
    writable_folder,
)
from repapq_plugin.job import Progress
from repapq_plugin.result import CalibrationResult


class RepAPQTestLoop(TestLoop):  # type: ignore[misc]
    """Merges, quantizes and calibrates the runner's model, then tests it with the toolbox's own metric.

    In the runner's work folder it leaves ``repapq.safetensors`` (the quantized network), ``result.json``
    (see `Record`) and the exported files asked for.

    Args:
        runner: The runner.
        dataloader: Test dataloader, built or as a dict.
        evaluator: Test evaluator, built or as a dict or list.
        fp16: Run the network under autocast, as in mmengine's loop.
        quantizer: ``preset`` (``'w8a8'``, ``'w6a6'``, ``'w4a4'``, ...) and keys of `RepAPQConfig`;
            ``type='NNCF'`` lets NNCF place its own quantizers, ``type='TorchAO'`` and ``'PT2E'`` run the
            calibrated network in those hosts' integers; ``options`` are what else they are told.
        calibration: ``dataloader`` and ``num_samples``, see `Settings`.
        backend: ``'simulated'``, ``'onnxruntime'`` or ``'openvino'``: what runs the network part
            of the model while it is scored.
        export: True, or names out of ``'onnx'`` and ``'openvino'``.

    Raises:
        ConfigError: A key or value is not allowed.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: Any,
        evaluator: Any,
        fp16: bool = False,
        quantizer: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        backend: str = "simulated",
        export: bool | str | Sequence[str] = (),
    ) -> None:
        self.settings = Settings.from_values(quantizer, calibration, backend, export)
        super().__init__(runner, dataloader, evaluator, fp16)
        drop_hooks_on_weights(runner)
        runner.register_hook(CheckpointFitHook())
        self.result: CalibrationResult | None = None
        self.network: nn.Module | None = None
        self.record: Record | None = None

    def run(self) -> dict[str, float]:
        """Quantize (once) and test.

        Returns:
            The toolbox's metrics.
        """
        if self.result is None:
            self._quantize()
        served: AbstractContextManager[Any] = nullcontext()
        if self.network is not None:
            served = serve_with(self.runner.model, self.network, self._example)
        with served:
            metrics: dict[str, float] = super().run()
        if self.record is not None:
            simulated = self.settings.backend not in RUNTIME_FORMATS
            self.record.add_scores("repapq" if simulated else self.settings.backend, metrics)
            self.record.write(Path(self.runner.work_dir))
        return metrics

    def _quantize(self) -> None:
        runner, settings = self.runner, self.settings
        if is_model_wrapper(runner.model):
            raise HostError("RepAPQTestLoop quantizes in one process; start the test tool with --launcher none.")
        if isinstance(runner.model, BaseTTAModel):
            raise HostError("RepAPQTestLoop does not know test-time augmentation; run the test tool without --tta.")
        folder = writable_folder(runner.work_dir)
        config = settings.quantizer
        batches = calibration_batches(runner.cfg, settings.dataloader, settings.num_samples, config.seed)
        runner.logger.info(f"RepAPQ quantizes: {config.scheme}")
        self._example = example_images(runner.model, batches)
        if settings.engine == OWN:
            self.result = calibrate(runner.model, batches, config, self._log)
            runner.model = self.result.model
            saved = [self.result.save(folder / RESULT_FILE)]
        else:
            quantized = calibrate_with_engine(
                find_engine(settings.engine), runner.model, batches, config, self._log, settings.options
            )
            self.result, self.network = quantized.result, quantized.network
            saved = quantized.save(folder)
        self.record = Record.start(runner.cfg, runner.cfg.get("load_from"), settings, self.result)
        self.record.add_file("result", *saved)
        needed = RUNTIME_FORMATS.get(settings.backend)
        for kind in [kind for kind in FORMATS if kind in settings.export or kind == needed]:
            if settings.engine == OWN:
                exported = export_network(runner.model, self._example, folder / "repapq", kind)
            else:
                exported = exported_by_engine(quantized, self._example, folder / "repapq", kind)
            self.record.add_exported(kind, exported)
            if kind == needed:
                self.network = open_network(exported.path, settings.backend)

    def _log(self, progress: Progress) -> None:
        every = max(1, progress.total // 10)
        if progress.done and (progress.done % every == 0 or progress.done == progress.total):
            self.runner.logger.info(f"RepAPQ {progress.phase}: {progress.done} of {progress.total}")
