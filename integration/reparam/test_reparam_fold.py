"""Folding norms into the layers in front of them, found by running the model."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.cnn import ConvModule
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d

from integration.reparam.reparam_blocks import random_input, relative_error, set_norms
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam import fold_batchnorm, fold_conv_norm_pairs
from repapq_plugin.reparam.fold import fold_named_pairs

NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


def norms_in(model: nn.Module) -> int:
    return sum(isinstance(module, NORMS) for module in model.modules())


def prepared(model: nn.Module) -> nn.Module:
    """In float64, with norms that do something."""
    set_norms(model, seed=0, low=-2, high=2, mean=2)
    return model.double()


def check_folding(model: nn.Module, pairs: list[tuple[str, str]], x: Tensor | None = None) -> nn.Module:
    """Fold, compare names and outputs, return the folded model."""
    prepared(model)
    x = random_input(4) if x is None else x
    model.eval()
    with torch.no_grad():
        wanted = model(x.clone())
    before = norms_in(model)
    assert fold_conv_norm_pairs(model, lambda net: net(x.clone())) == pairs
    with torch.no_grad():
        assert relative_error(model(x.clone()), wanted) <= 1e-12
    assert norms_in(model) == before - len(pairs)
    return model


LAYERS = {
    "conv1d": lambda groups: (nn.Conv1d(4, 8, 3, groups=groups), nn.BatchNorm1d(8), (2, 4, 9)),
    "conv2d": lambda groups: (nn.Conv2d(4, 8, 3, 2, 1, groups=groups, bias=False), nn.BatchNorm2d(8), (2, 4, 9, 9)),
    "conv3d": lambda groups: (nn.Conv3d(4, 8, 2, groups=groups), nn.BatchNorm3d(8), (2, 4, 5, 5, 5)),
    "reflecting": lambda groups: (
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect", groups=groups),
        nn.SyncBatchNorm(8),
        (2, 4, 9, 9),
    ),
    "transposed": lambda groups: (
        nn.ConvTranspose2d(4, 8, 3, 2, 1, output_padding=1, groups=groups),
        nn.BatchNorm2d(8),
        (2, 4, 9, 9),
    ),
    "linear": lambda groups: (nn.Linear(4, 8, bias=groups > 1), nn.BatchNorm1d(8, affine=False), (5, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_folded_layer_equals_layer_and_norm(kind: str, dtype: torch.dtype, bound: float) -> None:
    @settings(max_examples=10, deadline=None)
    @given(st.sampled_from([1, 2, 4]), st.integers(0, 2**16), st.tuples(st.integers(-12, 4), st.integers(-12, 4)))
    def check(groups: int, seed: int, exponents: tuple[int, int]) -> None:
        torch.manual_seed(seed)
        layer, norm, shape = LAYERS[kind](groups)
        if norm.affine:
            set_norms(norm, seed, min(exponents), max(exponents))
        layer.to(dtype), norm.to(dtype).eval()
        before = copy.deepcopy(layer.state_dict())
        folded = fold_batchnorm(layer, norm)
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        with torch.no_grad():
            assert relative_error(folded(x), norm(layer(x))) <= bound
        assert type(folded) is type(layer) and folded.weight.dtype == dtype
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())

    check()


@pytest.mark.parametrize(
    ("layer", "norm", "message"),
    [
        (nn.PReLU(4), nn.BatchNorm2d(4), "into PReLU; give a plain convolution"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4), "ParametrizedConv2d"),
        (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(4), "over 4 channels cannot be folded into a layer that gives 6"),
        (nn.ConvTranspose2d(4, 6, 1, groups=2), nn.BatchNorm2d(3), "into a layer that gives 6"),
        (ConvNormAct(4, 4).conv, ConvNormAct(4, 4).bn, "BatchNormAct2d also applies"),
    ],
)
def test_what_cannot_be_folded_is_said(layer: nn.Module, norm: nn.Module, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        fold_batchnorm(layer, norm)


def test_convolution_and_norm_of_every_toolbox_are_found() -> None:
    model = nn.Sequential(
        ConvModule(4, 4, 3, padding=1, norm_cfg=dict(type="BN"), act_cfg=dict(type="SiLU")),
        ConvNormAct(4, 4, 3),
        Conv2dNormActivation(4, 4, 3),
        nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2, groups=2, bias=False), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), FrozenBatchNorm2d(4)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4)),
    )
    check_folding(
        model,
        [
            ("0.conv", "0.bn"),
            ("1.conv", "1.bn"),
            ("2.0", "2.1"),
            ("3.0", "3.1"),
            ("4.0", "4.1"),
            ("5.2", "5.3"),
        ],
    )
    assert isinstance(model[0].norm, nn.Identity)


def test_activation_inside_a_norm_survives() -> None:
    model = check_folding(nn.Sequential(ConvNormAct(4, 4, 3, act_layer=nn.ReLU)), [("0.conv", "0.bn")])
    assert [type(part) for part in model[0].bn] == [nn.ReLU]


class UsedTwice(nn.Module):
    """The convolution's output goes into the norm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + torch.sigmoid(y)


def row_of_pairs(odd_one: nn.Module) -> nn.Module:
    pairs = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(5)]
    return nn.Sequential(*pairs[:2], odd_one, *pairs[2:])


def test_output_that_is_used_twice_is_not_folded_and_others_are() -> None:
    check_folding(row_of_pairs(UsedTwice()), [(f"{i}.0", f"{i}.1") for i in (0, 1, 3, 4, 5)])


def test_output_used_twice_is_noticed_where_the_norm_is_nearly_the_identity() -> None:
    model = UsedTwice()
    assert fold_conv_norm_pairs(model, lambda net: net(random_input(4).float())) == []


class Standardised(nn.Conv2d):
    """Its output does not scale with its weights, so that nothing can be folded into them."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def test_layer_that_does_not_scale_with_its_weights_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    odd_one = nn.Sequential(Standardised(4, 4, 1), nn.BatchNorm2d(4))
    with caplog.at_level(logging.WARNING):
        check_folding(row_of_pairs(odd_one), [(f"{i}.0", f"{i}.1") for i in (0, 1, 3, 4, 5)])
    assert "2.1 stays a norm: folding it into 2.0" in caplog.text


class ReturnsBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        raw = self.conv(x)
        return {"raw": raw, "normed": (self.bn(raw),)}


def test_output_that_is_also_returned_is_not_folded() -> None:
    model = prepared(ReturnsBoth())
    assert fold_conv_norm_pairs(model, lambda net: net(random_input(4))) == []
    assert isinstance(model.bn, nn.BatchNorm2d)


class SharedHead(nn.Module):
    """One convolution for two levels, with one norm for both or one for each."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bns = nn.ModuleList([nn.BatchNorm2d(4)] * 2 if norms == 1 else [nn.BatchNorm2d(4) for _ in range(norms)])

    def forward(self, x: Tensor) -> Tensor:
        levels = (x, x[..., ::2, ::2])
        return torch.cat([norm(self.conv(level)).flatten(2) for norm, level in zip(self.bns, levels, strict=True)], 2)


def test_shared_layer_is_folded_only_with_a_shared_norm() -> None:
    model = check_folding(SharedHead(norms=1), [("conv", "bns.0")])
    assert [type(norm) for norm in model.bns] == [nn.Identity] * 2
    check_folding(SharedHead(norms=2), [])


def test_norm_behind_two_layers_is_not_folded() -> None:
    norm = nn.BatchNorm2d(4)
    check_folding(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 4, 1), norm), [])


def test_module_under_two_names_is_folded_under_both() -> None:
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = nn.Sequential(inner, nn.ReLU())
    model.alias = inner
    model.norm_alias = inner[1]
    model.forward = lambda x: torch.relu(model.alias(x))  # type: ignore[method-assign]
    check_folding(model, [("0.0", "0.1")])
    assert isinstance(model.norm_alias, nn.Identity)


def test_layer_and_norm_that_do_not_meet_are_not_folded() -> None:
    check_folding(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), [])
    # A linear layer gives channels last; the norm takes the second axis.
    tokens = random_input(4, size=(4, 1)).squeeze(-1)
    check_folding(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), [], tokens)


def test_looking_only_changes_nothing() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    before = copy.deepcopy(model.state_dict())
    assert fold_conv_norm_pairs(model, lambda net: net(random_input(4)), inplace=False) == [("0", "1")]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_modes_statistics_and_hooks_are_as_before() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout())).train()
    mean = model[2].running_mean.clone()
    fold_conv_norm_pairs(model, lambda net: net(random_input(4)))
    assert all(module.training for module in model.modules())
    assert torch.equal(model[2].running_mean, mean)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_frozen_layer_stays_frozen() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).requires_grad_(False)
    fold_conv_norm_pairs(model, lambda net: net(random_input(4)))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_run_without_tensors_is_an_error() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(MergeError, match="returned no tensor to compare"):
        fold_conv_norm_pairs(model, lambda net: str(net(random_input(4)).shape))


def test_run_that_fails_leaves_the_model_whole() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    calls = []

    def run(net: nn.Module) -> Tensor:
        calls.append(net)
        if len(calls) > 1:
            raise OSError("disk full")
        return net(random_input(4))

    with pytest.raises(OSError, match="disk full"):
        fold_conv_norm_pairs(model, run)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_known_pairs_are_folded_without_running() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).eval()
    x = random_input(4)
    wanted = model(x)
    fold_named_pairs(model, [("0", "1")])
    assert isinstance(model[1], nn.Identity)
    assert relative_error(model(x), wanted) <= 1e-12
    with pytest.raises(AttributeError, match="no pair"):
        fold_named_pairs(model, [("0", "missing")])


def test_norms_in_a_row_fold_one_after_the_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()).double()
    for norm in (model[1], model[2]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    model.eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    wanted = model(x)
    other = copy.deepcopy(model)
    pairs = fold_conv_norm_pairs(model, lambda network: network(x))
    assert pairs == [("0", "1"), ("0", "2")]
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert torch.allclose(model(x), wanted, rtol=1e-12, atol=1e-12)
    fold_named_pairs(other, pairs)
    assert torch.equal(other(x), model(x))
