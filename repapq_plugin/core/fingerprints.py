"""What a calibration depends on, in words that are the same in every process, to tell whether it is still the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata

import numpy as np
import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.running import Batch
from repapq_plugin.core.tensors import members_of

Fingerprint = dict[str, dict[str, str]]
"""Groups of values that a work depends on; tensors stand there as digests."""

WITHOUT_EFFECT = ("cache_bytes",)
"""Keys of a configuration on which no result depends."""

NAMED = 3
"""How many of many differences a message names."""


def fingerprint(
    model: nn.Module,
    batches: Sequence[Batch],
    config: RepAPQConfig,
    told: Mapping[str, str],
    packages: Sequence[str],
) -> Fingerprint:
    """Return what the calibration of a model depends on.

    Args:
        model: The float model.
        batches: Calibration batches, in order.
        config: The configuration.
        told: What else decides, by name.
        packages: Distributions whose versions decide, besides torch.
    """
    device = next((tensor.device.type for tensor in (*model.parameters(), *model.buffers())), "cpu")
    keys = {key: value for key, value in config.to_dict().items() if key not in WITHOUT_EFFECT}
    return {
        "config": {key: json.dumps(value, default=str) for key, value in keys.items()},
        "model": digests_of(model),
        "data": {str(number): digest(batch) for number, batch in enumerate(batches, 1)},
        "told": dict(told),
        "version": {name: _version(name) for name in ("repapq-plugin", "torch", *packages)},
        "machine": {"device": device, "threads": str(torch.get_num_threads())},
    }


def digests_of(model: nn.Module) -> dict[str, str]:
    """Return a digest of each parameter and buffer, and of the classes of all modules."""
    kinds = [(name, f"{type(module).__module__}.{type(module).__qualname__}") for name, module in model.named_modules()]
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {"its modules": digest(kinds), **{name: digest(tensor) for name, tensor in named}}


def digest(value: object) -> str:
    """Return 16 digits that differ for different tensors, arrays, numbers and texts in nested containers."""
    found = hashlib.blake2b(digest_size=8)
    _feed(found, value)
    return found.hexdigest()


def _feed(found: hashlib.blake2b, value: object) -> None:
    if isinstance(value, Tensor):
        value = _plain(value)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        found.update(f"array {value.dtype} {value.shape};".encode())
        found.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, str | bytes | int | float | complex | bool | None):
        found.update(f"{type(value).__name__} {value!r};".encode())
    else:
        members = members_of(value)
        found.update(f"{len(members)} members;".encode() if members is not None else b"other;")
        for key in value if isinstance(value, Mapping) else ():
            found.update(f"{key!r};".encode() if isinstance(key, str | int) else b"key;")
        for member in members or ():
            _feed(found, member)


def _plain(tensor: Tensor) -> object:
    """Return the bytes of a tensor with what they mean; only that where it has none (sparse, or on no device)."""
    meaning = (str(tensor.dtype), tuple(tensor.shape))
    try:
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        return (*meaning, plain.view(torch.uint8).numpy())
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return meaning


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def differences(then: Mapping[str, object], now: Fingerprint) -> list[str]:
    """Say in which values two works differ: one phrase for each, an empty list if they are the same.

    Args:
        then: A fingerprint, as a file says it.
        now: Another.
    """
    found: list[str] = []
    for group, values in now.items():
        before = then.get(group)
        known = {str(key): str(value) for key, value in before.items()} if isinstance(before, Mapping) else {}
        changed = [key for key in {**known, **values} if known.get(key) != values.get(key)]
        if not changed:
            continue
        if group == "model":
            found.append(f"the model differs in {_some(changed)}")
        elif group == "data":
            found.append(_data_difference(known, values, changed))
        else:
            prefix = "" if group in ("told", "machine") else f"{group} " if group == "version" else f"{group}."
            found += [
                f"{prefix}{key} was {known.get(key, 'not said')} and is {values.get(key, 'not said')}"
                for key in changed
            ]
    return found


def _data_difference(then: Mapping[str, str], now: Mapping[str, str], changed: Sequence[str]) -> str:
    if len(then) != len(now):
        return f"there were {len(then)} calibration batches and are {len(now)}"
    if Counter(then.values()) == Counter(now.values()):
        return "the calibration batches come in another order"
    return f"the calibration data differs in batch {_some(changed)} of {len(now)}"


def _some(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
