"""A runner that turns an ordinary config into one that tests the quantized network."""

from __future__ import annotations

import copy

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from repapq_plugin.hosts.openmmlab.checkpoint import plain_checkpoints
from repapq_plugin.hosts.openmmlab.hooks import QPRFusionHook
from repapq_plugin.hosts.openmmlab.loops import RepAPQTestLoop
from repapq_plugin.hosts.openmmlab.settings import settings_of


class RepAPQRunner(Runner):  # type: ignore[misc]
    """mmengine's runner, whose ``test()`` quantizes as the config's ``repapq`` dict says.

    It exists because two ``_base_`` files must not define the same key: a file that only sets
    ``runner_type`` and ``repapq`` can stand beside any other, without a line in the config itself.
    Training and validation are mmengine's own, except that no checkpoint runs code there either.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> RepAPQRunner:
        """Build a runner from a config with a ``repapq`` dict (the arguments of `RepAPQTestLoop`).

        Raises:
            ConfigError: A key or value in it is not allowed.
        """
        settings_of(cfg)
        cfg = copy.deepcopy(cfg)
        fp16 = bool((cfg.get("test_cfg") or {}).get("fp16", False))
        cfg["test_cfg"] = {**(cfg.get("repapq") or {}), "type": RepAPQTestLoop.__name__, "fp16": fp16}
        cfg["custom_hooks"] = [*(cfg.get("custom_hooks") or []), {"type": QPRFusionHook.__name__}]
        runner: RepAPQRunner = super().from_cfg(cfg)
        return runner

    def wrap_model(self, model_wrapper_cfg: dict[str, object] | None, model: nn.Module) -> nn.Module:
        """Wrap a model as mmengine's runner does, except on several ranks without GPUs, which its wrapper asks for."""
        if self.distributed and model_wrapper_cfg is None and not torch.cuda.is_available():
            return model
        wrapped: nn.Module = super().wrap_model(model_wrapper_cfg, model)
        return wrapped

    def load_checkpoint(self, filename: str, *args: object, **kwargs: object) -> object:
        """Load a checkpoint as mmengine's runner does, if it holds plain data only or the config trusts it.

        Raises:
            HostError: See `plain_checkpoints`.
        """
        with plain_checkpoints(filename, settings_of(self.cfg).trust_checkpoint):
            return super().load_checkpoint(filename, *args, **kwargs)
