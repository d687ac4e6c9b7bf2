"""Recipes by name and by choice, and what each of them does to a network."""

import math

import pytest
import torch
import torchvision
from torch import nn

from repapq_plugin.errors import ConfigError
from repapq_plugin.mimicnorm import (
    RECIPES,
    LastBatchNorm,
    MimicNorm2d,
    Recipe,
    WeightMean,
    convert,
    find_recipe,
    make_sgd,
)


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_authors_recipe_is_what_their_code_does() -> None:
    assert find_recipe("authors") == Recipe(
        min_fan_in=1, linear_mean=False, concatenated=True, start="he", decay="all", nesterov=False
    )
    assert find_recipe("default") == Recipe() != RECIPES["authors"]


def test_choices_are_given_by_name_by_difference_or_whole() -> None:
    own = Recipe(start="he")
    assert find_recipe(own) is own
    assert find_recipe({"start": "he"}) == own
    mixed = Recipe(min_fan_in=1, linear_mean=False, concatenated=True, start="he", decay="all")
    assert find_recipe({"preset": "authors", "nesterov": True}) == mixed


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("author", "recipe='author' is not allowed; choose one of 'default', 'authors'.* Did you mean 'authors'"),
        ({"preset": "theirs"}, "recipe='theirs' is not allowed"),
        ({"min_fanin": 9}, "recipe.min_fanin is not a choice.* Did you mean 'min_fan_in'"),
        ({"min_fan_in": 0}, "recipe.min_fan_in=0 is not allowed; choose a whole number from 1 on"),
        ({"min_fan_in": 9.5}, "recipe.min_fan_in=9.5 is not allowed"),
        ({"linear_mean": 1}, "recipe.linear_mean=1 is not allowed; choose True or False"),
        ({"start": None}, "recipe.start=None is not allowed; choose 'unit' or 'he'"),
        ({"decay": ["all"]}, "recipe.decay=.* is not allowed; choose 'weights' or 'all'"),
        (3, "recipe=3 is not allowed; give a name"),
    ],
)
def test_what_is_odd_is_refused_by_its_name(recipe: object, message: str) -> None:
    for use in (find_recipe, lambda one: convert(nn.Sequential(nn.Linear(3, 2)), torch.ones(1, 3), recipe=one)):
        with pytest.raises(ConfigError, match=message):
            use(recipe)


def test_the_authors_weights_are_he_normal_with_four_channels_at_least() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(64, 256, 3, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
        nn.Conv2d(256, 256, 3, groups=256, bias=False), nn.BatchNorm2d(256), nn.Flatten(), nn.Linear(256, 1000),
    )  # fmt: skip
    converted = convert(model, torch.randn(2, 64, 5, 5), recipe="authors").model
    dense, depthwise, last = (m for m in converted.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert float(dense.weight.detach().std()) == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    assert float(depthwise.weight.detach().std()) == pytest.approx(math.sqrt(2 / (4 * 9)), rel=0.05)
    assert float(last.weight.detach().std()) == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert not last.bias.any()
    # The linear layer and the depthwise one keep what their filters have in common.
    means = [float(layer.weight.detach().flatten(1).mean(1).abs().max()) for layer in (dense, depthwise, last)]
    assert means[0] <= 1e-7 and means[1] > 1e-3 and means[2] > 1e-3


def test_decay_and_momentum_are_those_of_the_recipe() -> None:
    model = convert(torchvision.models.resnet18(num_classes=10), images(), recipe="authors").model
    theirs = make_sgd(model, 0.1, weight_decay=1e-4, recipe="authors")
    assert [group["weight_decay"] for group in theirs.param_groups] == [1e-4]
    assert len(theirs.param_groups[0]["params"]) == len(list(model.parameters()))
    assert not theirs.param_groups[0]["nesterov"]
    ours = make_sgd(model, 0.1, weight_decay=1e-4)
    assert [group["weight_decay"] for group in ours.param_groups] == [1e-4, 0.0]
    assert all(parameter.dim() > 1 for parameter in ours.param_groups[0]["params"])
    assert all(parameter.dim() <= 1 for parameter in ours.param_groups[1]["params"])
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in ours.param_groups)
    assert sum(len(group["params"]) for group in ours.param_groups) == len(list(model.parameters()))


def test_a_network_learns_by_the_authors_recipe_and_merges_away() -> None:
    from repapq_plugin.reparam.fold import fold_conv_norm_pairs

    torch.manual_seed(0)
    model = convert(torchvision.models.shufflenet_v2_x0_5(num_classes=4), images(), recipe="authors").model.train()
    optimizer = make_sgd(model, 0.05, recipe="authors")
    WeightMean(model, "authors").attach(optimizer)
    scalars = [m.scale for m in model.modules() if isinstance(m, MimicNorm2d) and m.scale is not None]
    before = [float(scalar) for scalar in scalars]
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images()), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert sum(float(scalar) != start for scalar, start in zip(scalars, before, strict=True)) == len(scalars) > 0
    model.eval()
    with torch.no_grad():
        wanted = model(images())
        fold_conv_norm_pairs(model, lambda net: net(images()))
        assert not [m for m in model.modules() if isinstance(m, MimicNorm2d | LastBatchNorm)]
        assert float((model(images()) - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
