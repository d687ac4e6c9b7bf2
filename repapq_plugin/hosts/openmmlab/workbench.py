"""`Workbench`: a config, its float network with weights, and the toolbox's metric, ready for use."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core import ranks
from repapq_plugin.core.origin import Decoding
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.hosts.openmmlab._compat import drop_hooks_on_weights, name_experiment, remove_hook
from repapq_plugin.hosts.openmmlab.checkpoint import load_weights, plain_checkpoints
from repapq_plugin.hosts.openmmlab.data import calibration_batches
from repapq_plugin.hosts.openmmlab.detections import serve_detections
from repapq_plugin.hosts.openmmlab.mimicnorm import MimicNormHook
from repapq_plugin.hosts.openmmlab.network import Preprocessed, preprocess, run_batch, serve_with
from repapq_plugin.hosts.openmmlab.settings import Settings, settings_of
from repapq_plugin.hosts.openmmlab.work import calibrate, writable_folder
from repapq_plugin.job import Progress, Report
from repapq_plugin.merging import merge_for_inference
from repapq_plugin.result import CalibrationResult

TOOLBOX_LOG = "toolbox"
"""Folder inside the work folder that the toolbox's own logs go to."""


def open_config(path: str | Path, options: Sequence[str] = ()) -> Config:
    """Read a config file of any toolbox.

    Args:
        path: The file.
        options: ``KEY=VALUE`` overrides, as the toolboxes' ``--cfg-options`` takes them.

    Raises:
        HostError: It does not exist or cannot be read.
        ConfigError: An option has no ``=``.
    """
    if not Path(path).is_file():
        raise HostError(f"The config {path} does not exist.")
    for option in options:
        if "=" not in option:
            raise ConfigError(f"--cfg-options {option!r} is not allowed; write KEY=VALUE.")
    try:
        cfg = Config.fromfile(str(path))
        if options:
            parser = argparse.ArgumentParser()
            parser.add_argument("--options", nargs="+", action=DictAction)
            cfg.merge_from_dict(parser.parse_args(["--options", *options]).options)
    except Exception as error:  # A config is a program: anything can go wrong in it.
        raise HostError(f"The config {path} cannot be read: {type(error).__name__}: {error}") from error
    return cfg


class Workbench:
    """Loads, calibrates and scores one toolbox model.

    Args:
        cfg: The config, as `open_config` reads it.
        checkpoint: Float checkpoint; ``None`` takes the config's ``load_from``.
        folder: Work folder; made if missing.
        seed: Seed of everything drawn at random; ``None`` takes the config's.
        need_weights: Load the checkpoint; a saved or exported network brings its own weights.
        need_scores: Open the test data; an export does without.
        overrides: See `settings_of`.
        device: Where the model runs, and where it takes its batches; ``None`` leaves it where the toolbox puts it.
        cfg_options: Overrides that the config was read with, to be noted.

    Raises:
        HostError: The config has no test set, the model cannot be built, the checkpoint is missing
            or does not fit, or the folder cannot be written.
        ConfigError: What the config says about RepAPQ is not allowed.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: str | None,
        folder: str | Path,
        *,
        seed: int | None = None,
        need_weights: bool = True,
        need_scores: bool = True,
        overrides: Mapping[str, object] | None = None,
        device: torch.device | None = None,
        cfg_options: Sequence[str] = (),
    ) -> None:
        self.cfg_options = tuple(cfg_options)
        said = dict(overrides or {})
        if seed is not None:
            keys = said.get("quantizer")
            said["quantizer"] = {**(keys if isinstance(keys, Mapping) else {}), "seed": seed}
        self.settings: Settings = settings_of(cfg, **said)
        self.given = cfg
        for key in ("test_dataloader", "test_evaluator"):
            if need_scores and not cfg.get(key):
                raise HostError(
                    f"{cfg.filename} has no {key}, so there is nothing to score on; "
                    "give the config a test_dataloader and a test_evaluator."
                )
        self.checkpoint = checkpoint or cfg.get("load_from")
        if self.checkpoint is None and need_weights:
            raise HostError(f"{cfg.filename} names no checkpoint (load_from); give one after the config.")
        self.folder = writable_folder(folder)
        # A model may read a checkpoint of its own as it is built.
        with plain_checkpoints(f"that {cfg.filename} names", self.settings.trust_checkpoint):
            self.runner = _build_runner(cfg, self.folder / TOOLBOX_LOG, self.settings.quantizer.seed, need_scores)
        if device is not None:
            self.runner.model.to(device)
        self.cfg = self.runner.cfg
        for hook in self.runner.hooks:
            if isinstance(hook, MimicNormHook):  # its last norm is in the checkpoint
                hook.before_run(self.runner)
        if need_weights:
            load_weights(self.runner.model, str(self.checkpoint), self.settings.trust_checkpoint)
        self.model: nn.Module = self.runner.model.eval()
        self._batches: list[object] | None = None
        self._first: Preprocessed | None = None

    @property
    def batches(self) -> list[object]:
        """The calibration batches, loaded once.

        Raises:
            HostError: There is none.
        """
        if self._batches is None:
            settings = self.settings
            self._batches = calibration_batches(
                self.cfg, settings.dataloader, settings.num_samples, settings.quantizer.seed
            )
        return self._batches

    @property
    def example(self) -> Tensor:
        """One preprocessed image, float ``(1, C, H, W)``: of the calibration data, or the test data without any."""
        return self._example["inputs"][:1].clone()

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width, in pixels, of what is image in `example`; the rest is padding."""
        first = cast("Sequence[object]", self._example.get("data_samples") or [None])[0]
        shape = getattr(first, "img_shape", self._example["inputs"].shape[2:])
        return int(shape[0]), int(shape[1])

    @property
    def _example(self) -> Preprocessed:
        if self._first is None:
            self._first = ranks.first(self._preprocessed)
        return self._first

    def _preprocessed(self) -> Preprocessed:
        settings = self.settings
        try:
            batches = self._batches or calibration_batches(self.cfg, settings.dataloader, 1, settings.quantizer.seed)
        except HostError:
            if not self.cfg.get("test_dataloader"):
                raise
            batches = [next(iter(self.runner.test_dataloader))]
        with torch.no_grad():
            return preprocess(self.model, batches[0])

    def calibrate(self, config: RepAPQConfig | None = None, progress: Report | None = None) -> CalibrationResult:
        """Quantize a copy of the float model with the plugin's own quantizers."""
        return calibrate(self.model, self.batches, config or self.settings.quantizer, progress)

    def merged(self) -> nn.Module:
        """Return a float copy with branches merged and norms folded: what the integer network competes with."""
        with torch.no_grad():
            return merge_for_inference(self.model, lambda model: run_batch(model, self.batches[0])).network

    def score(
        self,
        model: nn.Module,
        network: nn.Module | None = None,
        report: Report | None = None,
        decoding: Decoding | None = None,
    ) -> dict[str, float]:
        """Test a model with the toolbox's own loop, data and metric.

        Args:
            model: The float model or a quantized copy of it.
            network: A runtime that computes the model's network part; ``None`` lets the model do it.
            report: Called after each batch.
            decoding: Set where ``network`` is a whole detector: what it leaves to whoever runs it.

        Returns:
            All metrics of the toolbox, by its own names.
        """
        self.runner.model = model
        with _reporting(self.runner, report):
            if network is None:
                metrics: dict[str, float] = self.runner.test()
            elif decoding is not None:
                with serve_detections(model, network, self.example, decoding):
                    metrics = self.runner.test()
            else:
                with serve_with(model, network, self.example):
                    metrics = self.runner.test()
        return metrics


def _build_runner(cfg: Config, folder: Path, seed: int, with_test_loop: bool) -> Runner:
    cfg = copy.deepcopy(cfg)
    fp16 = bool((cfg.get("test_cfg") or {}).get("fp16", False))
    for key in ("test_cfg", "repapq", "runner_type"):
        cfg.pop(key, None)
    cfg.test_cfg = {"type": "TestLoop", "fp16": fp16}
    cfg.work_dir = str(folder)
    cfg.load_from, cfg.resume = None, False
    cfg.launcher = "none"
    cfg.log_level = "WARNING"
    name_experiment(cfg)
    cfg.randomness = {**(cfg.get("randomness") or {}), "seed": seed}
    try:
        runner: Runner = RUNNERS.build(cfg)
        if with_test_loop:
            # Builds it: test data that is missing shall be noticed before the calibration, not after.
            _ = runner.test_loop
    except Exception as error:  # Whatever a toolbox raises for what it cannot build.
        raise HostError(f"{cfg.filename} cannot be built: {type(error).__name__}: {error}") from error
    drop_hooks_on_weights(runner)
    return runner


class _ReportHook(Hook):  # type: ignore[misc]
    def __init__(self, report: Report) -> None:
        self.report = report

    def after_test_iter(self, runner: Runner, batch_idx: int, **_: object) -> None:
        self.report(Progress("test", batch_idx + 1, len(runner.test_dataloader)))


@contextmanager
def _reporting(runner: Runner, report: Report | None) -> Iterator[None]:
    if report is None:
        yield
        return
    hook = _ReportHook(report)
    runner.register_hook(hook)
    try:
        yield
    finally:
        remove_hook(runner, hook)
