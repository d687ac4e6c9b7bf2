"""Hooks of mmengine by which an unchanged test tool merges branches and refuses checkpoints that do not fit."""

from __future__ import annotations

from collections.abc import Mapping

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from repapq_plugin.hosts.openmmlab._compat import drop_hooks_on_weights
from repapq_plugin.hosts.openmmlab.checkpoint import load_state
from repapq_plugin.reparam.merge import merge_branches


def model_of(runner: Runner) -> nn.Module:
    """Return the runner's model without its parallel wrapper."""
    model: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model


class QPRFusionHook(Hook):  # type: ignore[misc]
    """Merges the branches of the runner's model before it is tested or validated.

    Works on a network of any toolbox that holds known multi-branch blocks. A second time does nothing. Validations
    during a training are left alone: the branches are still learning.

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

    def after_load_checkpoint(self, runner: Runner, checkpoint: Mapping[str, object]) -> None:
        """Load it, which compares keys and shapes.

        Raises:
            HostError: See `load_state`.
        """
        load_state(model_of(runner), checkpoint, "The checkpoint")
