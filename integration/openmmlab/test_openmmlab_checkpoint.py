from __future__ import annotations

from pathlib import Path

import pytest
import torch

from integration.openmmlab.scenes import CLASSIFIER, random_model
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab.checkpoint import load_weights


def _saved(path: Path, state: object) -> str:
    torch.save({"state_dict": state}, path)
    return str(path)


def test_loads_what_a_parallel_wrapper_saved(tmp_path: Path) -> None:
    model, other = random_model(CLASSIFIER), random_model(CLASSIFIER)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    load_weights(other, _saved(tmp_path / "a.pth", state))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def test_missing_and_unexpected_keys_are_counted_and_named(tmp_path: Path) -> None:
    model = random_model(CLASSIFIER)
    state = model.state_dict()
    del state["head.fc.weight"], state["head.fc.bias"]
    state["head.extra"] = torch.ones(1)
    with pytest.raises(
        HostError, match=r"2 keys missing \(head\.fc\.weight, head\.fc\.bias\), 1 keys unexpected \(head"
    ):
        load_weights(model, _saved(tmp_path / "a.pth", state))


def test_shapes_that_differ_are_named(tmp_path: Path) -> None:
    model = random_model(CLASSIFIER)
    state = {**model.state_dict(), "head.fc.bias": torch.ones(7)}
    with pytest.raises(HostError, match=r"1 keys of another shape \(head\.fc\.bias \(\(7,\) for \(10,\)\)\)"):
        load_weights(model, _saved(tmp_path / "a.pth", state))


def test_a_checkpoint_that_is_not_there_or_is_damaged_is_named(tmp_path: Path) -> None:
    model = random_model(CLASSIFIER)
    with pytest.raises(HostError, match="nowhere.pth does not exist"):
        load_weights(model, str(tmp_path / "nowhere.pth"))
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"\x80\x02not a checkpoint")
    with pytest.raises(HostError, match="damaged.pth cannot be read"):
        load_weights(model, str(damaged))
    with pytest.raises(HostError, match="holds a list"):
        torch.save([1, 2], tmp_path / "list.pth")
        load_weights(model, str(tmp_path / "list.pth"))
