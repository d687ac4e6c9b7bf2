"""Calibration samples from a config's own dataloaders."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import cast

import torch
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import Dataset, Subset

from repapq_plugin.core.ranks import world
from repapq_plugin.errors import HostError

REMEDY = (
    "Name another source with calibration=dict(dataloader=...), a dataloader of the config (by name) or a "
    "dataloader dict, or define calib_dataloader."
)


def calibration_batches(
    cfg: Mapping[str, object], dataloader: str | Mapping[str, object] | None, num_samples: int, seed: int
) -> list[object]:
    """Load calibration samples, collated as the toolbox's data preprocessor takes them; of several ranks a share each.

    Args:
        cfg: The whole config; a runner built from it must have set the default scope.
        dataloader: See `Settings`.
        num_samples: At most so many samples, drawn without replacement where there are more.
        seed: Seed of the draw; the order stays that of the data set.

    Raises:
        HostError: The dataloader is unknown, cannot be built, or gives no sample.
    """
    name, loader = choose_dataloader(cfg, dataloader)
    try:
        dataset = _opened(loader.pop("dataset"))
        size = len(dataset)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise HostError(f"The calibration data of {name} cannot be read: {_say(error)}. {REMEDY}") from error
    if size == 0:
        raise HostError(f"The calibration data of {name} holds no sample. {REMEDY}")
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:num_samples]
    loader["dataset"] = Subset(cast("Dataset[object]", dataset), sorted(drawn.tolist()))
    # Each rank reads its own samples; a batch of all ranks together has as many as one of a single process.
    loader["sampler"] = {"type": "DefaultSampler", "shuffle": False, "round_up": False}
    loader["drop_last"] = False
    if isinstance(each := loader.get("batch_size", 1), int):
        loader["batch_size"] = max(1, -(-each // world().size))
    for key in ("batch_sampler", "num_batch_per_epoch"):
        loader.pop(key, None)
    return list(Runner.build_dataloader(loader, seed=seed))


def choose_dataloader(
    cfg: Mapping[str, object], dataloader: str | Mapping[str, object] | None
) -> tuple[str, dict[str, object]]:
    """Return a name to speak of and a copy of the dataloader dict that calibration reads.

    Raises:
        HostError: There is no such dataloader, or none to fall back on.
    """
    if isinstance(dataloader, Mapping):
        return "calibration.dataloader", dict(copy.deepcopy(dataloader))
    name = dataloader or ("calib_dataloader" if cfg.get("calib_dataloader") else None)
    if name is None:
        return "train_dataloader (with the test pipeline)", _training_data(cfg)
    chosen = cfg.get(name)
    if not isinstance(chosen, Mapping):
        known = sorted(key for key in cfg if key.endswith("dataloader") and isinstance(cfg[key], Mapping))
        raise HostError(f"calibration.dataloader={name!r} is not in the config, which has {', '.join(known)}.")
    return name, dict(copy.deepcopy(chosen))


def _opened(dataset: object) -> Sequence[object]:
    """Build the data set of a dict, and let it read its annotations."""
    if not isinstance(dataset, Mapping):
        return cast("Sequence[object]", dataset)
    built: Sequence[object] = DATASETS.build(dataset)
    read = getattr(built, "full_init", None)
    if callable(read):
        read()
    return built


def _training_data(cfg: Mapping[str, object]) -> dict[str, object]:
    """The test dataloader, reading the images of the training set."""
    train, test = cfg.get("train_dataloader"), cfg.get("test_dataloader")
    if not isinstance(train, Mapping) or not isinstance(test, Mapping):
        raise HostError(f"The config has no train_dataloader and test_dataloader to calibrate from. {REMEDY}")
    loader: dict[str, object] = dict(copy.deepcopy(test))
    loader["dataset"] = _with_test_pipeline(_inner(train["dataset"]), _inner(test["dataset"]))
    return loader


def _inner(dataset: object) -> object:
    """Look through wrappers (repeat, multi-image mix, class balance) at the data set itself."""
    while isinstance(dataset, Mapping) and isinstance(dataset.get("dataset"), Mapping):
        dataset = dataset["dataset"]
    return dataset


def _with_test_pipeline(train: object, test: object) -> object:
    train = copy.deepcopy(train)
    # A data set that is built already reads its images as it does.
    if not isinstance(train, MutableMapping) or not isinstance(test, Mapping):
        return train
    parts = [_inner(part) for part in train.get("datasets", ())]
    if parts:
        train["datasets"] = [_with_test_pipeline(part, test) for part in parts]
        return train
    for key in ("pipeline", "test_mode"):
        if key in test:
            train[key] = copy.deepcopy(test[key])
    return train


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().rstrip(".")
