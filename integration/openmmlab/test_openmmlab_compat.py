"""What mmengine and mmyolo never promised and this package uses: each test fails where the thing is gone.

Seen on onedl-mmengine 0.10.12 and visaion4mmyolo 0.6.1.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from mmengine.visualization import Visualizer
from mmyolo.registry import HOOKS
from torch import nn

from integration.openmmlab.scenes import DETECTOR, random_model
from repapq_plugin.hosts.openmmlab import _compat
from repapq_plugin.hosts.openmmlab.runner import RepAPQRunner
from tests.support.hostile import write_hostile


class Toy(BaseModel):  # type: ignore[misc]
    """The least that a runner takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        return self.layer(inputs)


def runner_with(folder: Path, *hooks: Hook) -> Runner:
    return Runner(Toy(), str(folder), custom_hooks=list(hooks), experiment_name=folder.name, log_level="WARNING")


def test_mmengine_0_10_12_keeps_a_runner_s_hooks_in_a_list_that_may_be_replaced(tmp_path: Path) -> None:
    plain, averaging = Hook(), EMAHook()
    runner = runner_with(tmp_path / "one", plain, averaging)
    assert isinstance(runner._hooks, list)
    assert runner.hooks is runner._hooks
    before = runner._hooks
    _compat.drop_hooks_on_weights(runner)
    assert averaging in before and averaging not in runner.hooks
    assert plain in runner.hooks and len(runner.hooks) == len(before) - 1


def test_mmengine_0_10_12_lets_a_registered_hook_be_taken_out_again(tmp_path: Path) -> None:
    runner = runner_with(tmp_path / "two")
    before = list(runner.hooks)
    hook = Hook()
    runner.register_hook(hook)
    _compat.remove_hook(runner, hook)
    assert runner.hooks == before


def test_mmengine_0_10_12_swaps_averaged_weights_by_position() -> None:
    """Why the hook is dropped: a merged model has other parameters in other places."""
    hook = EMAHook()
    hook.ema_model = SimpleNamespace(module=nn.Linear(2, 1), update_buffers=False)
    hook.src_model = nn.Sequential(nn.Linear(2, 1))
    average, weight = hook.ema_model.module.weight.clone(), hook.src_model[0].weight.clone()
    hook._swap_ema_parameters()
    assert torch.equal(hook.src_model[0].weight, average)
    assert torch.equal(hook.ema_model.module.weight, weight)


def test_mmyolo_0_6_1_merges_branches_in_a_hook_of_that_name(tmp_path: Path) -> None:
    """Why the hook is dropped: it replaces what a saved result is loaded into."""
    hook = HOOKS.build({"type": _compat.DEPLOY_HOOK})
    assert type(hook).__name__ == _compat.DEPLOY_HOOK
    model = random_model(DETECTOR)
    before = set(model.state_dict())
    hook.before_test_epoch(SimpleNamespace(model=model))
    assert set(model.state_dict()) != before
    runner = runner_with(tmp_path / "three", hook)
    _compat.drop_hooks_on_weights(runner)
    assert hook not in runner.hooks


def test_mmengine_0_10_12_looks_scopes_up_in_a_table_that_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _compat.MODULE2PACKAGE is config_utils.MODULE2PACKAGE
    monkeypatch.delitem(config_utils.MODULE2PACKAGE, "repapq_plugin", raising=False)
    with pytest.raises(AssertionError, match="does not support"):
        config_utils._get_package_and_cfg_path("repapq_plugin::_base_/repapq_w8a8.py")
    _compat.add_scope("repapq_plugin")
    assert config_utils._get_package_and_cfg_path("repapq_plugin::_base_/repapq_w8a8.py")[0] == "repapq_plugin"


@pytest.mark.parametrize("kind", [MMLogger, Visualizer])
def test_mmengine_0_10_12_keeps_loggers_and_visualizers_by_name(kind: Any) -> None:
    """Why each runner's experiment has a name of its own."""
    name = f"compat_{kind.__name__}"
    assert kind.get_instance(name) is kind.get_instance(name)
    assert name in kind._instance_dict
    cfg, other = (Config({"visualizer": {"type": "Visualizer", "name": "visualizer"}}) for _ in range(2))
    _compat.name_experiment(cfg)
    _compat.name_experiment(other)
    assert cfg.experiment_name == cfg.visualizer.name != other.experiment_name
    bare = Config({})
    _compat.name_experiment(bare)
    assert "visualizer" not in bare


def test_mmengine_0_10_12_imports_a_runner_type_by_its_path() -> None:
    """Why a config needs no custom_imports to name the runner."""
    init_default_scope("mmyolo")
    assert RUNNERS.get("repapq_plugin.hosts.openmmlab.RepAPQRunner") is RepAPQRunner


def test_mmengine_0_10_12_reads_every_checkpoint_by_torch_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the reading of checkpoints is replaced there, whatever a checkpoint's address is."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "a.pth"
    cached.parent.mkdir(parents=True)
    torch.save({}, cached)
    addresses = [str(cached), "http://127.0.0.1:9/a.pth", "https://127.0.0.1:9/a.pth"]
    before, seen = torch.load, []

    def load(file: Any, **_: object) -> object:
        seen.append(str(file))
        return {"seen": len(seen)}

    for count, address in enumerate(addresses, 1):
        with _compat.unpickling_by(load):
            assert CheckpointLoader.load_checkpoint(address, map_location="cpu") == {"seen": count}
    assert torch.load is before and seen == [str(cached)] * 3
    with pytest.raises(KeyError), _compat.unpickling_by(load):
        raise KeyError
    assert torch.load is before


def test_mmengine_0_10_12_falls_back_to_running_what_a_file_says(tmp_path: Path) -> None:
    """Why it is replaced at all."""
    marker = tmp_path / "marker"
    path = write_hostile(tmp_path / "a.pth", {}, "shell", marker)
    CheckpointLoader.load_checkpoint(str(path), map_location="cpu")
    assert marker.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_mmengine_0_10_12_loads_and_resumes_by_a_method_of_the_runner(resume: bool, tmp_path: Path) -> None:
    """Why a test loop can stand between: the runner looks the method up when it comes to load."""
    runner = runner_with(tmp_path / f"four_{resume}")
    runner._load_from, runner._resume = "a.pth", resume
    seen = []

    def around(load: Any, address: str) -> object:
        seen.append((callable(load), address))
        raise InterruptedError

    _compat.loading_through(runner, around)
    with pytest.raises(InterruptedError):
        runner.load_or_resume()
    assert seen == [(True, "a.pth")]


def test_mmengine_0_10_12_makes_its_test_loop_before_it_loads(tmp_path: Path) -> None:
    order: list[str] = []
    runner = runner_with(tmp_path / "five")
    runner._test_loop = {}
    runner.build_test_loop = lambda _: order.append("loop") or SimpleNamespace(run=lambda: {})
    runner.load_or_resume = lambda: order.append("load")
    assert runner.test() == {}
    assert order[:2] == ["loop", "load"]


def test_dense_heads_call_what_is_exchanged_and_get_it_back() -> None:
    from mmdet.models.dense_heads import base_dense_head
    from mmyolo.models.dense_heads import yolov5_head

    filter_scores, suppress = _compat.dense_functions()
    assert base_dense_head.filter_scores_and_topk is yolov5_head.filter_scores_and_topk is filter_scores
    assert base_dense_head.batched_nms is suppress
    assert base_dense_head.BaseDenseHead.__name__ == _compat.DENSE_HEAD
    with pytest.raises(KeyError), _compat.everywhere(filter_scores, print), _compat.everywhere(suppress, len):
        assert base_dense_head.filter_scores_and_topk is yolov5_head.filter_scores_and_topk is print
        assert base_dense_head.batched_nms is len
        raise KeyError
    assert base_dense_head.filter_scores_and_topk is yolov5_head.filter_scores_and_topk is filter_scores
    assert base_dense_head.batched_nms is suppress


def test_an_export_is_hidden_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with _compat.outside_of_export():
        assert not torch.onnx.is_in_onnx_export()
    assert torch.onnx.is_in_onnx_export()
