"""Loading a checkpoint into a model, and saying so when the two do not belong together.

mmengine loads what fits and logs the rest; a network calibrated on half-random weights would look
like a bad quantization.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence

from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from repapq_plugin.errors import HostError

NAMED = 5
"""How many keys of each kind an error names."""


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Load a checkpoint file (or address that mmengine knows) into ``model``, all of it.

    Raises:
        HostError: It cannot be read, or does not fit the model.
    """
    try:
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
