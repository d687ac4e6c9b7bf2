"""A page holds what it is given, in order, loads nothing, and takes anything for a name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from repapq_plugin.errors import ConfigError, ExportError
from repapq_plugin.method.unit_result import UnitResult
from repapq_plugin.report import Figure, Headline, Line, Page, Section, Table, render, write_page
from repapq_plugin.report.figures import losses
from repapq_plugin.report.html import MOST_BYTES
from repapq_plugin.report.pictures import picture, pixels
from repapq_plugin.report.svg import LIGHT
from tests.support.markup import Markup

HOSTILE = '<script src="https://example.org/x.js">alert("$1$")</script>'


def test_sections_stand_in_order_and_links_reach_them() -> None:
    table = Table(("Unit", "Loss"), [Line(("a", "1"), "undone"), Line(("b", "2"), strong=True)])
    page = Page(
        "Calibration", "net", sections=[Section("First one"), Section("Second", ["words"], [table], folded=True)]
    )
    read = Markup(render(page))
    assert [section["id"] for section in read.all("section")] == ["second"]  # an empty one is left out
    assert [link["href"] for link in read.all("a")] == ["#second"]
    assert read.all("details") and [row.get("class") for row in read.all("tr")] == [None, "marked", "strong"]
    words = read.text[read.text.index("words") :].split()
    assert [word for word in words if word in ("words", "Unit", "Loss", "1", "undone", "2")] == [
        *("words", "Unit", "Loss", "1", "undone", "2")
    ]


def test_names_are_text_whatever_they_hold() -> None:
    page = Page(
        HOSTILE,
        HOSTILE,
        HOSTILE,
        [Headline(HOSTILE, HOSTILE, HOSTILE)],
        [
            Section(
                HOSTILE,
                [HOSTILE],
                [Table((HOSTILE,), [Line((HOSTILE,), HOSTILE)], HOSTILE, HOSTILE)],
                [Figure("data:,", HOSTILE, HOSTILE), losses([unit(HOSTILE)])],
            )
        ],
    )
    read = Markup(render(page))
    assert read.all("script") == []
    assert read.text.count(HOSTILE) >= 12


def unit(name: str, before: float = 2.0, after: float = 1.0, kept: bool = True) -> UnitResult:
    return UnitResult(name, "stage", before, after, kept, 1.0, "" if kept else "it was no better")


def test_a_page_asks_for_nothing_and_runs_nothing() -> None:
    image = picture(np.zeros((4, 4, 3), np.uint8), "black")
    text = render(Page("Calibration", "net", sections=[Section("Pictures", figures=[image])]))
    read = Markup(text)
    assert {"script", "iframe", "object", "embed"}.isdisjoint(name for name, _ in read.elements)
    addresses = [
        value for _, attributes in read.elements for key, value in attributes.items() if key in ("src", "href")
    ]
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(meta["content"] for meta in read.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_the_largest_figures_go_where_a_page_would_be_too_long(tmp_path: Path) -> None:
    figures = [Figure("data:," + "x" * size, f"figure of {size}") for size in (3_000_000, 100, 2_500_000)]
    path = write_page(Page("Calibration", "net", sections=[Section("Pictures", figures=figures)]), tmp_path / "a.html")
    assert path.stat().st_size <= MOST_BYTES
    read = Markup(path.read_text())
    assert [image["alt"] for image in read.all("img")] == ["figure of 100", "figure of 2500000"]
    assert "1 figures are left out here" in read.text


def test_a_missing_package_is_said_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def without(name: str) -> ModuleType:
        if name == "jinja2":
            raise ImportError(name)
        return original(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"needs jinja2: pip install 'repapq-plugin\[report\]'"):
        write_page(Page("Calibration", "net"), tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="Cannot write"):
        write_page(Page("Calibration", "net"), tmp_path / "file" / "a.html")


def test_drawings_follow_the_page_in_colour_and_font() -> None:
    drawing = losses([unit("stem"), unit("a$b$", 1.0, 2.0, kept=False)])
    assert drawing.drawn and "a$b$" in drawing.content
    assert {"var(--accent)", "var(--other)", "var(--soft)"} <= set(re.findall(r"var\(--\w+\)", drawing.content))
    assert "DejaVu" not in drawing.content and "#0" not in re.sub(
        r"url\(#[^)]*\)|href=\"#[^\"]*\"", "", drawing.content
    )
    assert "1 were undone" in drawing.alt


@pytest.mark.parametrize(("shape", "kind"), [((40, 30, 3), "png"), ((900, 1800, 3), "jpeg")])
def test_pictures_are_small(shape: tuple[int, ...], kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = noise if kind == "jpeg" else np.zeros(shape, np.uint8)
    made = picture(image, "noise")
    assert made.content.startswith(f"data:image/{kind};base64,")
    assert len(made.content) < 400_000


def test_a_figure_in_colours_of_its_own_is_an_image_on_white() -> None:
    image = pixels(losses([unit("stem")], LIGHT))
    assert image.shape[2] == 3 and image[0, 0].tolist() == [255, 255, 255]
    blue = (image == [0x24, 0x57, 0xC5]).all(axis=2)
    assert blue.any()
