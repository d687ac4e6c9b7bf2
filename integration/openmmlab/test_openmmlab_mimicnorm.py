"""MimicNorm by name: a few steps of mmpretrain's own training, then the test loop and a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from integration.openmmlab.scenes import ROOT
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.hosts.openmmlab.mimicnorm import run_images
from repapq_plugin.hosts.openmmlab.network import run_batch
from repapq_plugin.hosts.openmmlab.workbench import Workbench, open_config
from repapq_plugin.mimicnorm import LastBatchNorm, MimicNorm2d, WeightMean
from repapq_plugin.mimicnorm.convert import replace_batch_norms

FOLDER = ROOT / "mm_configs" / "mimicnorm"
CONFIG = FOLDER / "repvgg_mimicnorm_fashion.py"


def few_steps(folder: Path, config: Path = CONFIG, **options: Any) -> Config:
    cfg = open_config(config)
    cfg.work_dir, cfg.experiment_name, cfg.log_level = str(folder), folder.name, "WARNING"
    cfg.train_dataloader.dataset.update(source="subset", count=64)
    cfg.train_dataloader.update(batch_size=16, num_workers=0, persistent_workers=False)
    cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 4, "val_interval": 99}
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint = {"type": "CheckpointHook", "by_epoch": False, "interval": 4}
    cfg.test_dataloader.dataset.count = 50
    cfg.calib_dataloader.dataset.count = 32
    if "ann_file" in cfg.test_evaluator:
        cfg.test_evaluator.ann_file = cfg.test_evaluator.ann_file.replace("subset-300", "subset-50")
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.merge_from_dict(options)
    return cfg


def largest_mean(model: nn.Module, recipe: str = "default") -> float:
    layers = WeightMean(model, recipe).layers
    return max(float(layer.weight.detach().flatten(1).mean(1).abs().max()) for layer in layers)


def test_a_training_with_average_and_accumulation_keeps_filter_means_at_zero_and_calibrates(tmp_path: Path) -> None:
    cfg = few_steps(tmp_path / "train")
    cfg.custom_hooks = [*cfg.custom_hooks, {"type": "EMAHook"}]
    cfg.optim_wrapper.accumulative_counts = 2
    runner = Runner.from_cfg(cfg)
    runner.train()
    model = runner.model
    assert [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [LastBatchNorm]
    assert largest_mean(model) <= 1e-6
    average = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model
    assert largest_mean(average) <= 1e-6
    scalars = [m.scale for m in model.modules() if isinstance(m, MimicNorm2d) and m.scale is not None]
    optimized = {id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group["params"]}
    assert scalars and all(id(scalar) in optimized for scalar in scalars)

    bench = Workbench(few_steps(tmp_path / "test"), str(tmp_path / "train" / "iter_4.pth"), tmp_path / "test")
    assert 0 <= bench.score(bench.model)["accuracy/top1"] <= 100
    result = bench.calibrate(bench.settings.quantizer.from_preset("w8a8", steps=1))
    assert len(result.merges) == 13 and not result.float_layers
    assert not [m for m in result.model.modules() if isinstance(m, MimicNorm2d | LastBatchNorm)]
    with torch.no_grad():
        wanted, found = run_batch(bench.model, bench.batches[0]), run_batch(result.model, bench.batches[0])
    assert float((found - wanted).norm()) < 0.2 * float(wanted.norm())


def test_resumed_training_keeps_its_weights(tmp_path: Path) -> None:
    Runner.from_cfg(few_steps(tmp_path / "first")).train()
    cfg = few_steps(tmp_path / "second")
    cfg.load_from, cfg.resume = str(tmp_path / "first" / "iter_4.pth"), True
    runner = Runner.from_cfg(cfg)
    runner.train()
    before = torch.load(tmp_path / "first" / "iter_4.pth", map_location="cpu", weights_only=False)["state_dict"]
    after = runner.model.state_dict()
    assert set(before) == set(after)
    assert all(torch.allclose(value, after[key], atol=1e-6) for key, value in before.items())
    assert largest_mean(runner.model) <= 1e-6


def test_the_authors_recipe_is_taken_from_a_config(tmp_path: Path) -> None:
    cfg = few_steps(tmp_path)
    cfg.custom_hooks[0].recipe = "authors"
    cfg.optim_wrapper.optimizer = {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False}
    cfg.optim_wrapper.paramwise_cfg = None
    runner = Runner.from_cfg(cfg)
    start: dict[str, torch.Tensor] = {}
    runner.register_hook(AtTheStart(start), "LOWEST")
    runner.train()
    convolutions = [name for name, module in runner.model.named_modules() if isinstance(module, nn.Conv2d)]
    drawn = max((start[f"{name}.weight"] for name in convolutions), key=torch.numel)
    # He-normal weights of their fan-in, less the filters' means; nothing is scaled afterwards.
    assert float(drawn.std()) == pytest.approx((2 / drawn[0].numel()) ** 0.5, rel=0.05)
    assert largest_mean(runner.model, "authors") <= 1e-6
    linear = runner.model.head.fc[0]
    assert isinstance(linear, nn.Linear) and float(linear.weight.detach().mean(1).abs().max()) > 1e-3
    assert all(group["weight_decay"] == 1e-4 for group in runner.optim_wrapper.optimizer.param_groups)


@pytest.mark.parametrize("recipe", ["author", {"linear_means": False}])
def test_an_unknown_recipe_ends_the_start_of_a_training(recipe: object, tmp_path: Path) -> None:
    cfg = few_steps(tmp_path)
    cfg.custom_hooks[0].recipe = recipe
    with pytest.raises(ConfigError, match="Did you mean '(authors|linear_mean)'"):
        Runner.from_cfg(cfg)


def test_a_model_without_a_known_last_layer_has_to_name_one(tmp_path: Path) -> None:
    cfg = few_steps(tmp_path)
    cfg.model.head.type = "StackedLinearClsHead"
    cfg.model.head.mid_channels = [16]
    with pytest.raises(HostError, match="say behind which layers"):
        Runner.from_cfg(cfg).train()


def one_of_two(rank: int, folder: str) -> None:
    """Train as one of two processes, on data and from random numbers of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    cfg = few_steps(Path(folder) / "train")
    cfg.launcher = "pytorch"
    cfg.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
    cfg.randomness = {"seed": 0, "diff_rank_seed": True}
    runner = Runner.from_cfg(cfg)
    runner.train()
    model = runner.model.module
    torch.save(
        {
            "parameters": {name: value.detach() for name, value in model.named_parameters()},
            "last_norm": model.head.fc[1].running_mean,
            "largest_mean": largest_mean(model),
        },
        Path(folder) / f"{rank}.pth",
    )
    torch.distributed.destroy_process_group()


def test_two_processes_learn_one_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    one, other = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert any(name.endswith(".scale") for name in one["parameters"])
    for name, value in one["parameters"].items():
        assert torch.equal(value, other["parameters"][name]), name
    # They saw other images, or equal weights would prove nothing.
    assert not torch.equal(one["last_norm"], other["last_norm"])
    assert max(one["largest_mean"], other["largest_mean"]) <= 1e-6


@pytest.mark.parametrize("name", ["yolov6-n", "repvgg-fcn"])
def test_networks_of_scenes_learn_and_calibrate(name: str, tmp_path: Path) -> None:
    config = FOLDER / f"{name}_mimicnorm_fashion.py"
    runner = Runner.from_cfg(few_steps(tmp_path / "train", config))
    runner.train()
    model = runner.model
    left = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert left and all(isinstance(norm, LastBatchNorm) and bool(norm.num_batches_tracked > 0) for norm in left)
    assert largest_mean(model) <= 1e-6
    optimized = {id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if name == "yolov6-n":
        # Items are rare, and the head's prediction layers still start from that.
        assert all(float(layer.bias.detach().max()) < -3 for layer in model.bbox_head.head_module.cls_preds)

    bench = Workbench(few_steps(tmp_path / "test", config), str(tmp_path / "train" / "iter_4.pth"), tmp_path / "test")
    result = bench.calibrate(bench.settings.quantizer.from_preset("w8a8", steps=1))
    assert not [m for m in result.model.modules() if isinstance(m, MimicNorm2d | LastBatchNorm)]


@DATASETS.register_module()  # type: ignore[untyped-decorator]
class RandomImages:
    """Eight images of noise."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        from mmpretrain.structures import DataSample

        image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        return {"inputs": image, "data_samples": DataSample().set_gt_label(index)}


class AtTheStart(Hook):  # type: ignore[misc]
    """Keeps the parameters that a training starts from."""

    def __init__(self, kept: dict[str, torch.Tensor]) -> None:
        self.kept = kept

    def before_train(self, runner: Runner) -> None:
        self.kept.update({name: value.detach().clone() for name, value in runner.model.named_parameters()})


WITH_ALL_DATA = sorted(path for path in FOLDER.glob("*.py") if "fashion" not in path.stem)


@pytest.mark.parametrize("path", WITH_ALL_DATA, ids=lambda path: path.stem)
def test_networks_of_full_size_learn(path: Path, tmp_path: Path) -> None:
    cfg = open_config(path)
    cfg.work_dir, cfg.experiment_name, cfg.log_level = str(tmp_path), path.stem, "WARNING"
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 2}
    cfg.param_scheduler = None
    cfg.train_dataloader = {
        "dataset": {"type": "RandomImages"},
        "batch_size": 4,
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "collate_fn": {"type": "default_collate"},
    }
    runner = Runner.from_cfg(cfg)
    start: dict[str, torch.Tensor] = {}
    runner.register_hook(AtTheStart(start), "LOWEST")
    runner.train()
    left = [module for module in runner.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert [type(norm) for norm in left] == [LastBatchNorm]
    changed = [name for name, value in runner.model.named_parameters() if not torch.equal(value, start[name])]
    assert len(changed) > len(start) / 2
    assert largest_mean(runner.model, cfg.custom_hooks[0].get("recipe", "default")) <= 1e-6
    if "authors" in path.stem:
        scalars = [m.scale for m in runner.model.modules() if isinstance(m, MimicNorm2d) and m.scale is not None]
        # One for each of 16 units, three more where a unit has two branches, one behind the last convolution.
        assert len(scalars) == 20
    assert all(bool(parameter.isfinite().all()) for parameter in runner.model.parameters())


def before_the_first_step(cfg: Config) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """Return the weights that the toolbox drew or loaded, and the model that a training starts from."""
    cfg.optim_wrapper.optimizer = {"type": "SGD", "lr": 0.0, "weight_decay": 0.0}
    runner = Runner.from_cfg(cfg)
    drawn: dict[str, torch.Tensor] = {}
    runner.register_hook(AtTheStart(drawn), "HIGHEST")  # in front of ours
    runner.train()
    return drawn, runner.model


def test_frozen_parts_keep_their_weights(tmp_path: Path) -> None:
    cfg = few_steps(tmp_path)
    cfg.model.backbone.frozen_stages = 0
    drawn, model = before_the_first_step(cfg)
    fixed = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert any("stem" in name for name in fixed)
    for name, value in model.named_parameters():
        if name.endswith("conv.weight"):
            assert torch.equal(value, drawn[name]) == (name in fixed), name


def test_pretrained_parts_keep_their_weights(tmp_path: Path) -> None:
    cfg = few_steps(tmp_path)
    runner = Runner.from_cfg(few_steps(tmp_path / "first"))
    runner.train()
    torch.save({"state_dict": runner.model.state_dict()}, tmp_path / "pretrained.pth")
    cfg.model.backbone.init_cfg = {
        "type": "Pretrained",
        "checkpoint": str(tmp_path / "pretrained.pth"),
        "prefix": "backbone.",
    }
    _, model = before_the_first_step(cfg)
    for name, value in runner.model.named_parameters():
        if name.startswith("backbone"):
            assert torch.allclose(model.get_parameter(name), value, atol=1e-6), name


def test_resuming_where_there_is_nothing_yet_starts_afresh(tmp_path: Path) -> None:
    cfg = few_steps(tmp_path)
    cfg.resume = True
    drawn, model = before_the_first_step(cfg)
    assert not torch.equal(model.head.fc[0].weight, drawn["head.fc.0.weight"])


def test_a_detector_of_two_stages_shows_how_it_is_put_together() -> None:
    cfg = open_config(ROOT / "mm_configs" / "mmdet" / "faster-rcnn_repvgg-a0_fpn_1x_coco.py")
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    replaced, kept = replace_batch_norms(model, torch.randn(1, 3, 64, 64), forward_fn=run_images)
    assert len(replaced) > 50 and kept == ()
