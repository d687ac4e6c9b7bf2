"""`RepAPQTestLoop`: a test loop that quantizes first and then scores as its toolbox always does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from mmengine.evaluator import Evaluator
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner, TestLoop
from torch import nn
from torch.utils.data import DataLoader

from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.core.progress import ProgressLines
from repapq_plugin.core.ranks import world
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab._compat import drop_hooks_on_weights
from repapq_plugin.hosts.openmmlab.checkpoint import guard
from repapq_plugin.hosts.openmmlab.data import calibration_batches
from repapq_plugin.hosts.openmmlab.hooks import CheckpointFitHook
from repapq_plugin.hosts.openmmlab.network import serve_with
from repapq_plugin.hosts.openmmlab.settings import Settings
from repapq_plugin.hosts.openmmlab.showing import show
from repapq_plugin.hosts.openmmlab.steps import Quantization
from repapq_plugin.hosts.openmmlab.work import writable_folder
from repapq_plugin.result import Calibrated


class RepAPQTestLoop(TestLoop):  # type: ignore[misc]
    """Merges, quantizes and calibrates the runner's model, then tests it with the toolbox's own metric.

    Under a launcher each rank calibrates on its share of the data and tests on its share; rank 0 writes.

    In the runner's work folder it leaves ``repapq.safetensors`` (the quantized network), ``result.json`` (see `Record`)
    and the exported files asked for. Scores, the losses of units and figures go to the runner's visualizer.

    Args:
        runner: The runner.
        dataloader: Test dataloader, built or as a dict.
        evaluator: Test evaluator, built or as a dict or list.
        fp16: Run the network under autocast, as in mmengine's loop.
        quantizer: ``preset`` (``'w8a8'``, ``'w6a6'``, ``'w4a4'``, ..., ``'paper-w6a6'``) and keys of `RepAPQConfig`.
            ``type='NNCF'`` lets NNCF place its own quantizers, ``type='TorchAO'`` and ``'PT2E'`` run the calibrated
            network in those hosts' integers; ``options`` are what else they are told.
        calibration: ``dataloader`` and ``num_samples``, see `Settings`.
        backend: ``'simulated'``, ``'onnxruntime'`` or ``'openvino'``: what runs the network part of the model while it
            is scored.
        export: True for all that can be written, or names out of ``'onnx'`` and ``'openvino'``.
        trust_checkpoint: Let the runner's checkpoint run what stands in it, as mmengine does; else one that holds more
            than plain data is refused.
        checkpoint_dir: Folder that keeps what is finished of the calibration until all is done; default:
            ``checkpoint`` in the work folder.
        resume: Go on with what it keeps, to the last bit as if nothing had interrupted; or begin, if there is nothing.

    Raises:
        ConfigError: A key or value is not allowed.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader[object] | Mapping[str, object],
        evaluator: Evaluator | Mapping[str, object] | Sequence[object],
        fp16: bool = False,
        quantizer: Mapping[str, object] | None = None,
        calibration: Mapping[str, object] | None = None,
        backend: str = "simulated",
        export: bool | str | Sequence[str] = (),
        trust_checkpoint: bool = False,
        checkpoint_dir: str | None = None,
        resume: bool = False,
    ) -> None:
        self.settings = Settings.from_values(
            quantizer, calibration, backend, export, trust_checkpoint, checkpoint_dir, resume
        )
        guard(runner, trust_checkpoint)  # mmengine makes its loops before it loads
        super().__init__(runner, dataloader, evaluator, fp16)
        drop_hooks_on_weights(runner)
        runner.register_hook(CheckpointFitHook())
        self.quantization: Quantization | None = None
        self.network: nn.Module | None = None
        self.checkpoints = Checkpoints()
        self._batches: list[object] = []

    @property
    def result(self) -> Calibrated | None:
        """How the network came about; ``None`` before the first run."""
        return None if self.quantization is None else self.quantization.quantized.result

    def run(self) -> dict[str, float]:
        """Quantize (once) and test.

        Returns:
            The toolbox's metrics.
        """
        done = self.quantization or self._quantize()
        served: AbstractContextManager[object] = nullcontext()
        if self.network is not None:
            served = serve_with(self.runner.model, self.network, done.example)
        with served:
            metrics: dict[str, float] = super().run()
        done.add_scores(self.settings.backend, metrics)
        if world().rank == 0:
            done.record.write(Path(self.runner.work_dir))
        self.checkpoints.remove()
        if self._batches:
            try:
                show(self.runner, done, self._batches, metrics)
            except Exception as error:  # A visualizer backend is anybody's code; the scores stand without it.
                self.runner.logger.warning(f"RepAPQ shows no figures: {type(error).__name__}: {error}")
            self._batches = []  # shown once
        return metrics

    def _quantize(self) -> Quantization:
        runner, settings = self.runner, self.settings
        if is_model_wrapper(runner.model):  # of training on several ranks, each of which has the whole model
            runner.model = runner.model.module
        if isinstance(runner.model, BaseTTAModel):
            raise HostError("RepAPQTestLoop does not know test-time augmentation; run the test tool without --tta.")
        folder = writable_folder(runner.work_dir)
        self.checkpoints = settings.checkpoints(folder)
        batches = calibration_batches(runner.cfg, settings.dataloader, settings.num_samples, settings.quantizer.seed)
        runner.logger.info(f"RepAPQ quantizes: {settings.quantizer.scheme}")
        progress = ProgressLines(lambda line: runner.logger.info(f"RepAPQ {line}"))
        done = Quantization.start(
            runner.cfg, runner.cfg.get("load_from"), runner.model, batches, settings, folder, progress, self.checkpoints
        )
        runner.model = done.quantized.model
        for kind in settings.formats:
            done.export(kind)
        self.network = done.network_on(settings.backend)
        self.quantization, self._batches = done, batches
        return done
