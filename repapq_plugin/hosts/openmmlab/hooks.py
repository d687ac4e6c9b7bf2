"""Hooks by which an unchanged test tool merges branches and refuses checkpoints that do not fit."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from repapq_plugin.hosts.openmmlab.checkpoint import load_state
from repapq_plugin.reparam.merge import merge_branches

DEPLOY_HOOK = "SwitchToDeployHook"
"""mmyolo's hook, by name: this package imports no toolbox."""


def model_of(runner: Runner) -> nn.Module:
    """Return the runner's model without its parallel wrapper."""
    model: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model


def drop_hooks_on_weights(runner: Runner) -> None:
    """Take the hooks that change the model around an evaluation out of a runner that only evaluates.

    `EMAHook` swaps parameters with its own copy of the model by position, which breaks once modules were replaced; a
    checkpoint's ``state_dict`` holds the averaged weights already. mmyolo's ``SwitchToDeployHook`` would merge the
    branches of the float model in place and drop their norms, so that a saved result no longer fits the config's model.
    """
    # A new list, because a hook may be calling this from within the runner's loop over the old one.
    runner._hooks = [
        hook for hook in runner.hooks if not isinstance(hook, EMAHook) and type(hook).__name__ != DEPLOY_HOOK
    ]


class QPRFusionHook(Hook):  # type: ignore[misc]
    """Merges the branches of the runner's model before it is tested or validated.

    Works on a network of any toolbox that holds known multi-branch blocks, and a second time does
    nothing. Validations during a training are left alone: the branches are still learning.

    Args:
        verify: Compare every merged block with its branches on random input and log the difference.
    """

    priority = "VERY_HIGH"

    def __init__(self, verify: bool = True) -> None:
        self.verify = verify
        self._training = False

    def before_train(self, runner: Runner) -> None:
        """Remember that branches are needed."""
        self._training = True

    def after_train(self, runner: Runner) -> None:
        """From here on branches may be merged."""
        self._training = False

    def before_val(self, runner: Runner) -> None:
        """Merge, unless a training is under way."""
        if not self._training:
            self._merge(runner)

    def before_test(self, runner: Runner) -> None:
        """Merge."""
        self._merge(runner)

    def _merge(self, runner: Runner) -> None:
        drop_hooks_on_weights(runner)
        _, records = merge_branches(model_of(runner), inplace=True, verify=self.verify)
        merged = [record for record in records if record.merged]
        if merged:
            differences = [record.max_rel_error for record in merged if record.max_rel_error is not None]
            checked = f" (largest relative difference {max(differences):.1e})" if differences else ""
            runner.logger.info(f"RepAPQ merged the branches of {len(merged)} blocks{checked}.")
        for record in records:
            if not record.merged:
                runner.logger.warning(f"RepAPQ left the branches of {record.name} alone: {record.reason}")


class CheckpointFitHook(Hook):  # type: ignore[misc]
    """Stops a test whose checkpoint does not fit the model, where mmengine would only log it."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare keys and shapes.

        Raises:
            HostError: See `load_state`.
        """
        load_state(model_of(runner), checkpoint, "The checkpoint")
