"""Methods as settings of the one job, and what each of them is called in a table.

A method decides what a configuration says of ranges, conditioning and learning. Bits, target and patterns of layers are
the scheme: all methods share them. Where a published method is not expressible, the nearest settings carry a name that
says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from repapq_plugin.config import PAPER, RepAPQConfig
from repapq_plugin.errors import ConfigError

SCHEME = (
    *("target", "weight_bits", "activation_bits", "first_last_bits", "reduce_range", "keep_float", "layer_bits"),
    *("units", "stages", "cache_bytes", "guard_fraction", "percentile"),
)
"""Keys of a configuration that belong to the scheme or to the network: the same for all methods."""

UNIT_SHARE = 0.4
"""Share of the steps that a unit gets, so that unit by unit and a stage at once take about the same time (our choice,
``integration/bench/ablation.py``)."""

RANGES: Mapping[str, object] = {
    "steps": 0,
    "solve": False,
    "fold_constants": False,
    "equalize": False,
    "weight_observer": "min_max",
}
"""Ranges alone: nothing is prepared, nothing learns."""

BLOCKS: Mapping[str, object] = {
    "schedule": "unit",
    "loss": "mse",
    "affine": False,
    "stage_weight": 0.0,
    "fold_constants": False,
    "equalize": False,
    "activation_observer": "mse",
    "weight_observer": "mse",
}
"""Block after block by squared errors, weights rounded straight through: what block reconstruction and QDrop share."""


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        title: What a table calls it.
        settings: Keys of `RepAPQConfig` where it differs from the defaults.
        reason: Why it has no row of figures; empty where it has.
    """

    title: str
    settings: Mapping[str, object] = field(default_factory=dict)
    reason: str = ""

    def config(self, scheme: RepAPQConfig, seed: int = 0) -> RepAPQConfig:
        """Return the configuration of this method in a scheme.

        Args:
            scheme: Says bits, target, patterns and the number of steps; a unit gets `UNIT_SHARE` of the steps.
            seed: Seed of the learning.
        """
        shared = {key: value for key, value in scheme.to_dict().items() if key in SCHEME}
        steps = round(UNIT_SHARE * scheme.steps) if self.settings.get("schedule") == "unit" else scheme.steps
        return RepAPQConfig.from_dict({**shared, "steps": steps, **self.settings, "seed": seed})


METHODS: dict[str, Method] = {
    "min-max": Method("min-max", {**RANGES, "activation_observer": "min_max"}),
    "percentile": Method("percentile", {**RANGES, "activation_observer": "percentile"}),
    "mse": Method("histogram MSE", {**RANGES, "activation_observer": "mse", "weight_observer": "mse"}),
    "mae": Method("histogram MAE", {**RANGES, "activation_observer": "mae"}),
    "adaround": Method(
        "AdaRound",
        reason="rounding is not learned here: weights learn, and are rounded straight through. A peer that learns "
        "rounding stands in its place (esp-ppq:rounding).",
    ),
    "brecq": Method("BRECQ, nearest settings (unit by unit, MSE; no learned rounding, no Fisher weights)", BLOCKS),
    "qdrop": Method(
        "QDrop, nearest settings (drop_probability=0.5, unit by unit, MSE; no learned rounding)",
        {**BLOCKS, "drop_probability": 0.5},
    ),
    "solve": Method("solved weights (solve=True, steps=0; GPTQ's rounding)", {"solve": True, "steps": 0}),
    "paper": Method("RepAPQ, the paper's settings", PAPER),
    "repapq": Method("RepAPQ"),
}
"""By the names that a user gives; in the order of the table."""

ABLATIONS: dict[str, Method] = {
    "no-affine": Method("RepAPQ without affine layers", {"affine": False}),
    "no-stage-term": Method("RepAPQ without the stage term", {"stage_weight": 0.0}),
    "no-equalize": Method("RepAPQ, channels not equalized", {"equalize": False}),
    "no-constants": Method("RepAPQ, constant channels not folded", {"fold_constants": False}),
    "mae-loss": Method("RepAPQ by absolute errors", {"loss": "mae"}),
    "by-unit": Method("RepAPQ, unit by unit", {"schedule": "unit"}),
    "solve-first": Method("RepAPQ behind solved weights", {"solve": True}),
}
"""The defaults with one thing changed."""

GROUPS = {"ablations": tuple(ABLATIONS), "all": (*METHODS, *ABLATIONS)}
"""Names that stand for several methods."""


def chosen_methods(names: Sequence[str] = ()) -> dict[str, Method]:
    """Return methods by name, each once, in the order asked for.

    Args:
        names: Of `METHODS`, `ABLATIONS` and `GROUPS`; none: all of `METHODS`.

    Raises:
        ConfigError: There is no such method.
    """
    known = {**METHODS, **ABLATIONS}
    found: dict[str, Method] = {}
    for name in names or METHODS:
        for each in GROUPS.get(name, (name,)):
            if each not in known:
                near = difflib.get_close_matches(name, [*known, *GROUPS], 3, 0.0)
                raise ConfigError(
                    f"method={name!r} is not allowed; choose from {', '.join([*known, *GROUPS])} "
                    f"(nearest: {', '.join(near)})."
                )
            found[each] = known[each]
    return found
