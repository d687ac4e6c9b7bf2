"""Values and refusals are computed once."""

from __future__ import annotations

import pytest

from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.by_algebra.memo import Memo


def test_a_value_is_computed_once_until_all_is_forgotten() -> None:
    memo, calls = Memo[str, int](), []
    for _ in range(2):
        assert memo.get("a", lambda: calls.append(1) or 7) == 7
    assert len(calls) == 1 and memo.values() == [7]
    memo.clear()
    assert memo.values() == [] and memo.get("a", lambda: 8) == 8


def test_a_refusal_is_remembered_and_other_errors_are_not() -> None:
    memo, calls = Memo[str, int](), []

    def refuse() -> int:
        calls.append(1)
        raise MergeError("no convolution")

    def fail() -> int:
        calls.append(1)
        raise MemoryError

    for _ in range(2):
        with pytest.raises(MergeError, match="no convolution"):
            memo.get("a", refuse)
    assert len(calls) == 1 and memo.values() == []
    for _ in range(2):
        with pytest.raises(MemoryError):
            memo.get("b", fail)
    assert len(calls) == 3
