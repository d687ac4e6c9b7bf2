import platform

import pytest
import torch

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
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx_vnni": False}, raising=False)
    note = processor.saturation_note(reduce_range)
    assert ("reduce_range=True" in note) is said
    assert bool(note) is said


def test_vnni_of_256_bits_is_enough_for_openvino(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(processor, "has_vnni", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx_vnni": True}, raising=False)
    assert not processor.adds_in_16_bits()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert processor.adds_in_16_bits()
