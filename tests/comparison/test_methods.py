from __future__ import annotations

import pytest

from repapq_plugin import RepAPQConfig
from repapq_plugin.comparison import ABLATIONS, METHODS
from repapq_plugin.comparison.methods import SCHEME, chosen_methods
from repapq_plugin.config import PAPER

SCHEMES = RepAPQConfig(
    target="openvino",
    weight_bits=4,
    activation_bits=6,
    first_last_bits=None,
    layer_bits={"a": (3, 3)},
    keep_float=("b",),
    steps=100,
    loss="mae",
    equalize=False,
    seed=9,
)


@pytest.mark.parametrize("name", [*METHODS, *ABLATIONS])
def test_methods_share_the_scheme_and_nothing_else_of_a_configuration(name: str) -> None:
    method = chosen_methods([name])[name]
    found, defaults = method.config(SCHEMES, 3), RepAPQConfig()
    assert found.seed == 3
    for key, value in found.to_dict().items():
        if key in SCHEME:
            assert value == SCHEMES.to_dict().get(key), key
        elif key not in ("seed", "steps"):
            assert value == method.settings.get(key, defaults.to_dict()[key]), key


def test_a_unit_gets_a_share_of_the_steps_and_ranges_get_none() -> None:
    steps = {name: method.config(SCHEMES).steps for name, method in METHODS.items()}
    assert steps == {
        **dict.fromkeys(("min-max", "percentile", "mse", "mae", "solve"), 0),
        **dict.fromkeys(("brecq", "qdrop", "paper"), 40),
        **dict.fromkeys(("adaround", "repapq"), 100),
    }


def test_the_paper_and_the_plain_method_are_what_the_package_calls_so() -> None:
    same = {"steps": 300}
    assert METHODS["paper"].config(RepAPQConfig()) == RepAPQConfig.paper().replace(steps=120)
    assert {**METHODS["paper"].settings} == dict(PAPER)
    assert METHODS["min-max"].config(RepAPQConfig()) == RepAPQConfig().plain()
    assert METHODS["repapq"].config(RepAPQConfig()) == RepAPQConfig(**same)  # type: ignore[arg-type]


def test_what_is_not_learned_rounding_is_not_called_so() -> None:
    assert METHODS["adaround"].reason
    assert all("nearest settings" in METHODS[name].title for name in ("brecq", "qdrop"))


def test_groups_stand_for_their_methods_each_once() -> None:
    assert list(chosen_methods()) == list(METHODS)
    assert list(chosen_methods(["repapq", "all", "ablations"])) == [
        "repapq",
        *(name for name in METHODS if name != "repapq"),
        *ABLATIONS,
    ]
