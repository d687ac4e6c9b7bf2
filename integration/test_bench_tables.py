"""What the documents say was measured is what the committed results hold."""

from __future__ import annotations

from integration.bench.overhead import timing
from integration.bench.tables import DOCUMENTS, TABLES, tables_in, with_tables


def test_tables_of_the_documents_are_those_of_the_results() -> None:
    for document in DOCUMENTS:
        shown = tables_in(document.read_text())
        assert set(shown) <= set(TABLES)
        for name, table in shown.items():
            assert table == TABLES[name](), f"run python -m integration.bench.tables --write ({document.name}, {name})"


def test_the_readme_shows_the_summary_and_the_other_document_all_the_rest() -> None:
    first, second = (list(tables_in(document.read_text())) for document in DOCUMENTS)
    assert first == ["summary"]
    assert sorted(second) == sorted(set(TABLES) - {"summary"})


def test_writing_puts_each_table_into_its_place_and_leaves_the_rest() -> None:
    text = "Before.\n\n<!-- table: summary -->\n| old |\n<!-- end -->\n\nAfter.\n"
    written = with_tables(text)
    assert tables_in(written) == {"summary": TABLES["summary"]()}
    assert written.startswith("Before.\n\n<!-- table: summary -->\n|  |")
    assert written.endswith("<!-- end -->\n\nAfter.\n")
    assert with_tables(written) == written


def test_the_checks_whose_time_is_taken_are_there() -> None:
    with timing() as timer:
        assert set(timer.calls.values()) == {0}
