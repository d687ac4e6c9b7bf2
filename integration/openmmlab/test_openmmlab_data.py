from __future__ import annotations

from typing import Any

import pytest
from mmengine.registry import init_default_scope

from integration.openmmlab.scenes import CLASSIFIER, FEW_ITEMS
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab.data import calibration_batches, choose_dataloader
from repapq_plugin.hosts.openmmlab.workbench import open_config


def _config() -> Any:
    cfg = open_config(CLASSIFIER, FEW_ITEMS)
    init_default_scope(cfg.default_scope)
    return cfg


def _indices(batches: list[Any]) -> list[int]:
    return [sample.sample_idx for batch in batches for sample in batch["data_samples"]]


def test_at_most_so_many_samples_drawn_by_seed() -> None:
    cfg = _config()
    everything = _indices(calibration_batches(cfg, None, 100, seed=0))
    some = _indices(calibration_batches(cfg, None, 5, seed=0))
    assert len(everything) == 16
    assert len(some) == 5
    assert some == sorted(some, key=everything.index)
    assert some == _indices(calibration_batches(cfg, None, 5, seed=0))
    assert some != _indices(calibration_batches(cfg, None, 5, seed=1))


def test_calib_dataloader_goes_before_the_training_set_and_a_name_before_both() -> None:
    cfg = _config()
    assert choose_dataloader(cfg, None)[0] == "calib_dataloader"
    assert choose_dataloader(cfg, "test_dataloader")[1] == dict(cfg.test_dataloader)
    assert choose_dataloader(cfg, {"dataset": [1], "batch_size": 1})[1]["dataset"] == [1]
    cfg.pop("calib_dataloader")
    name, loader = choose_dataloader(cfg, None)
    assert name.startswith("train_dataloader")
    assert loader["dataset"]["split"] == "train"
    assert loader["dataset"]["pipeline"] == cfg.test_dataloader.dataset.pipeline
    assert loader["dataset"]["pipeline"] != cfg.train_dataloader.dataset.pipeline


def test_wrappers_around_the_training_set_are_looked_through() -> None:
    cfg = {
        "train_dataloader": {
            "dataset": {
                "type": "RepeatDataset",
                "dataset": {
                    "type": "ConcatDataset",
                    "datasets": [{"type": "A", "pipeline": ["augment"]}, {"type": "B"}],
                },
            }
        },
        "test_dataloader": {"dataset": {"type": "C", "pipeline": ["plain"], "test_mode": True}, "batch_size": 4},
    }
    _, loader = choose_dataloader(cfg, None)
    assert loader["batch_size"] == 4
    assert loader["dataset"]["datasets"] == [
        {"type": "A", "pipeline": ["plain"], "test_mode": True},
        {"type": "B", "pipeline": ["plain"], "test_mode": True},
    ]


def test_an_empty_dataset_is_an_error_that_names_the_loader() -> None:
    cfg = _config()
    loader = {"dataset": [], "batch_size": 1, "num_workers": 0}
    with pytest.raises(HostError, match="calibration.dataloader holds no sample"):
        calibration_batches(cfg, loader, 8, seed=0)


def test_a_missing_loader_or_data_set_is_named() -> None:
    cfg = _config()
    with pytest.raises(
        HostError, match="dataloader='other_dataloader' is not in the config, which has calib_dataloader"
    ):
        calibration_batches(cfg, "other_dataloader", 8, seed=0)
    with pytest.raises(HostError, match="no train_dataloader and test_dataloader"):
        calibration_batches({}, None, 8, seed=0)
    cfg.calib_dataloader.dataset = {"type": "ImageNet", "data_root": "nowhere", "split": "train", "pipeline": []}
    with pytest.raises(HostError, match="calib_dataloader cannot be read"):
        calibration_batches(cfg, None, 8, seed=0)
