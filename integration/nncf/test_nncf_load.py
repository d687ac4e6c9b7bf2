"""What NNCF saved comes back, and a file of somebody else's runs nothing on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from integration.nncf.conftest import Case
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.nncf import load
from repapq_plugin.hosts.nncf.hosted import STATE_FILE, NNCFNetwork
from repapq_plugin.job import merge_for_inference
from tests.support.hostile import HOSTILE


def merged(case: Case) -> nn.Module:
    return merge_for_inference(case.network, lambda model: model(case.images[0])).network


def saved(case: Case, folder: Path) -> dict[str, object]:
    (path,) = NNCFNetwork(case.result).save(folder)
    assert path == folder / STATE_FILE
    content: dict[str, object] = torch.load(path, weights_only=False)
    return content


@pytest.mark.parametrize("name", ["eight", "four"])
def test_a_saved_network_comes_back_to_the_last_bit(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    case: Case = request.getfixturevalue(name)
    saved(case, tmp_path)
    restored = load(tmp_path / STATE_FILE, merged(case))
    with torch.no_grad():
        assert torch.equal(restored(case.unseen), case.result.model(case.unseen))
    assert not restored.training


@pytest.mark.parametrize("place", ["config", "state_dict", "more"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_and_runs_nothing(kind: str, place: str, eight: Case, tmp_path: Path) -> None:
    make, name = HOSTILE[kind]
    marker, content = tmp_path / "marker", saved(eight, tmp_path)
    content[place] = [content.get(place), make(marker)]
    torch.save(content, tmp_path / STATE_FILE)
    with pytest.raises(HostError) as raised:
        load(tmp_path / STATE_FILE, merged(eight))
    # Nothing but torch's own functions is known here, so all that such a value needs is refused, whatever comes first.
    first = {"array": "multiarray._reconstruct", "lookup": "holds"}.get(kind, name)
    assert first in str(raised.value) and "Quantize again" in str(raised.value)
    assert not marker.exists()
    torch.load(tmp_path / STATE_FILE, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("subprocess", "Popen"), ("nncf.torch", "quantize"), ("repapq_plugin.cli", "main"), ("", "x")],
)
def test_classes_that_are_no_quantizers_are_refused(module: str, name: str, eight: Case, tmp_path: Path) -> None:
    content = saved(eight, tmp_path)
    config = content["config"]
    assert isinstance(config, dict)
    config["compression_state"][0].update(module_path=module, module_cls_name=name)
    torch.save(content, tmp_path / STATE_FILE)
    with pytest.raises(HostError, match="does not fit"):
        load(tmp_path / STATE_FILE, merged(eight))


def test_what_is_no_saved_state_or_of_another_network_is_said(eight: Case, pyramid: Case, tmp_path: Path) -> None:
    path = tmp_path / STATE_FILE
    with pytest.raises(HostError, match=r"nncf\.pth does not exist"):
        load(path, merged(eight))
    for content in ([1], {"config": {}}, torch.ones(1)):
        torch.save(content, path)
        with pytest.raises(HostError, match="is no saved state of NNCF's"):
            load(path, merged(eight))
    for content in ({"config": {}, "state_dict": {}}, {"config": 1, "state_dict": 2}):
        torch.save(content, path)
        with pytest.raises(HostError, match="does not fit"):
            load(path, merged(eight))
    saved(eight, tmp_path)
    with pytest.raises(HostError, match="does not fit Pyramid"):
        load(path, merged(pyramid))
