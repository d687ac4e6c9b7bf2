"""Which devices torch finds here, and what ``--device`` may name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repapq_plugin.errors import ConfigError

if TYPE_CHECKING:
    import torch


def accelerators() -> dict[str, str]:
    """Return the accelerators that torch can use, and what their makers call them, by names that torch takes."""
    import torch

    if not torch.accelerator.is_available():
        return {}
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return {}
    called = getattr(torch.get_device_module(kind), "get_device_name", lambda index: kind.type)
    return {f"{kind.type}:{index}": called(index) for index in range(torch.accelerator.device_count())}


def device_named(name: str) -> torch.device:
    """Return a device that is there.

    Args:
        name: ``'cpu'``, a kind of accelerator, or one of several: ``'cuda:1'``.

    Raises:
        ConfigError: There is no such device here; those that are here are named.
    """
    import torch

    there = {"cpu": "", **accelerators()}
    device: torch.device | None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and (str(device) in there or (":" not in name and f"{device.type}:0" in there)):
        return device
    known = ", ".join(f"{known} ({called})" if called else known for known, called in there.items())
    raise ConfigError(f"--device {name!r} is not allowed; torch finds {known} here.")
