"""MimicNorm (arXiv:2010.09278): train without batch normalisation, but for one last norm before the loss."""

from repapq_plugin.mimicnorm.convert import Conversion, convert, finish
from repapq_plugin.mimicnorm.layers import LastBatchNorm, MimicNorm2d
from repapq_plugin.mimicnorm.optimizer import make_sgd
from repapq_plugin.mimicnorm.recipe import RECIPES, Recipe, find_recipe
from repapq_plugin.mimicnorm.weight_mean import (
    WeightMean,
    parametrize_weight_mean,
    remove_weight_mean,
    takes_weight_mean,
)

prepare = finish
"""The former name of `finish`."""

__all__ = [
    "RECIPES",
    "Conversion",
    "LastBatchNorm",
    "MimicNorm2d",
    "Recipe",
    "WeightMean",
    "convert",
    "find_recipe",
    "finish",
    "make_sgd",
    "parametrize_weight_mean",
    "prepare",
    "remove_weight_mean",
    "takes_weight_mean",
]
