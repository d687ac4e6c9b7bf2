"""Merge by algebra: hidden classes that are convolutions are merged, look-alikes are not."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin.reparam import MergedBlock, MergeRecord, QARepVGGBlock, find_unknown_multibranch, merge_branches
from repapq_plugin.reparam.by_algebra.merge import MAX_GROWTH
from repapq_plugin.reparam.take_over import RewrittenBlock
from tests.support.numerics import random_input, relative_error, set_norms


class Hidden(nn.Module):
    """A class that nobody taught: some layers, and a forward that uses them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


class Untraceable(Hidden):
    """Its forward asks how large the image is, which a symbolic trace cannot answer."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if x.shape[2] > 0 else x


def conv(kernel: int | tuple[int, int], inputs: int = 4, outputs: int = 4, **options: Any) -> nn.Conv2d:
    rows, cols = (kernel, kernel) if isinstance(kernel, int) else kernel
    return nn.Conv2d(inputs, outputs, kernel, padding=(rows // 2, cols // 2), **options)


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def number(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class PadWithBias(nn.Module):
    """Pads with what an empty image would give, written into the border: plain Python, and exact."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = norm()

    def forward(self, x: Tensor) -> Tensor:
        y = functional.pad(self.norm(x), [1, 1, 1, 1])
        empty = self.norm(torch.zeros_like(x[:, :, :1, :1]))
        y[:, :, :1], y[:, :, -1:] = empty, empty
        y[..., :1], y[..., -1:] = empty, empty
        return y


class StandardizedConv(nn.Conv2d):
    """Its kernel is computed from its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight / self.weight.std(), self.bias, padding=1)


# Each with the shape of its one kernel.
HIDDEN: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "outer norm": (
        Hidden(lambda b, x: b.act(b.n(b.n3(b.c3(x)) + b.c1(x) + x)), c3=conv(3), n3=norm(), c1=conv(1), n=norm(),
               act=nn.ReLU()),
        (4, 4, 3, 3),
    ),
    "scaled branches": (
        Hidden(lambda b, x: (b.a * b.c3(x) - 0.5 * b.c1(x) / b.g.sigmoid() + b.g * x).relu(), c3=conv(3), c1=conv(1),
               a=number(1), g=number(1, 4, 1, 1)),
        (4, 4, 3, 3),
    ),
    "average pooling": (
        Hidden(lambda b, x: functional.silu(b.c3(x) + b.n(b.pool(x))), c3=conv(3), n=norm(),
               pool=nn.AvgPool2d(3, 1, 1)),
        (4, 4, 3, 3),
    ),
    "average pooling as a function": (
        Hidden(lambda b, x: functional.relu(b.c3(x) + functional.avg_pool2d(x, 3, 1, 1)), c3=conv(3)),
        (4, 4, 3, 3),
    ),
    "row and column": (
        Hidden(lambda b, x: b.act(b.row(x) + b.col(x)), row=conv((1, 3), 4, 6), col=conv((3, 1), 4, 6),
               act=nn.ReLU(inplace=True)),
        (6, 4, 3, 3),
    ),
    "grouped and identity": (
        Hidden(lambda b, x: b.c(x) + b.n(x) + x, c=conv(3, groups=2), n=norm()),
        (4, 2, 3, 3),
    ),
    "depthwise of two sizes": (
        Hidden(lambda b, x: b.act(b.c5(x) + b.c3(x)), c5=conv(5, groups=4), c3=conv(3, groups=4), act=nn.GELU()),
        (4, 1, 5, 5),
    ),
    "added in place": (
        Hidden(lambda b, x: b.act(b.c3(x).add_(b.c1(x)).mul_(2)), c3=conv(3), c1=conv(1), act=nn.ReLU(inplace=True)),
        (4, 4, 3, 3),
    ),
    "sum of a list": (
        Hidden(lambda b, x: b.act(sum(branch(x) for branch in b.list)), act=nn.ReLU(),
               list=nn.ModuleList(nn.Sequential(conv(k, bias=False), norm()) for k in (1, 3, 5))),
        (4, 4, 5, 5),
    ),
    "mean of a stack": (
        Hidden(lambda b, x: torch.stack([b.c3(x), b.c1(x), x]).mean(0).relu(), c3=conv(3), c1=conv(1)),
        (4, 4, 3, 3),
    ),
    "strided and dilated": (
        Hidden(lambda b, x: (b.d(x) + b.s(x)).relu(), d=nn.Conv2d(4, 6, 3, 2, 2, 2), s=nn.Conv2d(4, 6, 1, 2)),
        (6, 4, 3, 3),
    ),
    "kernel computed on the fly": (
        Hidden(lambda b, x: functional.conv2d(x, b.a.weight + functional.pad(b.b.weight, [1] * 4), b.a.bias, padding=1)
               + b.b(x), a=conv(3), b=conv(1)),
        (4, 4, 3, 3),
    ),
    "convolutions of an own class": (
        Hidden(lambda b, x: (b.s(x) + b.c1(x)).relu(), s=StandardizedConv(4, 4, 3), c1=conv(1)),
        (4, 4, 3, 3),
    ),
    "unknown operation": (
        Hidden(lambda b, x: (torch.einsum("nchw,oc->nohw", x, b.w) + b.c3(x)).relu(), c3=conv(3), w=number(4, 4)),
        (4, 4, 3, 3),
    ),
    "untraceable branch": (
        Hidden(lambda b, x: b.act(b.deep(x) + b.c1(x)), c1=conv(1), act=nn.ReLU(),
               deep=nn.Sequential(conv(1, bias=False), PadWithBias(), nn.Conv2d(4, 4, 3, bias=False), norm())),
        (4, 4, 3, 3),
    ),
    "untraceable as a whole": (
        Untraceable(lambda b, x: b.n(b.c3(x)) + b.c1(x) + 0.5 * x, c3=conv(3), c1=conv(1), n=norm()),
        (4, 4, 3, 3),
    ),
    "blocks in a block": (
        Hidden(lambda b, x: b.act(x + b.g * (b.left(x) - b.right(x))), act=nn.ReLU(), g=number(4, 1, 1),
               left=Hidden(lambda b, x: b.c3(x) + b.c1(x), c3=conv(3), c1=conv(1)),
               right=Hidden(lambda b, x: b.c5(x) + b.n(x), c5=conv(5), n=norm())),
        (4, 4, 5, 5),
    ),
    "QARepVGG": (QARepVGGBlock(4, 4), (4, 4, 3, 3)),
    "QARepVGG, strided and grouped": (QARepVGGBlock(4, 8, stride=2, groups=2, act=nn.SiLU), (8, 2, 3, 3)),
}  # fmt: skip


def prepared(block: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    block = copy.deepcopy(block).eval()
    set_norms(block, seed, low=-1, high=1, mean=1)
    return block


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_block_becomes_one_convolution(name: str, dtype: torch.dtype, bound: float) -> None:
    block, kernel = HIDDEN[name]
    model = nn.Sequential(prepared(block).to(dtype))
    merged, (record,) = merge_branches(model)
    assert record.merged and record.found_by == "algebra" and record.name == "0"
    assert [tuple(layer.weight.shape) for layer in convolutions(merged)] == [kernel]
    for size in ((11, 9), (12, 16), (7, 8)):
        x = random_input(4, size=size).to(dtype)
        with torch.no_grad():
            assert relative_error(merged(x.clone()), model(x.clone())) <= bound
    assert find_unknown_multibranch(merged, lambda net: net(random_input(4).to(dtype))) == []


def test_record_says_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"stem": prepared(HIDDEN["outer norm"][0])})
    with caplog.at_level(logging.INFO):
        _, (record,) = merge_branches(model)
    kind = f"{Hidden.__module__}.Hidden"
    assert record.max_rel_error is not None and 0 < record.max_rel_error < 1e-4
    assert record == MergeRecord("stem", kind, 3, (3, 3), record.max_rel_error, True, "", "algebra")
    assert f"stem ({kind}) is affine and shift-invariant: merged into a 3x3 convolution." in caplog.text


def test_block_of_nothing_else_is_a_merged_block_with_its_activation() -> None:
    merged, _ = merge_branches(nn.Sequential(prepared(HIDDEN["outer norm"][0])))
    assert isinstance(merged[0], MergedBlock) and [type(part) for part in merged[0].after] == [nn.ReLU]
    assert merged[0].conv.weight.requires_grad


class WithGate(nn.Module):
    """Branches in the middle of a forward, a residual and a second pair behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(1), conv(3), norm()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(1), nn.Sigmoid())
        self.left, self.right = conv(3, groups=4), conv(1, groups=4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.stem(x).relu()
        y = (self.a(h) + self.b(h)) * self.gate(h)
        return {"sum": y + x, "pair": torch.cat([self.left(y) + self.right(y), h], 1)}


def test_branches_inside_a_forward_are_merged_where_they_stand() -> None:
    model = prepared(WithGate()).double()
    merged, (record,) = merge_branches(nn.Sequential(model))
    assert isinstance(merged[0], WithGate) and isinstance(merged[0], RewrittenBlock) and record.branches == 2
    assert set(dict(merged[0].named_children())) == {"stem", "gate", "merged", "merged_1"}
    x = random_input(4)
    with torch.no_grad():
        actual, wanted = merged(x), model(x)
    assert max(relative_error(actual[key], wanted[key]) for key in wanted) <= 1e-12
    again, records = merge_branches(copy.deepcopy(merged))
    assert records == [] and len(convolutions(again)) == len(convolutions(merged)) == 4


def test_layers_around_the_sum_are_taken_in_only_where_that_costs_nothing() -> None:
    narrow = Hidden(lambda b, x: b.out(b.a(x) + b.b(x)).relu(), a=conv(3), b=conv(1), out=conv(1, 4, 2))
    wide = Hidden(lambda b, x: b.out(b.a(x) + b.b(x)).relu(), a=conv(3), b=conv(1), out=conv(1, 4, 16))
    shapes = {name: [tuple(layer.weight.shape) for layer in convolutions(merge_branches(prepared(block))[0])]
              for name, block in (("narrow", narrow), ("wide", wide))}  # fmt: skip
    assert shapes == {"narrow": [(2, 4, 3, 3)], "wide": [(4, 4, 3, 3), (16, 4, 1, 1)]}


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = conv(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class BatchShare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / len(x)


LOOK_ALIKES: dict[str, nn.Module] = {
    "activation inside": Hidden(lambda b, x: b.c3(x) + b.c1(x).relu(), c3=conv(3), c1=conv(1)),
    "activation module inside": Hidden(
        lambda b, x: b.c3(x) + b.deep(x), c3=conv(3), deep=nn.Sequential(conv(1), nn.Hardtanh(-50, 50))
    ),
    "clamp that seldom acts": Hidden(lambda b, x: b.c3(x) + b.c1(x).clamp(-50, 50), c3=conv(3), c1=conv(1)),
    "squeeze-excite inside": Hidden(
        lambda b, x: b.c3(x) + b.deep(x), c3=conv(3), deep=nn.Sequential(conv(1), Squeeze())
    ),
    "max pooling": Hidden(
        lambda b, x: b.c3(x) + b.deep(x), c3=conv(3), deep=nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(1))
    ),
    "squares": Hidden(lambda b, x: b.c3(x) ** 2 + b.c1(x) ** 2, c3=conv(3), c1=conv(1)),
    "product of branches": Hidden(lambda b, x: b.c3(x) * b.c1(x), c3=conv(3), c1=conv(1)),
    "normalised by the content": Hidden(
        lambda b, x: b.c3(x) + b.deep(x), c3=conv(3), deep=nn.Sequential(conv(1), nn.InstanceNorm2d(4))
    ),
    "normalised by the batch": Hidden(
        lambda b, x: b.c3(x) + b.deep(x),
        c3=conv(3),
        deep=nn.Sequential(conv(1), nn.BatchNorm2d(4, track_running_stats=False)),
    ),
    "divided by the batch size": Hidden(
        lambda b, x: b.c3(x) + b.deep(x), c3=conv(3), deep=nn.Sequential(conv(1), BatchShare())
    ),
    "bias of each position": Hidden(
        lambda b, x: b.c3(x) + b.c1(x + b.p), c3=conv(3), c1=conv(1), p=number(1, 4, 11, 9)
    ),
    "gate made of the input": Hidden(
        lambda b, x: b.c3(x) + b.c1(x) * b.g(x), c3=conv(3), c1=conv(1), g=nn.Sequential(conv(1), nn.Sigmoid())
    ),
    "mean that leaves padding out": Hidden(
        lambda b, x: b.c3(x) + b.pool(x), c3=conv(3), pool=nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    ),
    "padding behind a norm": Hidden(lambda b, x: b.c1(x) + b.deep(x), c1=conv(1), deep=nn.Sequential(norm(), conv(3))),
    "reflected border": Hidden(lambda b, x: b.c3(x) + b.c1(x), c3=conv(3, padding_mode="reflect"), c1=conv(1)),
    "rolled around": Hidden(lambda b, x: b.c3(x) + b.c1(x).roll(1, 2), c3=conv(3), c1=conv(1)),
    "untraceable, with a clamp": Untraceable(lambda b, x: b.c3(x) + b.c1(x).clamp(-50, 50), c3=conv(3), c1=conv(1)),
    "untraceable, padding behind a norm": Untraceable(
        lambda b, x: b.c1(x) + b.c3(b.n(x)), c1=conv(1), c3=conv(3), n=norm()
    ),
    "dense for a depthwise and a pointwise layer": Hidden(
        lambda b, x: b.dw(x) + b.pw(x), dw=conv(5, 32, 32, groups=32), pw=conv(1, 32, 32)
    ),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alike_stays_as_it_is(name: str) -> None:
    model = nn.Sequential(prepared(LOOK_ALIKES[name]))
    merged, records = merge_branches(model)
    assert type(merged[0]) is type(model[0]) and not any(record.merged for record in records)
    assert len(convolutions(merged)) == len(convolutions(model))
    x = random_input(convolutions(model)[0].in_channels).float()
    with torch.no_grad():
        assert torch.equal(merged(x), model(x))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("padding behind a norm", "a padded layer follows a layer with a bias"),
        ("reflected border", "padding_mode='reflect'"),
        ("mean that leaves padding out", "leaves padding out of the mean"),
        ("normalised by the batch", "keeps no running statistics"),
        ("untraceable, padding behind a norm", "its bias depends on the position"),
        ("dense for a depthwise and a pointwise layer", r"would hold 25600 weights in place of 1824"),
    ],
)
def test_linear_block_that_is_no_convolution_is_named_with_the_reason(
    name: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _, (record,) = merge_branches(nn.ModuleDict({"neck": prepared(LOOK_ALIKES[name])}))
    assert not record.merged and record.found_by == "algebra" and reason in record.reason
    assert "neck" in caplog.text and "stays as it is" in caplog.text and record.reason in caplog.text


def test_growth_is_bounded() -> None:
    assert 25600 > MAX_GROWTH * 1824


def test_only_the_linear_part_of_a_block_is_merged() -> None:
    """A bias of each position behind the sum stays; the sum itself is a convolution."""
    block = prepared(
        Hidden(lambda b, x: (b.c3(x) + b.c1(x) + torch.ones_like(x).cumsum(3)).relu(), c3=conv(3), c1=conv(1))
    )
    x = random_input(4).float()
    merged, (record,) = merge_branches(block)
    assert record.merged and len(convolutions(merged)) == 1
    assert relative_error(merged(x), block(x)) <= 1e-5


def test_block_that_cannot_be_checked_stays() -> None:
    block = prepared(Hidden(lambda b, x: b.c3(x) + b.c1(x) + b.p, c3=conv(3), c1=conv(1), p=number(1, 4, 10, 13)))
    merged, (record,) = merge_branches(block)
    assert not record.merged and "cannot be run alone on one input" in record.reason
    assert type(merged) is Hidden


def test_residual_around_a_unit_without_activation_stays() -> None:
    model = prepared(Hidden(lambda b, x: x + b.n(b.c(x)), c=conv(3), n=norm()))
    merged, records = merge_branches(model)
    assert records == [] and merged is not model and type(merged) is Hidden


def test_modules_of_several_inputs_stay() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3), conv(1)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.a(x) + self.b(x) if y is None else self.a(x) - self.b(y)

    merged, records = merge_branches(nn.ModuleList([prepared(Two())]))
    assert type(merged[0]) is Two and records == []


def test_skipped_and_shared_blocks() -> None:
    block = prepared(HIDDEN["outer norm"][0])
    model = nn.ModuleDict({"first": nn.Sequential(block, nn.ReLU()), "second": block, "third": copy.deepcopy(block)})
    merged, records = merge_branches(model, skip=["third"])
    assert [record.name for record in records] == ["first.0"]
    assert merged["first"][0] is merged["second"] and isinstance(merged["second"], MergedBlock)
    assert type(merged["third"]) is Hidden


@pytest.mark.slow
def test_merging_unchecked_gives_the_same_module() -> None:
    for block, _ in HIDDEN.values():
        checked, _ = merge_branches(nn.Sequential(prepared(block)))
        unchecked, (record,) = merge_branches(nn.Sequential(prepared(block)), verify=False)
        assert record.max_rel_error is None
        assert list(checked.state_dict()) == list(unchecked.state_dict())
        assert all(torch.equal(value, unchecked.state_dict()[key]) for key, value in checked.state_dict().items())


def test_block_its_modes_and_the_random_state_are_left_alone() -> None:
    model = nn.Sequential(prepared(WithGate())).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    merged, _ = merge_branches(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in (*model.modules(), *merged.modules()))


def test_what_a_forward_writes_to_itself_while_it_is_looked_at_is_not_kept() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = conv(3), conv(1), None

        def forward(self, x: Tensor) -> Tensor:
            self.last = x.shape
            return self.a(x) + self.b(x).relu()

    model = nn.Sequential(prepared(Remembers()))
    merged, _ = merge_branches(model)
    assert model[0].last is None and merged[0].last is None


def test_512_channels_are_merged_at_the_cost_of_a_few_runs() -> None:
    width = 512
    block = Hidden(
        lambda b, x: b.act(b.n(b.c3(x)) + b.c1(x) + b.n0(x)), c3=conv(3, width, width, bias=False), n=norm(width),
        c1=conv(1, width, width), n0=norm(width), act=nn.ReLU(),
    )  # fmt: skip
    model = nn.Sequential(prepared(block))
    image = torch.randn(1, width, 56, 56)
    started = time.process_time()
    with torch.no_grad():
        model(image)
    run = time.process_time() - started
    started = time.process_time()
    _, (record,) = merge_branches(model)
    assert record.merged
    assert time.process_time() - started <= 12 * run


def test_qarepvgg_learns_with_its_branches_and_merges() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(QARepVGGBlock(3, 8, stride=2), QARepVGGBlock(8, 8), nn.Flatten(), nn.Linear(8 * 16, 2))
    x = torch.randn(64, 3, 8, 8)
    labels = (x.mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        loss = functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    merged, records = merge_branches(model)
    assert [record.branches for record in records] == [2, 3] and all(record.merged for record in records)
    with torch.no_grad():
        assert relative_error(merged(x), model(x)) <= 1e-5


class ByKeyword(nn.Module):
    """Gives everything by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3), conv(1)

    def forward(self, image: Tensor, *, factor: float = 1.0) -> Tensor:
        return factor * (self.a(input=image) + self.b(input=image))


def test_an_unknown_block_is_noticed_if_all_is_called_by_keyword() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ByKeyword()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(image=x).relu()

    assert find_unknown_multibranch(Outer(), lambda net: net(random_input(4).float())) == ["block"]
