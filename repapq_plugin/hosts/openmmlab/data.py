"""Calibration samples from a config's own dataloaders."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import Subset

from repapq_plugin.errors import HostError

REMEDY = (
    "Name another source with calibration=dict(dataloader=...), a dataloader of the config (by name) or a "
    "dataloader dict, or define calib_dataloader."
)


def calibration_batches(
    cfg: Mapping[str, Any], dataloader: str | Mapping[str, Any] | None, num_samples: int, seed: int
) -> list[Any]:
    """Load calibration samples, collated as the toolbox's data preprocessor takes them.

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
        dataset = loader.pop("dataset")
        if isinstance(dataset, Mapping):
            dataset = DATASETS.build(dataset)
            if hasattr(dataset, "full_init"):
                dataset.full_init()
        size = len(dataset)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise HostError(f"The calibration data of {name} cannot be read: {_say(error)}. {REMEDY}") from error
    if size == 0:
        raise HostError(f"The calibration data of {name} holds no sample. {REMEDY}")
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:num_samples]
    loader["dataset"] = Subset(dataset, sorted(drawn.tolist()))
    loader["sampler"] = {"type": "DefaultSampler", "shuffle": False}
    loader["drop_last"] = False
    for key in ("batch_sampler", "num_batch_per_epoch"):
        loader.pop(key, None)
    return list(Runner.build_dataloader(loader, seed=seed))


def choose_dataloader(cfg: Mapping[str, Any], dataloader: str | Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Return a name to speak of and a copy of the dataloader dict that calibration reads.

    Raises:
        HostError: There is no such dataloader, or none to fall back on.
    """
    if isinstance(dataloader, Mapping):
        return "calibration.dataloader", dict(copy.deepcopy(dataloader))
    name = dataloader or ("calib_dataloader" if cfg.get("calib_dataloader") else None)
    if name is None:
        return "train_dataloader (with the test pipeline)", _training_data(cfg)
    if not isinstance(cfg.get(name), Mapping):
        known = sorted(key for key in cfg if key.endswith("dataloader") and isinstance(cfg[key], Mapping))
        raise HostError(f"calibration.dataloader={name!r} is not in the config, which has {', '.join(known)}.")
    return name, dict(copy.deepcopy(cfg[name]))


def _training_data(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The test dataloader, reading the images of the training set."""
    train, test = cfg.get("train_dataloader"), cfg.get("test_dataloader")
    if not isinstance(train, Mapping) or not isinstance(test, Mapping):
        raise HostError(f"The config has no train_dataloader and test_dataloader to calibrate from. {REMEDY}")
    loader = dict(copy.deepcopy(test))
    loader["dataset"] = _with_test_pipeline(_inner(train["dataset"]), _inner(test["dataset"]))
    return loader


def _inner(dataset: Any) -> Any:
    """Look through wrappers (repeat, multi-image mix, class balance) at the data set itself."""
    while isinstance(dataset, Mapping) and isinstance(dataset.get("dataset"), Mapping):
        dataset = dataset["dataset"]
    return dataset


def _with_test_pipeline(train: Any, test: Any) -> Any:
    train = copy.deepcopy(train)
    parts = [_inner(part) for part in train.get("datasets", ())] if isinstance(train, Mapping) else []
    if parts:
        train["datasets"] = [_with_test_pipeline(part, test) for part in parts]
        return train
    for key in ("pipeline", "test_mode"):
        if key in test:
            train[key] = copy.deepcopy(test[key])
    return train


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().rstrip(".")
