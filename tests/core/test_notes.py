"""Notes name some modules and count the others."""

from __future__ import annotations

from repapq_plugin.core.notes import NAMED, listed


def test_modules_of_one_reason_stand_together() -> None:
    assert listed({"a": "why", "b": "how", "c": "why"}) == "a, c: why; b: how"


def test_a_note_names_some_modules_and_counts_the_others() -> None:
    names = [f"layer{index}" for index in range(NAMED + 2)]
    assert listed(dict.fromkeys(names[:NAMED], "why")) == f"{', '.join(names[:NAMED])}: why"
    assert listed(dict.fromkeys(names, "why")) == f"{', '.join(names[:NAMED])}, and 2 more: why"


def test_a_note_gives_some_reasons_and_counts_the_others() -> None:
    text = listed({f"layer{index}": f"reason {index}" for index in range(NAMED + 1)})
    assert text.endswith(f"layer{NAMED - 1}: reason {NAMED - 1}; and 1 more")


def test_no_module_gives_no_text() -> None:
    assert listed({}) == ""
