"""Old import paths of the hosts, and networks that NNCF saved when a quantizer stood under the old one."""

from __future__ import annotations

import copy
import importlib
import json
import sys
import warnings

import nncf
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import RepAPQConfig
from repapq_plugin._moved import MOVED
from repapq_plugin.hosts.nncf import quantize
from repapq_plugin.hosts.nncf.quantizers import RangeClamp

HOSTS = {old: new for old, new in MOVED.items() if old.startswith("repapq_plugin.hosts.")}


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@pytest.fixture(autouse=True)
def _as_if_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(tuple(HOSTS))]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(("old", "new"), HOSTS.items())
def test_an_old_path_is_the_very_module_and_warns_once(old: str, new: str) -> None:
    for expected in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = importlib.import_module(old)
        assert module is importlib.import_module(new)
        assert module.__spec__ is not None
        assert module.__spec__.name == module.__name__ == new
        assert len([one for one in caught if str(one.message).startswith(f"{old} has moved")]) == expected


def test_a_module_of_a_moved_package_follows_it() -> None:
    with pytest.warns(DeprecationWarning, match=r"nncf_torch\.quantizers has moved"):
        from repapq_plugin.hosts.nncf_torch.quantizers import RangeClamp as Old  # type: ignore[import-not-found]
    assert Old is RangeClamp


def test_a_config_that_nncf_saved_under_the_old_path_loads() -> None:
    torch.manual_seed(0)
    model = TwoLayers().eval()
    images = [torch.randn(1, 3, 8, 8) for _ in range(8)]
    settings = RepAPQConfig.from_preset("w4a4", steps=2, first_last_bits=None)
    quantized = quantize(copy.deepcopy(model), nncf.Dataset(images), repapq=settings)
    text = json.dumps(nncf.torch.get_config(quantized))
    assert "repapq_plugin.hosts.nncf.quantizers" in text
    old = json.loads(text.replace("repapq_plugin.hosts.nncf.", "repapq_plugin.hosts.nncf_torch."))
    with pytest.warns(DeprecationWarning, match=r"nncf_torch\.quantizers has moved"):
        loaded = nncf.torch.load_from_config(model, old, allowed_modules=("nncf.*", "repapq_plugin.*"))
    loaded.load_state_dict(quantized.state_dict())
    assert torch.equal(loaded.eval()(images[0]), quantized.eval()(images[0]))
