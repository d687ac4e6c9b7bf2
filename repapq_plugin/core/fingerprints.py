"""What a calibration depends on, in words that are the same in every process, to tell whether it is still the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

import numpy as np
import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core import ranks
from repapq_plugin.core.copies import sample_of, samples_in
from repapq_plugin.core.running import Batch
from repapq_plugin.core.tensors import members_of
from repapq_plugin.errors import RankError

Fingerprint = dict[str, dict[str, str]]
"""Groups of values that a work depends on; tensors stand there as digests."""

WITHOUT_EFFECT = ("cache_bytes",)
"""Keys of a configuration on which no result depends."""

SAMPLES = "samples"
"""The group that says which samples there are, in whatever batches, and on how many ranks."""

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
        **_of_data(batches),
        "told": dict(told),
        "version": {name: _version(name) for name in ("repapq-plugin", "torch", *packages)},
        "machine": {"device": device, "threads": str(torch.get_num_threads())},
    }


def _of_data(batches: Sequence[Batch]) -> Fingerprint:
    """Return digests of the batches of all ranks, and one of all samples, by which another number of ranks is told."""
    shares = ranks.gather(
        ([digest(batch) for batch in batches], sorted({each for b in batches for each in _samples(b)}))
    )
    many = len(shares) > 1
    data = {
        f"{number} of rank {rank}" if many else str(number): of_batch
        for rank, (of_batches, _) in enumerate(shares)
        for number, of_batch in enumerate(of_batches, 1)
    }
    samples = sorted({each for _, of_samples in shares for each in of_samples})
    return {"data": data, SAMPLES: {"all": digest(samples), "ranks": str(len(shares))}}


def _samples(batch: Batch) -> list[str]:
    """Return digests of the samples of a batch, or one of all of it where it does not say how many there are."""
    number = samples_in(batch)
    return [digest(batch)] if number is None else [digest(sample_of(batch, index)) for index in range(number)]


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
    before = then.get(SAMPLES)
    others = isinstance(before, Mapping) and before.get("ranks", "1") != now.get(SAMPLES, {}).get("ranks", "1")
    if others and isinstance(before, Mapping) and before.get("all") != now[SAMPLES]["all"]:
        found.append(
            f"the calibration samples differ from those of {before['ranks']} ranks (now {now[SAMPLES]['ranks']})"
        )
    for group, values in now.items():
        # Another number of ranks has the same samples in other batches.
        if group == SAMPLES or (group == "data" and others):
            continue
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


def same_on_ranks(describe: Callable[[], Fingerprint]) -> Callable[[], Fingerprint]:
    """Make sure that all ranks were given the same model, configuration and versions; with one process nothing is done.

    Args:
        describe: Says what this rank was given; on all ranks with all their data.

    Returns:
        What says the same.

    Raises:
        RankError: One was not; the message says which and what differs.
    """
    if ranks.world().size == 1:
        return describe
    mine = describe()
    groups = {key: value for key, value in mine.items() if key not in ("data", SAMPLES, "machine")}
    wanted = ranks.first(lambda: groups)
    for rank, changed in enumerate(ranks.gather(differences(wanted, groups))):
        if changed:
            raise RankError(f"Rank {rank} was given another work than rank 0: {'; '.join(changed)}.")
    return lambda: mine


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
