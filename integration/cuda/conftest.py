"""Where these tests run; without an accelerator they are left out, with one line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The accelerator of this machine."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        pytest.skip("no accelerator: what a GPU computes was not tested")
    return accelerator


@pytest.fixture(autouse=True)
def _as_torch_starts(device: torch.device) -> Iterator[None]:
    """TF32 is on for convolutions, as it is unless a user turns it off."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.allow_tf32 = before
