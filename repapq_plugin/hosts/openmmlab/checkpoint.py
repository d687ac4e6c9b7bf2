"""Loading a checkpoint into a model: nothing in it is run, and it must belong to the model.

mmengine runs what a file says where it cannot be read otherwise; whoever quantizes a stranger's checkpoint would run
that stranger's code. And mmengine loads what fits and logs the rest; a network calibrated on half-random weights would
look like a bad quantization.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from typing import IO

import torch
from mmengine.runner import CheckpointLoader, Runner
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import MAP_LOCATION

from repapq_plugin.core.unpickling import load_plain
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab._compat import loading_through, unpickling_by
from repapq_plugin.hosts.openmmlab.unpickling import STAND_INS

NAMED = 5
"""How many keys of each kind an error names."""


TRUST = (
    "If you know who made it, give --trust-checkpoint to the command, or set trust_checkpoint=True where the config "
    "speaks of RepAPQ."
)
"""What to do about a file that holds more than plain data."""


@contextmanager
def plain_checkpoints(checkpoint: str, trusted: bool) -> Iterator[None]:
    """Let mmengine read checkpoints without running anything that stands in them; ``.safetensors`` files as well.

    Args:
        checkpoint: Path or address, for errors.
        trusted: Read them as mmengine does, which runs what they say.

    Raises:
        HostError: (later, as one is read) It holds more than plain data, which is named; or it is damaged.
    """
    as_before = torch.load

    def load(
        file: str | PathLike[str] | IO[bytes],
        map_location: MAP_LOCATION = None,
        weights_only: bool | None = None,
        **options: object,
    ) -> object:
        if isinstance(file, str | PathLike) and fspath(file).endswith(".safetensors"):
            try:
                return load_file(file, device=map_location if isinstance(map_location, str) else "cpu")
            except SafetensorError as error:
                raise HostError(f"The checkpoint {checkpoint} cannot be read: {error}") from error
        if trusted:
            return as_before(file, map_location=map_location, weights_only=weights_only)
        return load_plain(file, f"The checkpoint {checkpoint}", TRUST, STAND_INS, map_location)

    with unpickling_by(load):
        yield


def guard(runner: Runner, trusted: bool) -> None:
    """Let a runner load its checkpoint as `plain_checkpoints` does, whenever it comes to it."""

    def around(load: Callable[[], object], checkpoint: str) -> object:
        with plain_checkpoints(checkpoint, trusted):
            return load()

    loading_through(runner, around)


def load_weights(model: nn.Module, checkpoint: str, trusted: bool = False) -> None:
    """Load a checkpoint file (or address that mmengine knows) into ``model``, all of it.

    Args:
        model: Gets the weights.
        checkpoint: Path or address.
        trusted: See `plain_checkpoints`.

    Raises:
        HostError: It cannot be read, holds more than plain data, or does not fit the model.
    """
    try:
        with plain_checkpoints(checkpoint, trusted):
            content = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
    except FileNotFoundError as error:
        raise HostError(f"The checkpoint {checkpoint} does not exist.") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise HostError(f"The checkpoint {checkpoint} cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise HostError(f"The checkpoint {checkpoint} holds a {type(content).__name__}, not a state dict.")
    load_state(model, content, checkpoint)


def load_state(model: nn.Module, checkpoint: Mapping[str, object], source: str) -> None:
    """Load ``checkpoint`` (or its ``state_dict``) into ``model``.

    Raises:
        HostError: There is no state dict, or keys are missing, left over, or of another shape. Each kind is counted
            and the first few are named.
    """
    held = checkpoint.get("state_dict", checkpoint)
    if not isinstance(held, Mapping):
        raise HostError(f"{source} holds a {type(held).__name__} as state_dict, not a state dict.")
    state = {key.removeprefix("module."): value for key, value in held.items() if isinstance(value, Tensor)}
    own = model.state_dict()
    shapes = [
        f"{key} ({tuple(value.shape)} for {tuple(own[key].shape)})"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape
    ]
    if shapes:
        raise HostError(f"{source} does not fit {type(model).__name__}: {_listed(shapes, 'of another shape')}.")
    outcome = model.load_state_dict(state, strict=False)
    missing = [key for key in outcome.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or outcome.unexpected_keys:
        raise HostError(
            f"{source} does not fit {type(model).__name__}: {_listed(missing, 'missing')}, "
            f"{_listed(outcome.unexpected_keys, 'unexpected')}. Give the checkpoint this config was trained to."
        )


def _listed(keys: Sequence[str], kind: str) -> str:
    named = ", ".join(keys[:NAMED]) + (", ..." if len(keys) > NAMED else "")
    return f"{len(keys)} keys {kind}" + (f" ({named})" if keys else "")
