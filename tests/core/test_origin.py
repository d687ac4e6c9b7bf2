"""What a file says of how it was made comes back as it was said."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from repapq_plugin import RepAPQConfig
from repapq_plugin.core.origin import Decoding, Origin, origin_of
from repapq_plugin.errors import ResultError
from repapq_plugin.targets import Target

WHOLE = Origin(
    RepAPQConfig.from_preset("w6a6", target="tensorrt", reduce_range=True),
    "NNCF",
    "/configs/yolo <&>.py",
    ("a.b=1", 'c="ä"'),
    "weights.pth",
    {"torch": "2.0"},
    Decoding((480, 640), True),
)


@pytest.mark.parametrize(
    "origin",
    [Origin(), WHOLE, Origin(RepAPQConfig(target=Target("own", signed_activations=True)), decoding=Decoding())],
    ids=["nothing", "all", "own target"],
)
def test_an_origin_comes_back(origin: Origin) -> None:
    assert Origin.from_text(origin.to_text(), "a file") == origin


def test_its_text_says_what_readers_want_without_the_package() -> None:
    said = json.loads(WHOLE.to_text())
    assert (said["target"], said["reduce_range"]) == ("tensorrt", True)
    assert said["scheme"].startswith("W6A6") and said["checkpoint"] == "weights.pth"
    text = "\n".join(WHOLE.lines())
    for part in ("tensorrt", "7 of 8 bits", "NNCF", "yolo <&>.py", "a.b=1", "weights.pth", "torch 2.0", "detector"):
        assert part in text, part
    assert list(Origin().lines()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.update(format="repapq-origin-9"),
        lambda said: said.pop("versions"),
        lambda said: said["quantizer"].update(weight_bits=99),
        lambda said: said["quantizer"].update(unheard_of=1),
        lambda said: said.update(decoding=[1]),
    ],
    ids=["newer", "missing", "value", "key", "form"],
)
def test_what_cannot_be_read_is_an_error_that_names_the_file(change: object) -> None:
    said = json.loads(WHOLE.to_text())
    change(said)  # type: ignore[operator]
    with pytest.raises(ResultError, match=r"What m\.onnx says of how it was made cannot be read.*export it again"):
        Origin.from_text(json.dumps(said), "m.onnx")
    with pytest.raises(ResultError, match=r"m\.onnx"):
        Origin.from_text("no json", "m.onnx")


def test_a_result_knows_its_quantizer_and_other_things_know_nothing() -> None:
    made = origin_of(SimpleNamespace(config=RepAPQConfig(reduce_range=True)))
    assert made is not None and made.reduce_range and "torch" in made.versions
    assert origin_of(SimpleNamespace()) is None
