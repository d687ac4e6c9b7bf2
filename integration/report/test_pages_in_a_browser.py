"""Pages in a real browser, narrow and wide, light and dark: nothing is loaded, nothing fails, nothing sticks out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.diagnosis import diagnose
from repapq_plugin.diagnosis.differences import LayerDifference
from repapq_plugin.method.unit_result import UnitResult
from repapq_plugin.report import Evidence, difference_section, write_diagnosis, write_report
from repapq_plugin.report.html import MOST_BYTES
from repapq_plugin.report.pictures import picture
from repapq_plugin.report.table import Row
from tests.support.networks import Chain, batches, settle

WIDTHS = (400, 1600)


@pytest.fixture(scope="module", params=["calibration", "diagnosis"])
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    if request.param == "diagnosis":
        data = batches()
        data[0][1, 2] *= 40
        found = diagnose(settle(Chain()), data, RepAPQConfig(weight_bits=4, activation_bits=4, steps=0))
        names = [f"folder_of_images_{index:020}.jpg" for index in range(64)]
        differences = [LayerDifference(f"a_layer_of_a_long_name.{i}.conv", 0, 10.0 ** (i - 6), 1e-7) for i in range(6)]
        return write_diagnosis(
            found,
            tmp_path_factory.mktemp("page") / "diagnosis.html",
            samples=names,
            difference=difference_section(differences, "repapq.onnx"),
        )
    result = quantize_model(settle(Chain()), batches(), RepAPQConfig(weight_bits=4, activation_bits=4, steps=0))
    units = [
        UnitResult(name, "stage", 0.2, 0.1, index != 1, 1.0, "it was no better" if index == 1 else "")
        for index, name in enumerate(result.layers)
    ]
    rows = [Row("float", {"mAP": 0.5, "mAP50": 0.7}, 4_000_000, 9.0), Row("int8", {"mAP": 0.49}, 1_100_000, 4.0)]
    noise = np.random.default_rng(0).integers(0, 256, (300, 900, 3), dtype=np.uint8)
    evidence = Evidence(
        title="a_network_of_a_very_long_name_without_any_place_to_break_it_8xb32-400e_coco",
        rows=rows,
        columns=["mAP", "mAP50"],
        caption="how the latency was measured " * 5,
        pictures=[picture(noise, "noise", "an_image_of_a_long_name_0000000000000000001.png")] * 3,
        calibrated_on=[f"folder_of_images_{index:020}.jpg" for index in range(40)],
        facts={"Versions": {"torch": "2", "a_key_of_a_long_name_without_a_space_in_it_at_all": "x" * 90}},
        notes=["A remark with a path: " + "/a_folder" * 30],
    )
    result = replace(result, units=tuple(units))
    return write_report(result, tmp_path_factory.mktemp("page") / "report.html", data=batches(), evidence=evidence)


@pytest.fixture(params=[(width, scheme) for width in WIDTHS for scheme in ("light", "dark")], ids=str)
def opened(request: pytest.FixtureRequest, browser: Browser, page_file: Path) -> tuple[Page, list[str], list[str]]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    request.addfinalizer(context.close)
    page, said, asked = context.new_page(), list[str](), list[str]()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda wanted: asked.append(wanted.url))
    page.goto(page_file.as_uri())
    return page, said, asked


def test_nothing_is_loaded_and_nothing_fails(opened: tuple[Page, list[str], list[str]], page_file: Path) -> None:
    page, said, asked = opened
    for details in page.locator("summary").all():
        details.click()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert page.evaluate("[...document.images].length + document.querySelectorAll('svg').length") > 2
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page_file.stat().st_size <= MOST_BYTES


def test_nothing_sticks_out_and_text_can_be_read(opened: tuple[Page, list[str], list[str]]) -> None:
    page, _, _ = opened
    for details in page.locator("summary").all():
        details.click()
    width = page.viewport_size["width"] if page.viewport_size else 0
    assert page.evaluate("Math.max(document.body.scrollWidth, document.documentElement.scrollWidth)") == width
    # What is wider than its place scrolls inside it.
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(SMALLEST) >= 12
    assert page.evaluate(CONTRAST) >= 4.5


def test_light_and_dark_differ(browser: Browser, page_file: Path) -> None:
    shown = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(page_file.as_uri())
        shown[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        drawn = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert drawn == page.evaluate(f"({RESOLVED})('--soft')")
        page.close()
    assert shown["light"] != shown["dark"]


def test_printed_it_is_light_and_whole(browser: Browser, page_file: Path, tmp_path: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(page_file.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    assert page.pdf(path=tmp_path / "page.pdf").startswith(b"%PDF")
    page.close()


SMALLEST = """
Math.min(...[...document.querySelectorAll('p, td, th, dt, figcaption')]
  .map(e => parseFloat(getComputedStyle(e).fontSize)))
"""

OUTSIDE = """
[...document.querySelectorAll('main *, header *')]
  .filter(e => !e.closest('.scroll') && !e.closest('svg'))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
  .map(e => e.outerHTML.slice(0, 80))
"""

RESOLVED = """
name => {
  const probe = document.body.appendChild(document.createElement('i'));
  probe.style.color = `var(${name})`;
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}
"""

CONTRAST = """
(() => {
  const linear = part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = text => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(part => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const ratios = [...document.querySelectorAll('p, td, th, figcaption, dt, dd div, a, summary, footer')]
    .filter(e => e.textContent.trim())
    .map(e => [light(getComputedStyle(e).color), light(behind(e))].sort())
    .map(([dark, bright]) => (Math.max(dark, bright) + 0.05) / (Math.min(dark, bright) + 0.05));
  return Math.min(...ratios);
})()
"""
"""The smallest contrast of text and what is behind it, as WCAG 2.1 defines it."""
