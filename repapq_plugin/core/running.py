"""Running a model: as at inference, and with random numbers that leave no trace outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Batch = object
"""One batch of calibration data; only what runs the network on it knows what it is."""

ForwardFn = Callable[[nn.Module, Any], object]
"""``forward_fn(model, batch)`` runs one batch up to the tensors that matter."""


def call_model(model: nn.Module, batch: Batch) -> object:
    """Run ``model`` on a batch the usual way: a tensor, ``(inputs, ...)``, or a dict of keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(batch[0])
    return model(batch)


def runs(run: Callable[[], object]) -> bool:
    """Whether something that nobody asked for can be run, whatever the user's own code raises."""
    try:
        run()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a model as at inference; every module's mode comes back afterwards.

    The flags are set one by one because some toolboxes' own ``train`` and ``eval`` do more than that.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a model require gradients; inside, some may be told to. Afterwards each has what it had."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _accelerators() -> tuple[str, list[int]]:
    """Return the kind of the accelerators, and the numbers of those that there are."""
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    kind = accelerator.type if accelerator is not None else "cuda"
    module = getattr(torch, kind, None)
    return kind, list(range(module.device_count())) if module is not None and module.is_available() else []


def random_states() -> dict[str, Tensor]:
    """Return the states of torch's generators on all devices, uint8 tensors, by the name of the device."""
    kind, devices = _accelerators()
    states = {f"{kind}:{device}": getattr(torch, kind).get_rng_state(device) for device in devices}
    return {"cpu": torch.get_rng_state(), **states}


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Bring back what `random_states` returned, on the devices that there are."""
    kind, devices = _accelerators()
    torch.set_rng_state(states["cpu"])
    for device in devices:
        if f"{kind}:{device}" in states:
            getattr(torch, kind).set_rng_state(states[f"{kind}:{device}"], device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch on every device; afterwards each generator goes on as if nothing had been drawn."""
    kind, devices = _accelerators()
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.manual_seed(seed)
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host's or a device's memory is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
