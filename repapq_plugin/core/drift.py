"""Buffers that a network changes whenever it runs: calibration runs it often, and each run has to be the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from repapq_plugin.core.running import inference
from repapq_plugin.core.tensors import tensors_of


@dataclass(frozen=True)
class Drift:
    """What is not the same when a network runs twice on one batch.

    Args:
        buffers: Buffers that it goes on changing, as they were before, by name.
        outputs: Whether it returns something else.
    """

    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth telling."""
        if self.buffers:
            names = f"{', '.join(list(self.buffers)[:5])}{' ...' if len(self.buffers) > 5 else ''}"
            return (f"Each run of the network changes its buffers ({names}); in calibration each began as the first.",)
        if self.outputs:
            return ("The network gives other outputs for the same batch in each run; nothing can be compared exactly.",)
        return ()


def find_drift(model: nn.Module, run: Callable[[nn.Module], object]) -> Drift:
    """Run a network twice on one batch and compare.

    What settles in the first run, as tables that are made for a size of images do, does not drift.

    Args:
        model: Run as at inference; its buffers are changed by the runs.
        run: Makes one forward pass.
    """
    before = _copies(model)
    with inference(model):
        outputs = [tensor.detach().clone() for tensor in tensors_of(run(model))]
        settled = _copies(model)
        again = tensors_of(run(model))
    after = dict(model.named_buffers())
    drifting = {name for name in before.keys() & settled.keys() & after.keys() if not _same(settled[name], after[name])}
    differs = len(outputs) != len(again) or not all(map(_same, outputs, again))
    return Drift({name: value for name, value in before.items() if name in drifting}, differs)


@contextmanager
def kept_buffers(model: nn.Module, names: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a network change copies of the named buffers; afterwards it has its own again."""
    places = list(_places(model, names))
    held = [(module, key, module._buffers[key]) for module, key, _ in places]
    try:
        for module, key, tensor in held:
            # A run that learns may need for its gradients what it has read.
            module._buffers[key] = None if tensor is None else tensor.clone()
        yield
    finally:
        for module, key, tensor in held:
            module._buffers[key] = tensor


def reset_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a network the named buffers back as they were."""
    for module, key, value in _places(model, values):
        module._buffers[key] = value.clone()


def _places(model: nn.Module, names: Mapping[str, Tensor]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the module that holds each buffer, and the buffer's name there; a host may have left some out."""
    modules = dict(model.named_modules()) if names else {}
    for name, value in names.items():
        owner, _, key = name.rpartition(".")
        if owner in modules and key in modules[owner]._buffers:
            yield modules[owner], key, value


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())  # NaN is the same as NaN
