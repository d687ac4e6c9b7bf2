"""Checks mean something in every precision: half weights are compared in float64, and TF32 is off while comparing."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.core.compare import HALF_ROUNDING, ROUNDING, precise, rounding_of
from repapq_plugin.reparam import Branch, BranchSpec, MergedBlock, fold_norms, merge_branches, register_branches
from repapq_plugin.reparam.take_over import RewrittenBlock
from tests.support.numerics import random_input, relative_error, set_norms

HALVES = [torch.float16, torch.bfloat16]
half = pytest.mark.parametrize("dtype", HALVES)


def conv(size: int) -> nn.Conv2d:
    return nn.Conv2d(4, 4, size, padding=size // 2)


class Taught(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm, self.one, self.act = conv(3), nn.BatchNorm2d(4), conv(1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.dense(x)) + self.one(x))


class NearlyTaught(Taught):
    """Scales one branch by two percent more than is taught: half precision alone would not show it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.dense(x)) + 1.02 * self.one(x))


@register_branches(Taught)
def _taught(block: Taught) -> BranchSpec:
    return BranchSpec((Branch((block.dense, block.norm)), Branch((block.one,))), after=(block.act,))


class Stranger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm, self.one = conv(3), nn.BatchNorm2d(4), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.norm(self.dense(x)) + self.one(x)) * x


def block_in(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    block = kind().eval()
    set_norms(block, seed=0, low=-1, high=1, mean=1)
    return block.to(dtype)


@half
@pytest.mark.parametrize(("kind", "role"), [(Taught, MergedBlock), (Stranger, RewrittenBlock)])
def test_blocks_of_half_weights_are_merged_in_float64(
    kind: type[nn.Module], role: type[nn.Module], dtype: torch.dtype
) -> None:
    block, x = block_in(kind, dtype), random_input(4).to(dtype)
    merged, (record,) = merge_branches(block)
    assert record.merged and isinstance(merged, role)
    assert all(parameter.dtype == dtype for parameter in merged.parameters())
    assert 0 <= record.max_rel_error <= HALF_ROUNDING
    with torch.no_grad():
        assert relative_error(merged(x), block(x)) <= HALF_ROUNDING


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_a_function_that_is_two_percent_off_is_refused_in_every_precision(dtype: torch.dtype) -> None:
    block = block_in(NearlyTaught, dtype)
    merged, (record,) = merge_branches(block)
    assert not record.merged and "does not describe its forward" in record.reason


@half
@pytest.mark.parametrize("kind", [Taught, Stranger])
def test_a_processor_without_half_precision_merges_all_the_same(
    kind: type[nn.Module], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = block_in(kind, dtype)
    own = nn.Conv2d._conv_forward

    def refusing(layer: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dtype in HALVES:
            raise RuntimeError("not implemented for half")
        return own(layer, input, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", refusing)
    _, (record,) = merge_branches(block)
    assert record.merged and record.max_rel_error <= 1e-9


@half
def test_norms_are_folded_into_half_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), conv(3), nn.BatchNorm2d(4)).eval()
    set_norms(model, seed=0, low=-1, high=1, mean=1)
    model, x = model.to(dtype), random_input(4).to(dtype)
    with torch.no_grad():
        wanted = model(x)
        assert fold_norms(model, lambda net: net(x)).pairs == [("0", "1"), ("3", "4")]
        assert model(x).dtype == dtype and relative_error(model(x), wanted) <= HALF_ROUNDING


class ReadsItsWeightTwice(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / self.weight.abs().max()


@half
def test_a_fold_that_changes_the_output_is_seen_in_half_precision_too(dtype: torch.dtype) -> None:
    model = nn.Sequential(ReadsItsWeightTwice(4, 4, 1), nn.BatchNorm2d(4)).eval()
    set_norms(model, seed=0, low=-1, high=1, mean=1)
    model, x = model.to(dtype), random_input(4).to(dtype)
    folding = fold_norms(model, lambda net: net(x))
    assert folding.pairs == [] and folding.kept == {"1": "folding it into 0 changes the model's output"}


def test_the_coarsest_dtype_says_what_rounding_is() -> None:
    single, double = torch.ones(1), torch.ones(1).double()
    assert rounding_of([]) == rounding_of([single, double, torch.ones(1, dtype=torch.int64)]) == ROUNDING
    assert all(rounding_of([single, single.to(dtype)]) == HALF_ROUNDING for dtype in HALVES)


BACKENDS = torch.backends
SWITCHES = {
    "nothing": lambda: None,
    "matmul precision": lambda: torch.set_float32_matmul_precision("high"),
    "lowest matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "cuda switch": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "cudnn switch": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
}
if hasattr(BACKENDS.cudnn, "conv"):
    SWITCHES |= {
        "setting of one operator": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
        "settings of two": lambda: (
            setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
            setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
        ),
    }


def settings() -> dict[str, object]:
    """Everything that says how float32 is multiplied; what cannot be read at the moment is None."""
    read = {
        "matmul": lambda: torch.get_float32_matmul_precision(),
        "cuda": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "cudnn": lambda: BACKENDS.cudnn.allow_tf32,
        "cuda, single": lambda: getattr(BACKENDS.cuda.matmul, "fp32_precision", None),
        "conv, single": lambda: getattr(getattr(BACKENDS.cudnn, "conv", None), "fp32_precision", None),
        "processor, single": lambda: getattr(getattr(BACKENDS.mkldnn, "matmul", None), "fp32_precision", None),
    }
    values: dict[str, object] = {}
    for name, get in read.items():
        try:
            values[name] = get()
        except RuntimeError:
            values[name] = None
    return values


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("fails", [False, True])
def test_inside_float32_is_float32_and_settings_come_back(name: str, fails: bool) -> None:
    before = settings()
    try:
        SWITCHES[name]()
        chosen = settings()
        with pytest.raises(KeyError) if fails else contextlib.nullcontext(), precise():
            inside = settings()
            if fails:
                raise KeyError
        assert settings() == chosen
        assert inside["matmul"] in ("highest", None) and not inside["cuda"] and not inside["cudnn"]
        assert inside["cuda, single"] in ("ieee", "none", None) and inside["conv, single"] in ("ieee", "none", None)
    finally:
        _restore(before)


def _restore(before: dict[str, object]) -> None:
    for owner, key in ((BACKENDS.cuda.matmul, "cuda, single"), (getattr(BACKENDS.cudnn, "conv", None), "conv, single")):
        if before[key] is not None:
            owner.fp32_precision = before[key]
    torch.set_float32_matmul_precision(before["matmul"])
    BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32 = before["cuda"], before["cudnn"]
    for owner, key in ((BACKENDS.cuda.matmul, "cuda, single"), (getattr(BACKENDS.cudnn, "conv", None), "conv, single")):
        if before[key] is not None:
            owner.fp32_precision = before[key]


class Watching(nn.Conv2d):
    """Notes how float32 is multiplied while it runs."""

    seen: list[object] = []

    def forward(self, input: Tensor) -> Tensor:
        self.seen.append(torch.get_float32_matmul_precision())
        return super().forward(input)


@pytest.mark.parametrize("what", ["fold", "taught", "algebra"])
def test_checks_run_with_float32_as_it_is(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watching, "seen", [])
    before = settings()
    try:
        torch.set_float32_matmul_precision("high")
        if what == "fold":
            model = nn.Sequential(Watching(4, 4, 1), nn.BatchNorm2d(4)).eval()
            fold_norms(model, lambda net: net(random_input(4).float()))
        else:
            block = (Taught if what == "taught" else Stranger)().eval()
            block.dense = nn.Sequential(block.dense)
            block.one.register_forward_hook(lambda *_: Watching.seen.append(torch.get_float32_matmul_precision()))
            merge_branches(block)
        assert Watching.seen and set(Watching.seen[-2:]) == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        _restore(before)
