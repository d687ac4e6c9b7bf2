import torch

from repapq_plugin.core.tensor_notes import TensorNotes


def test_what_is_forgotten_is_not_known_any_more() -> None:
    notes: TensorNotes[int] = TensorNotes()
    x, y = torch.zeros(1), torch.zeros(1)
    notes.put(x, 1)
    notes.put(y, 2)
    notes.forget(x)
    notes.forget("never noted")
    assert notes.get(x) is None and notes.get(y) == 2


def test_a_note_belongs_to_one_tensor_and_not_to_its_equals():
    notes: TensorNotes[str] = TensorNotes()
    x, y = torch.zeros(2), torch.zeros(2)
    notes.put(x, "first")
    assert notes.get(x) == "first" and notes.get(y) is None and notes.get(None) is None
    x.add_(1)
    assert notes.get(x) == "first"
    notes.put(x, "second")
    assert notes.get(x) == "second"


def test_a_new_tensor_in_the_place_of_a_dead_one_has_no_note():
    notes: TensorNotes[int] = TensorNotes()
    places = set()
    for _ in range(50):
        x = torch.zeros(3)
        assert notes.get(x) is None
        notes.put(x, 1)
        places.add(id(x))
        del x
    assert len(places) < 50, "none came to lie in the place of a dead one"
