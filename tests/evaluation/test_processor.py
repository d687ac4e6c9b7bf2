import platform

import pytest

from repapq_plugin.evaluation import processor


@pytest.mark.parametrize(
    ("machine", "vnni", "reduce_range", "said"),
    [
        ("x86_64", False, False, True),
        ("AMD64", False, False, True),
        ("x86_64", False, True, False),
        ("x86_64", True, False, False),
        ("aarch64", False, False, False),
    ],
)
def test_saturation_is_said_where_it_can_happen(monkeypatch, machine, vnni, reduce_range, said):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(processor, "has_vnni", lambda: vnni)
    note = processor.saturation_note(reduce_range)
    assert ("reduce_range=True" in note) is said
    assert bool(note) is said
