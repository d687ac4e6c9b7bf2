"""What a page is made of: headlines, and sections of text, tables and figures. `html.py` renders it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Headline:
    """One of the figures that a reader wants first.

    Args:
        label: What it is: ``"mAP"``.
        value: The figure with its unit.
        note: What it compares with, in a few words.
        good: Whether it is as one hopes; ``None``: nobody can say.
    """

    label: str
    value: str
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Args:
        cells: Text of each column.
        mark: Why the row stands out, in a word or two; empty where it does not.
        strong: Whether it is what the table is about.
    """

    cells: Sequence[str]
    mark: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows and columns.

    Args:
        columns: Headings.
        rows: Their cells, as many as there are columns.
        caption: Below the table: how the figures came about.
        title: Above it.
        text_columns: How many columns, from the left, hold text; the others hold figures and stand to the right.
    """

    columns: Sequence[str]
    rows: Sequence[Line]
    caption: str = ""
    title: str = ""
    text_columns: int = 1

    @property
    def marked(self) -> bool:
        """Whether a row stands out, so that there is a column for the reason."""
        return any(row.mark for row in self.rows)


@dataclass(frozen=True)
class Figure:
    """A drawing or a picture.

    Args:
        content: An ``<svg>`` element, or a ``data:`` address of a picture.
        alt: What one sees, for those who cannot.
        caption: Below the figure.
        wide: Whether it takes the whole width.
    """

    content: str
    alt: str
    caption: str = ""
    wide: bool = False

    @property
    def drawn(self) -> bool:
        """Whether it is a drawing, whose colours follow the page's."""
        return self.content.startswith("<svg")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: Heading; a section is reached by it.
        text: Paragraphs below the heading.
        tables: Shown after the figures.
        figures: Shown side by side where there is room.
        folded: Whether the tables can be opened and are closed at first; printed, they are open.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    folded: bool = False

    @property
    def anchor(self) -> str:
        """What a link to the section ends in."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True)
class Page:
    """A whole page.

    Args:
        kind: What it tells of: ``"Calibration"``.
        title: Name of the network or the config.
        subtitle: One line: the scheme.
        headlines: Up to three.
        sections: In reading order; empty ones are left out.
    """

    kind: str
    title: str
    subtitle: str = ""
    headlines: Sequence[Headline] = ()
    sections: Sequence[Section] = ()
