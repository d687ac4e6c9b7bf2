"""What learns, and where it comes to rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.calibration import reconstruction
from repapq_plugin.calibration.learners import TIE_MARGIN, LayerLearner, leave_ties
from repapq_plugin.fake_quantize import LearnableFakeQuantize
from repapq_plugin.layers import ChannelAffine, QuantizedLayer
from tests.calibration.networks import Chain, batches, settle


def layer(bias: float) -> QuantizedLayer:
    conv = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        conv.bias.fill_(bias)  # type: ignore[union-attr]
    quantizers = [LearnableFakeQuantize(), LearnableFakeQuantize()]
    return QuantizedLayer(conv, quantizers[0], quantizers[1])


def test_biases_leave_ties_and_weights_stay() -> None:
    one, other, bare = layer(0.5), layer(2.0), layer(0.0)
    one.affine = ChannelAffine(3, False, one.weight)
    with torch.no_grad():
        one.affine.beta.fill_(-4.0)
    other.layer.bias = one.layer.bias  # shared: it moves once
    bare.layer.bias = None
    weights = [each.weight.clone() for each in (one, other, bare)]
    leave_ties({str(i): LayerLearner(each) for i, each in enumerate((one, other, bare))})
    assert one.bias is not None and one.bias.tolist() == pytest.approx([0.5 * (1 + TIE_MARGIN)] * 3, rel=1e-6)
    assert one.affine.beta.tolist() == pytest.approx([-4.0 * (1 + TIE_MARGIN)] * 3, rel=1e-6)
    assert torch.equal(one.affine.gamma, torch.ones(3))
    assert all(torch.equal(a, b.weight) for a, b in zip(weights, (one, other, bare), strict=True))


def test_a_constant_at_a_tie_is_off_it_by_more_than_rounding() -> None:
    step = 0.0371
    for codes in (0.5, 7.5, 100.5):
        tied = layer(codes * step)
        leave_ties({"layer": LayerLearner(tied)})
        assert tied.bias is not None
        distance = (tied.bias.detach() / step - codes).abs()
        assert float(distance.min()) > 20 * torch.finfo(torch.float32).eps * codes
        assert float(distance.max()) < 0.02  # of a step


def test_what_was_learned_leaves_its_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    network, data = settle(Chain()), batches(3)
    config = RepAPQConfig.from_preset("w4a4", steps=40, guard_fraction=0)
    result = quantize_model(network, data, config)
    first = next(unit.name for unit in result.units if unit.kept)
    monkeypatch.setattr(reconstruction, "leave_ties", lambda _: None)
    without = quantize_model(network, data, config)
    # Up to the first unit that learned anything, both calibrations saw the same.
    moved = _bias_in(result.model, first) / _bias_in(without.model, first)
    assert moved.tolist() == pytest.approx([1 + TIE_MARGIN] * len(moved), rel=1e-5)


def _bias_in(model: nn.Module, unit: str) -> Tensor:
    layer = next(module for module in model.get_submodule(unit).modules() if isinstance(module, QuantizedLayer))
    assert layer.bias is not None
    return layer.bias.detach()
