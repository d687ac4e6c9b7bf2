"""How a network is trained with MimicNorm, where the paper's text leaves a choice: ours, or the authors'."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from repapq_plugin.errors import ConfigError

MIN_FAN_IN = 50
"""Filters with as many inputs or fewer are left alone: so few weights cannot spare a degree of freedom (paper)."""

_ALLOWED: Mapping[str, tuple[object, ...]] = {
    "linear_mean": (True, False),
    "concatenated": (True, False),
    "start": ("unit", "he"),
    "decay": ("weights", "all"),
    "nesterov": (True, False),
}


@dataclass(frozen=True)
class Recipe:
    """Choices of a training with MimicNorm.

    The authors' are those of their repository (Kid-key/MimicNorm). Ours were compared on validation images
    (integration/bench/README.md, "MimicNorm").

    Args:
        min_fan_in: Convolutions that sum more products than this for one output keep filter means of zero, except
            depthwise ones; at least 1, because a filter of one weight would vanish. 1 is all dense convolutions (the
            authors' code for ImageNet), 50 the paper's rule (their code for CIFAR).
        linear_mean: Linear layers of such a fan-in keep it, too; by the authors' code they do not.
        concatenated: Branches of concatenations end in a learned scalar, too (the authors' code for ShuffleNetV2), not
            only those of sums. Each keeps one more activation for the backward pass.
        start: Weights to start from. ``"unit"``: each layer is scaled until its output varies by one on an example
            (our choice). ``"he"``: He-normal, with a fan-in of at least four channels (the authors' code for
            ShuffleNetV2), and nothing is scaled.
        decay: What weight decay acts on: ``"weights"`` of layers, or ``"all"`` parameters.
        nesterov: Momentum looks ahead.

    Raises:
        ConfigError: A value is not allowed.
    """

    min_fan_in: int = MIN_FAN_IN
    linear_mean: bool = True
    concatenated: bool = False
    start: str = "unit"
    decay: str = "weights"
    nesterov: bool = True

    def __post_init__(self) -> None:
        if type(self.min_fan_in) is not int or self.min_fan_in < 1:
            raise ConfigError(f"recipe.min_fan_in={self.min_fan_in!r} is not allowed; choose a whole number from 1 on.")
        for key, allowed in _ALLOWED.items():
            value = getattr(self, key)
            # 1 == True, so the type decides as well.
            if not any(type(value) is type(one) and value == one for one in allowed):
                raise ConfigError(f"recipe.{key}={value!r} is not allowed; choose {' or '.join(map(repr, allowed))}.")


RECIPES: Mapping[str, Recipe] = {
    "default": Recipe(),
    "authors": Recipe(min_fan_in=1, linear_mean=False, concatenated=True, start="he", decay="all", nesterov=False),
}
"""Recipes by name; ``"authors"`` is what their code trains ShuffleNetV2 on ImageNet with."""


RecipeLike = Recipe | str | Mapping[str, Any]
"""What `find_recipe` takes."""


def find_recipe(recipe: RecipeLike) -> Recipe:
    """Return a recipe that is given by its name, by the choices that differ from the default, or as it is.

    Args:
        recipe: A `Recipe`; a key of `RECIPES`; or a mapping of fields, with ``preset`` for the recipe it starts from.

    Raises:
        ConfigError: There is no such recipe or field, or a value is not allowed.

    Example:
        >>> find_recipe({"preset": "authors", "start": "unit"}).decay
        'all'
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ConfigError(
                f"recipe={recipe!r} is not allowed; choose one of {', '.join(map(repr, RECIPES))}, or give the choices "
                f"that differ, recipe=dict(min_fan_in=...).{_meant(recipe, RECIPES)}"
            )
        return RECIPES[recipe]
    if not isinstance(recipe, Mapping):
        raise ConfigError(f"recipe={recipe!r} is not allowed; give a name, a mapping of choices, or a Recipe.")
    choices: dict[str, Any] = dict(recipe)
    start = find_recipe(str(choices.pop("preset", "default")))
    known = [field.name for field in fields(Recipe)]
    for key in choices:
        if key not in known:
            raise ConfigError(
                f"recipe.{key} is not a choice; there are preset, {', '.join(known)}.{_meant(str(key), known)}"
            )
    return replace(start, **choices)


def _meant(name: str, known: Mapping[str, object] | list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
