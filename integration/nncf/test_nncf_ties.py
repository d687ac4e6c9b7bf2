"""Biases leave the ties on which learning ends, so that torch and OpenVINO round alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from repapq_plugin.hosts.nncf.learners import WeightLearner
from repapq_plugin.method.learners import TIE_MARGIN, leave_ties
from repapq_plugin.quantizers.layers import ChannelAffine


def layer(bias: float) -> Any:
    conv = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        conv.bias.fill_(bias)  # type: ignore[union-attr]
    return conv


def learner(conv: nn.Module, affine: ChannelAffine | None = None) -> WeightLearner:
    quantizer: Any = None  # only its weight has one
    return WeightLearner(conv, quantizer, affine)


def test_biases_leave_ties_and_weights_stay() -> None:
    one, other, bare = layer(0.5), layer(2.0), layer(0.0)
    affine = ChannelAffine(3, False, one.weight)
    with torch.no_grad():
        affine.beta.fill_(-4.0)
    other.bias = one.bias  # shared: it moves once
    bare.bias = None
    weights = [each.weight.clone() for each in (one, other, bare)]
    leave_ties({"one": learner(one, affine), "other": learner(other), "bare": learner(bare)})
    assert one.bias.tolist() == pytest.approx([0.5 * (1 + TIE_MARGIN)] * 3, rel=1e-6)
    assert affine.beta.tolist() == pytest.approx([-4.0 * (1 + TIE_MARGIN)] * 3, rel=1e-6)
    assert torch.equal(affine.gamma, torch.ones(3))
    assert all(torch.equal(a, b.weight) for a, b in zip(weights, (one, other, bare), strict=True))


@pytest.mark.parametrize("codes", [0.5, 7.5, 100.5])
def test_a_constant_at_a_tie_is_off_it_by_more_than_rounding(codes: float) -> None:
    step = 0.0371
    tied = layer(codes * step)
    leave_ties({"layer": learner(tied)})
    distance = (tied.bias.detach() / step - codes).abs()
    assert float(distance.min()) > 20 * torch.finfo(torch.float32).eps * codes
    assert float(distance.max()) < 0.02  # of a step
