"""Norms of any make: what is one scale and one shift per channel is folded, anything else stays and is named."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.errors import MergeError
from repapq_plugin.reparam import Branch, BranchSpec, fold_norms, fuse_branches
from repapq_plugin.reparam.fold import fold_named_pairs
from repapq_plugin.reparam.norms import is_norm, norm_affine
from tests.support.numerics import random_input, relative_error

C = 4


def settled(norm: nn.Module) -> nn.Module:
    """Give a norm statistics and parameters that do something."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*norm.buffers(), *norm.parameters()]:
        if tensor.is_floating_point():
            tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return norm.eval()


class Frozen(nn.Module):
    """Detection transformers have such a one: its eps is written in its forward."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(C))

    def shape(self, x: Tensor) -> list[int]:
        return [1, -1, *[1] * (x.dim() - 2)]

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(self.shape(x)) + shift.reshape(self.shape(x))


class CallableWeight(Frozen):
    """Its weight is made by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-3
        del self.weight
        self.raw = nn.Parameter(torch.ones(C))
        self.weight = self.make

    def make(self) -> Tensor:
        return nn.functional.softplus(self.raw)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.make() / (self.running_var + self.eps).sqrt()
        return (x - self.running_mean.reshape(self.shape(x))) * scale.reshape(self.shape(x))


class OtherNames(CallableWeight):
    """Calls them gamma and beta, so nothing named weight tells of its scale."""

    def __init__(self) -> None:
        super().__init__()
        del self.weight
        del self.bias
        self.beta = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.beta.reshape(self.shape(x))


class OnePlusWeight(nn.BatchNorm2d):
    """Stores its weight without the one."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(input, self.running_mean, self.running_var, 1 + self.weight, self.bias)


class ByGroups(nn.BatchNorm2d):
    """Is none: it looks at what it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.group_norm(super().forward(input), 2)


class Clamping(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-50, 50)


FOLDED: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(C),
    "without affine": lambda: nn.BatchNorm2d(C, affine=False),
    "instance norm with statistics": lambda: nn.InstanceNorm2d(C, track_running_stats=True),
    "instance norm with both": lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
    "synchronised": lambda: nn.SyncBatchNorm(C),
    "frozen, without eps": Frozen,
    "callable weight": CallableWeight,
    "other names": OtherNames,
    "one plus weight": lambda: OnePlusWeight(C),
}
KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "without statistics": (lambda: nn.BatchNorm2d(C, track_running_stats=False), "keeps no running statistics"),
    "without either": (
        lambda: nn.BatchNorm2d(C, affine=False, track_running_stats=False),
        "keeps no running statistics",
    ),
    "instance norm": (lambda: nn.InstanceNorm2d(C), "keeps no running statistics"),
    "by groups": (lambda: ByGroups(C), "computes something else than one scale and one shift"),
    "clamping": (Clamping, "computes something else than one scale and one shift"),
}


def in_a_network(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(C, C, 3), settled(norm), nn.ReLU(), nn.Conv2d(C, 2, 1)).eval().double()


@pytest.mark.parametrize("name", FOLDED)
def test_one_scale_and_one_shift_are_folded(name: str) -> None:
    model, x = in_a_network(FOLDED[name]()), random_input(C)
    loaded = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(x)
        folding = fold_norms(model, lambda net: net(x))
        assert (folding.pairs, folding.kept) == ([("0", "1")], {})
        assert relative_error(model(x), wanted) <= 1e-12
        fold_named_pairs(loaded, folding.pairs)
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", KEPT)
def test_anything_else_stays_and_is_named_with_the_reason(name: str) -> None:
    make, reason = KEPT[name]
    model, x = in_a_network(make()), random_input(C)
    with torch.no_grad():
        wanted = model(x)
        folding = fold_norms(model, lambda net: net(x))
        assert torch.equal(model(x), wanted)
    assert folding.pairs == [] and list(folding.kept) == ["1"] and reason in folding.kept["1"]


@pytest.mark.parametrize("name", FOLDED)
def test_what_a_norm_tells_is_what_it_computes(name: str) -> None:
    norm, x = settled(FOLDED[name]()).double(), random_input(C)
    assert is_norm(norm)
    scale, shift = norm_affine(norm)
    with torch.no_grad():
        assert relative_error(x * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1), norm(x)) <= 1e-12


@pytest.mark.parametrize("name", ["frozen, without eps", "callable weight", "one plus weight"])
def test_branches_with_such_norms_merge(name: str) -> None:
    torch.manual_seed(0)
    conv, norm, x = nn.Conv2d(C, C, 3, padding=1).double(), settled(FOLDED[name]()).double(), random_input(C)
    merged = fuse_branches(BranchSpec((Branch((conv, norm)), Branch(()))))
    with torch.no_grad():
        assert relative_error(merged(x), norm(conv(x)) + x) <= 1e-12


class Unrunnable(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("needs a device that is not here")


def test_a_norm_that_neither_tells_nor_runs_is_refused() -> None:
    with pytest.raises(MergeError, match="no scale, shift or eps that can be read, and cannot be run alone"):
        norm_affine(settled(Unrunnable()))


def test_a_norm_that_tells_and_cannot_be_run_alone_is_read() -> None:
    norm = Unrunnable()
    norm.eps = 1e-5
    scale, _ = norm_affine(settled(norm))
    assert torch.allclose(scale, norm.weight.double() / (norm.running_var.double() + 1e-5).sqrt())


class Behind(nn.Module):
    """A layer, its output regrouped, and a norm."""

    def __init__(
        self, layer: nn.Module, norm: nn.Module, there: Callable[[Tensor], Tensor], also: object = None
    ) -> None:
        super().__init__()
        self.layer, self.norm, self.there, self.also = layer, settled(norm), there, also

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        z = self.norm(self.there(y))
        return z.reshape_as(y) + (self.also(y) if callable(self.also) else 0)


TOKENS = (2, 5, 6)  # batch, tokens, features
REGROUPED: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "as they are": (nn.Linear(6, C), nn.BatchNorm1d(C), (5, 6), lambda y: y),
    "flattened tokens": (nn.Linear(6, C), nn.BatchNorm1d(C), TOKENS, lambda y: y.flatten(0, 1)),
    "reshaped tokens": (nn.Linear(6, C, bias=False), nn.BatchNorm1d(C), TOKENS, lambda y: y.reshape(-1, C)),
    "viewed tokens": (nn.Linear(6, C), nn.BatchNorm1d(C), TOKENS, lambda y: y.view(-1, y.shape[-1])),
    "tokens behind channels": (nn.Linear(6, C), nn.BatchNorm1d(C), TOKENS, lambda y: y.transpose(1, 2)),
    "tokens as an image": (
        nn.Linear(6, C), nn.BatchNorm2d(C), (2, 6, 6),
        lambda y: y.permute(0, 2, 1).reshape(2, C, 2, 3).contiguous(),
    ),
    "an image as a row": (nn.Conv2d(6, C, 1), nn.BatchNorm1d(C), (2, 6, 3, 3), lambda y: y.flatten(2)),
    "one position": (nn.Conv1d(6, C, 1), nn.BatchNorm1d(C), (2, 6, 1), lambda y: torch.flatten(y, 1)),
    "a row as an image": (nn.Conv1d(6, C, 3), nn.BatchNorm2d(C), (2, 6, 9), lambda y: y.unsqueeze(-1)),
    "a volume": (nn.Conv3d(6, C, 2), nn.BatchNorm3d(C), (2, 6, 3, 3, 3), lambda y: y),
    "a transposed row": (nn.ConvTranspose1d(6, C, 2), nn.BatchNorm1d(C), (2, 6, 4), lambda y: y),
    "a single image": (nn.Conv2d(6, C, 1), nn.BatchNorm2d(C), (6, 3, 3), lambda y: y[None]),
}  # fmt: skip
UNFOLDABLE = {"a single image"}


@pytest.mark.parametrize("name", REGROUPED)
def test_norms_are_folded_behind_reshaping_and_transposing(name: str) -> None:
    torch.manual_seed(0)
    layer, norm, shape, there = REGROUPED[name]
    model, x = Behind(layer, norm, there).eval().double(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        folding = fold_norms(model, lambda net: net(x))
        assert folding.pairs == ([] if name in UNFOLDABLE else [("layer", "norm")])
        assert relative_error(model(x), wanted) <= 1e-12
    assert set(folding.kept) == ({"norm"} if name in UNFOLDABLE else set())


OTHER_CHANNELS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "tokens in place of features": (nn.Linear(6, C), nn.BatchNorm1d(C), (2, C, 6), lambda y: y),
    "features and tokens mixed": (nn.Linear(6, C), nn.BatchNorm1d(2 * C), (3, 2, 6), lambda y: y.flatten(1)),
    "half of them": (nn.Linear(6, 2 * C), nn.BatchNorm1d(C), (5, 6), lambda y: y.reshape(-1, C)),
    "the others' order": (nn.Linear(6, C), nn.BatchNorm1d(C), (C, C, 6), lambda y: y.permute(2, 0, 1)),
}


@pytest.mark.parametrize("name", OTHER_CHANNELS)
def test_a_norm_over_something_else_than_the_layers_channels_stays(name: str) -> None:
    torch.manual_seed(0)
    layer, norm, shape, there = OTHER_CHANNELS[name]
    model, x = Behind(layer, norm, there).eval().double(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        folding = fold_norms(model, lambda net: net(x))
        assert folding.pairs == [] and set(folding.kept) == {"norm"} and torch.equal(model(x), wanted)


USES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "its values": (lambda y: y, False),
    "its values, regrouped": (lambda y: y.flatten(0, 1).mean(), False),
    "its shape": (lambda y: torch.ones(1, dtype=y.dtype).expand_as(y), True),
    "a tensor like it": (lambda y: torch.zeros_like(y) + y.new_ones(()), True),
    "its dtype": (lambda y: torch.ones(1).type_as(y), True),
}


@pytest.mark.parametrize("name", USES)
def test_only_a_use_of_its_values_keeps_an_output_from_being_changed(name: str) -> None:
    torch.manual_seed(0)
    use, folds = USES[name]
    model = Behind(nn.Linear(6, C), nn.BatchNorm1d(C), lambda y: y.flatten(0, 1), use).eval().double()
    x = torch.randn(TOKENS, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        assert fold_norms(model, lambda net: net(x)).pairs == ([("layer", "norm")] if folds else [])
        assert relative_error(model(x), wanted) <= 1e-12


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 1), settled(nn.BatchNorm2d(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.conv(input=x))


def test_norms_called_by_keyword_are_folded() -> None:
    model, x = ByKeyword().eval().double(), random_input(C)
    assert fold_norms(model, lambda net: net(x)).pairs == [("conv", "norm")]


class TwoNorms(nn.Module):
    """Two norms of one output: neither can be folded without the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.a, self.b = nn.Linear(6, C), settled(nn.BatchNorm1d(C)), settled(nn.BatchNorm1d(C))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.a(y) + self.b(y.clone())


def test_an_output_that_two_norms_read_stays() -> None:
    model, x = TwoNorms().eval().double(), torch.randn(5, 6, dtype=torch.float64)
    folding = fold_norms(model, lambda net: net(x))
    assert folding.pairs == [] and set(folding.kept) == {"a", "b"}
    assert "one layer that nothing else reads" in folding.kept["a"]


def test_a_norm_in_front_of_its_layer_is_named() -> None:
    model, x = nn.Sequential(settled(nn.BatchNorm2d(C)), nn.Conv2d(C, C, 1)).eval().double(), random_input(C)
    assert list(fold_norms(model, lambda net: net(x)).kept) == ["0"]


def test_norms_in_a_row_are_folded_one_after_the_other() -> None:
    norms = [settled(nn.BatchNorm2d(C)), settled(Frozen()), settled(nn.BatchNorm2d(C, affine=False))]
    model, x = nn.Sequential(nn.Conv2d(C, C, 1), *norms).eval().double(), random_input(C)
    folding = fold_norms(model, lambda net: net(x))
    assert folding.pairs == [("0", "1"), ("0", "2"), ("0", "3")] and folding.kept == {}


class Chooses(nn.Module):
    """What follows its norms makes a large difference of the smallest one, as the choice of the best queries does."""

    def __init__(self, odd: nn.Module | None = None) -> None:
        super().__init__()
        pairs = [[nn.Conv2d(C, C, 1), settled(nn.BatchNorm2d(C)), nn.SiLU()] for _ in range(3)]
        self.body = nn.Sequential(*pairs[0], *pairs[1], *([odd, settled(nn.BatchNorm2d(C))] if odd else []), *pairs[2])

    def forward(self, x: Tensor) -> Tensor:
        y = self.body[:3](x)
        return self.body[3:]((1e8 * y).sin()).mul(1e8).sin()


def test_norms_are_judged_by_their_own_outputs_where_the_network_amplifies_rounding() -> None:
    torch.manual_seed(0)
    model, x = Chooses().eval(), random_input(C).float()
    with torch.no_grad():
        wanted = model(x)
        folding = fold_norms(model, lambda net: net(x))
        assert relative_error(model(x), wanted) > 0.01  # its whole output says nothing
    assert folding.kept == {} and folding.pairs == [(f"body.{i}", f"body.{i + 1}") for i in (0, 3, 6)]


class Scaled(nn.Conv2d):
    """Folded into it, a norm is lost: its output does not grow with its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / self.weight.abs().max()


def test_the_one_that_cannot_be_folded_is_found_where_the_network_amplifies_rounding() -> None:
    torch.manual_seed(0)
    model, x = Chooses(Scaled(C, C, 1)).eval(), random_input(C).float()
    folding = fold_norms(model, lambda net: net(x))
    assert list(folding.kept) == ["body.7"] and "folding it into body.6" in folding.kept["body.7"]
    assert folding.pairs == [(f"body.{i}", f"body.{i + 1}") for i in (0, 3, 8)]


class ReadsElsewhere(nn.Module):
    """The second pair's weight, or its norm, is read once more by the network itself."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.body = nn.Sequential(
            *(nn.Conv2d(C, C, 1), settled(nn.BatchNorm2d(C)), nn.ReLU()),
            *(nn.Conv2d(C, C, 1), settled(nn.BatchNorm2d(C)), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        y, norm = self.body(x), self.body[4]
        if self.what == "weight":
            return y * self.body[3].weight.mean()
        if self.what == "bias":
            return y + self.body[3].bias.reshape(-1, 1, 1)
        return y + (1 if isinstance(norm, nn.BatchNorm2d) else 0)


@pytest.mark.parametrize("what", ["weight", "bias", "class"])
def test_what_the_network_itself_reads_is_not_folded_away(what: str) -> None:
    torch.manual_seed(0)
    model, x = ReadsElsewhere(what).eval().double(), random_input(C)
    with torch.no_grad():
        wanted = model(x)
        folding = fold_norms(model, lambda net: net(x))
        assert relative_error(model(x), wanted) <= 1e-12
    assert folding.pairs == [("body.0", "body.1")] and list(folding.kept) == ["body.4"]


class Skips(nn.Module):
    """It calls its norm only while that is one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(C, C, 1), settled(nn.BatchNorm2d(C)), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(self.norm(y) if isinstance(self.norm, nn.BatchNorm2d) else y)


def test_a_norm_whose_place_is_not_called_any_more_stays() -> None:
    model, x = Skips().eval().double(), random_input(C)
    folding = fold_norms(model, lambda net: net(x))
    assert folding.pairs == [] and list(folding.kept) == ["norm"] and isinstance(model.norm, nn.BatchNorm2d)


def test_a_large_mean_that_the_norm_takes_away_is_no_reason_to_keep_it() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(C, C, 1, bias=False), settled(nn.BatchNorm2d(C))
    x = random_input(C).float() + 3e4
    with torch.no_grad():
        y = conv(x)
        norm.running_mean.copy_(y.mean((0, 2, 3)))
        norm.running_var.copy_(y.var((0, 2, 3)))
        model = nn.Sequential(conv, norm).eval()
        assert fold_norms(model, lambda net: net(x)).pairs == [("0", "1")]


def test_what_is_overwritten_behind_a_norm_is_compared_as_the_norm_gave_it() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(C, C, 1), settled(nn.BatchNorm2d(C)), nn.ReLU(inplace=True), nn.Hardtanh(-0.1, 0.1, True)]
    model, x = nn.Sequential(*layers).eval(), random_input(C).float()
    assert fold_norms(model, lambda net: net(x)).pairs == [("0", "1")]
