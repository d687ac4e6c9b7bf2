"""Parts that pages have in common."""

from __future__ import annotations

from collections.abc import Mapping

from repapq_plugin.report.page import Line, Section, Table
from repapq_plugin.report.table import ABSENT


def named_table(facts: Mapping[str, object], title: str = "", columns: tuple[str, str] = ("What", "Value")) -> Table:
    """Return a table of names and values."""
    return Table(columns, [Line((key, _text(said))) for key, said in facts.items()], title=title, text_columns=2)


def facts_table(facts: Mapping[str, Mapping[str, object]]) -> list[Table]:
    """Return such tables by their title; empty ones are left out."""
    return [named_table(said, title) for title, said in facts.items() if said]


def facts_section(facts: Mapping[str, Mapping[str, object]]) -> Section:
    """Return how something was made: files, seeds, versions, the machine."""
    return Section("How it was made", tables=facts_table(facts))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(said)}" for key, said in value.items()) or ABSENT
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or ABSENT
    return str(value)
