"""A `Page` as one HTML file: it loads nothing, runs nothing, prints well, and is light or dark as the system is."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from repapq_plugin.core.files import write_atomically
from repapq_plugin.errors import ConfigError
from repapq_plugin.report.page import Figure, Page, Section

if TYPE_CHECKING:
    from jinja2 import Template

MOST_BYTES = 5_000_000
"""Size that a page has at most; figures that would exceed it are left out, the largest first."""

PACKAGES = ("jinja2", "matplotlib")


def require_report() -> None:
    """Refuse to report where a package is missing, before any work is done.

    Raises:
        ConfigError: The message names the extra.
    """
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"A report needs {name}: pip install 'repapq-plugin[report]'") from error


def render(page: Page) -> str:
    """Return a page as HTML, at most `MOST_BYTES` long.

    Raises:
        ConfigError: A package is missing; see `require_report`.
    """
    require_report()
    template = _template()
    shown = replace(page, sections=[section for section in page.sections if _holds_something(section)])
    text = template.render(page=shown)
    while len(text.encode()) > MOST_BYTES and any(section.figures for section in shown.sections):
        shown = _without_largest(shown, len(text.encode()) - MOST_BYTES)
        text = template.render(page=shown)
    return text


def write_page(page: Page, path: str | Path) -> Path:
    """Write a page, whole or not at all.

    Raises:
        ConfigError: See `render`.
        ExportError: The file cannot be written.
    """
    write_atomically(Path(path), render(page).encode())
    return Path(path)


def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    source = files("repapq_plugin.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def _holds_something(section: Section) -> bool:
    return bool(section.text or section.tables or section.figures)


def _without_largest(page: Page, excess: int) -> Page:
    """Leave out as many figures as it takes to save ``excess`` bytes, and say so where they stood."""
    by_size = sorted((f for section in page.sections for f in section.figures), key=lambda f: -len(f.content))
    left: list[Figure] = []
    while excess > 0 and by_size:
        left.append(by_size.pop(0))
        excess -= len(left[-1].content)

    def reduced(section: Section) -> Section:
        kept = [figure for figure in section.figures if not any(figure is each for each in left)]
        lost = len(section.figures) - len(kept)
        said = f"{lost} figures are left out here: a page has at most {MOST_BYTES // 10**6} MB."
        return dataclasses.replace(section, figures=kept, text=[*section.text, said]) if lost else section

    return replace(page, sections=[reduced(section) for section in page.sections])
