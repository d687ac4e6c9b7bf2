"""Notes name some modules and count the others."""

from __future__ import annotations

import pytest

from repapq_plugin.core.notes import NAMED, listed


@pytest.mark.parametrize(
    ("count", "end"), [(1, "layer0 is odd"), (NAMED, f"layer{NAMED - 1} is odd"), (NAMED + 2, "; and 2 more")]
)
def test_a_note_names_some_and_counts_the_others(count: int, end: str) -> None:
    text = listed({f"layer{index}": "is odd" for index in range(count)})
    assert text.startswith("layer0 is odd") and text.endswith(end)
    assert text.count("is odd") == min(count, NAMED)


def test_what_joins_a_module_and_its_reason_is_chosen() -> None:
    assert listed({"a": "why", "b": "how"}, ": ") == "a: why; b: how"
