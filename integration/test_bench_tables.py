"""What the README says was measured is what the committed results hold."""

from __future__ import annotations

from integration.bench.tables import README, TABLES, tables_in


def test_tables_of_the_readme_are_those_of_the_results() -> None:
    shown = tables_in(README.read_text())
    assert set(shown) <= set(TABLES)
    assert "summary" in shown
    for name, table in shown.items():
        assert table == TABLES[name](), f"run python -m integration.bench.tables --write ({name})"
