"""What NNCF must leave alone, however its weight is used; and what a network does to what it is given."""

from __future__ import annotations

import nncf
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin import RepAPQConfig
from repapq_plugin.hosts.nncf import quantize_with_record
from repapq_plugin.hosts.nncf._compat import BaseQuantizer, decode_hook_name, get_hook_storage
from repapq_plugin.hosts.nncf.operations import find_operations
from repapq_plugin.result import Calibrated
from tests.support.in_place import PLACES
from tests.support.in_place import Net as InPlace
from tests.support.own_layers import ByMatmul, Twice


class Used(nn.Module):
    """Layers that are called, a weight that a function reads, one that it reads changed, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.read, self.scaled = (nn.Conv2d(width, 6, 3, 1, 1) for width in (3, 6, 6))
        self.twice, self.fc = Twice(6, 6, 3, 1, 1), ByMatmul(6, 4)
        self.own = nn.Parameter(torch.randn(6, 6, 1, 1) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(self.stem(x).relu(), self.read.weight, self.read.bias, padding=1).relu()
        x = functional.conv2d(x, 2 * self.scaled.weight.tanh(), padding=1).relu()
        return self.fc(functional.conv2d(self.twice(x).relu(), self.own).mean((2, 3)))


def images(count: int = 8) -> list[Tensor]:
    return [torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def record(model: nn.Module, preset: str = "w8a8", **keys: object) -> Calibrated:
    config = RepAPQConfig.from_preset(preset, **{"steps": 0, **keys})
    return quantize_with_record(model.eval(), nncf.Dataset(images()), repapq=config)


def rounded(model: nn.Module) -> set[str]:
    """Return the operations whose weight is rounded."""
    hooks = get_hook_storage(model).named_hooks(remove_duplicate=False)
    names = [decode_hook_name(name) for name, hook in hooks if isinstance(hook, BaseQuantizer)]
    return {operation for kind, operation, port in names if kind == "pre_hooks" and port == 1}


def test_operations_of_layers_that_are_not_planned() -> None:
    found = find_operations(Used().eval(), images()[0], ["stem"])
    # The network's own convolutions are those of `read` and `scaled`; that of its own weight is left to NNCF.
    assert {"/conv2d/0", "/conv2d/1", "twice/conv2d/0", "twice/conv2d/1"} <= set(found.left_float)
    assert any(name.startswith("fc/") for name in found.left_float)
    assert not {"/conv2d/2", "stem/conv2d/0"} & set(found.left_float)
    assert "stem/conv2d/0" in found.of_layers and "stem/conv2d/0" not in found.left_float
    everything = find_operations(Used().eval(), images()[0], ["stem", "read", "scaled", "twice", "fc"])
    assert not everything.left_float


def test_weights_that_functions_read_stay_float_and_the_record_says_so() -> None:
    done = record(Used())
    assert list(done.layers) == ["stem"]
    assert rounded(done.model) == {"stem/conv2d/0", "/conv2d/2"}
    assert set(done.float_layers) == {"read", "scaled", "twice", "fc"}
    assert done.notes == ("What the network computes with weights by itself, NNCF quantizes as it decides.",)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other, self.head = (nn.Conv2d(width, 6, 3, 1, 1) for width in (3, 6, 6, 6))
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(2 * self.one(self.stem(x).relu()).relu()).relu())


@pytest.mark.parametrize("steps", [0, 8])
def test_of_layers_with_one_weight_the_one_that_needs_most_bits_decides(steps: int) -> None:
    done = record(Tied(), "w4a4", steps=steps, layer_bits={"other": (6, 4)})
    assert done.layers["one"][0] == done.layers["other"][0] == 6
    assert done.model.one.weight is done.model.other.weight
    levels = max(len(kernel.unique()) for kernel in done.model.one.weight.detach().flatten(1))
    assert 15 < levels <= 63


def test_one_weight_is_learned_once() -> None:
    torch.manual_seed(3)
    tied = Tied().eval()
    with torch.no_grad():
        wanted = torch.cat([tied(x) for x in images()])

        def error(model: nn.Module) -> float:
            return float((torch.cat([model(x) for x in images()]) - wanted).abs().mean())

        assert error(record(tied, steps=8).model) < error(record(tied).model)
        assert error(record(tied).model) < error(nncf.quantize(tied, nncf.Dataset(images())))


def test_one_weight_of_which_a_layer_stays_float() -> None:
    done = record(Tied(), keep_float=("other",))
    assert "other" in done.float_layers and "one" in done.layers
    assert "one/conv2d/0" in rounded(done.model) and "other/conv2d/0" not in rounded(done.model)


class Shifted(nn.Module):
    """Shifts and scales what it is given, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(0.5).div_(0.2) if self.in_place else x.sub(0.5).div(0.2))


def test_a_network_that_changes_its_input_is_quantized_as_one_that_does_not() -> None:
    torch.manual_seed(5)
    models = [Shifted(True), Shifted(False)]
    models[1].load_state_dict(models[0].state_dict())
    items = images()
    done = [
        quantize_with_record(model.eval(), nncf.Dataset(items), repapq=RepAPQConfig(steps=4)).model for model in models
    ]
    assert all(torch.equal(a, b) for a, b in zip(items, images(), strict=True))
    with torch.no_grad():
        assert torch.equal(done[0](items[0].clone()), done[1](items[0].clone()))


SLICES = ("slice of the input", "slice of a value")
"""Where NNCF, which does not see that what is read was changed, puts its quantizers in other places."""


@pytest.mark.parametrize("where", [where for where in PLACES if where not in SLICES])
@pytest.mark.parametrize("steps", [0, 4])
def test_so_is_one_that_works_in_place_anywhere_else(where: str, steps: int) -> None:
    done = []
    for in_place in (True, False):
        torch.manual_seed(5)
        done.append(record(InPlace(where, in_place), "w4a4", steps=steps))
    assert done[0].layers == done[1].layers and not done[0].float_layers
    with torch.no_grad():
        assert torch.equal(*(each.model(images()[0]) for each in done))


@pytest.mark.parametrize("where", SLICES)
def test_one_that_changes_a_slice_is_nearer_to_float_than_nncf_leaves_it(where: str) -> None:
    torch.manual_seed(5)
    model = InPlace(where, True).eval()
    others = images(24)[8:]
    with torch.no_grad():
        wanted = torch.cat([model(x.clone()) for x in others])

        def error(quantized: nn.Module) -> float:
            return float((torch.cat([quantized(x.clone()) for x in others]) - wanted).abs().mean())

        plain = error(nncf.quantize(model, nncf.Dataset(images(), torch.clone)))
        ranges, learned = (error(record(model, steps=steps).model) for steps in (0, 8))
        assert ranges < plain and learned < ranges


def test_with_its_quantizers_off_nncfs_correction_of_biases_is_off() -> None:
    torch.manual_seed(6)
    model = Shifted(False).eval()
    done = record(model, "w8a8")
    assert list(done.layers) == ["body.0", "body.3"] and not done.float_layers
    plain = nncf.quantize(model, nncf.Dataset(images()))
    assert isinstance(plain, nn.Module)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.other = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(functional.gelu(self.one(self.norm(x))))


@pytest.mark.parametrize("kind", [None, nncf.ModelType.TRANSFORMER])
def test_transformers_are_not_smoothed_behind_our_back(kind: nncf.ModelType | None) -> None:
    model = Tokens().eval()
    done = quantize_with_record(model, nncf.Dataset(images()), model_type=kind, repapq=RepAPQConfig(steps=0))
    assert list(done.layers) == ["one", "other"]
    kinds = {type(hook).__name__ for _, hook in get_hook_storage(done.model).named_hooks()}
    assert kinds <= {"SymmetricQuantizer", "AsymmetricQuantizer"}
