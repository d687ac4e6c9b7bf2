"""Files that run code when they are read in the ordinary way: each would write a marker."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch


class Call:
    """Pickled as a call, which happens when it is read.

    Args:
        function: What is called.
        *arguments: What with.
    """

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


class Restless:
    """Does something as it is given its state."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __setstate__(self, state: Mapping[str, str]) -> None:
        Path(state["marker"]).touch()


class Subdict(dict[str, object]):
    """A dictionary that does something as it is filled."""

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(key, value)
        Path(key).touch()


def _writing(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def _by_the_shell(marker: Path) -> object:
    return Call(os.system, f"touch {marker}")


def _by_exec(marker: Path) -> object:
    return Call(exec, _writing(marker))


def _in_an_array(marker: Path) -> object:
    return np.array([_by_exec(marker), None], dtype=object)


def _as_a_key(marker: Path) -> object:
    return {(1, Call(eval, f"open({str(marker)!r}, 'w').close() or 2")): 3}


def _by_looking_up(marker: Path) -> object:
    """Uses only functions that torch, or mmengine's own list of what is safe, lets a file call."""
    from mmengine.logging import HistoryBuffer

    def kind_of(value: object) -> Call:
        return Call(getattr, value, "__class__")

    def called(function: object, result: object, *arguments: object) -> Call:
        return Call(torch._tensor._rebuild_from_type_v2, function, kind_of(result), arguments, {})

    names = Call(getattr, Call(getattr, HistoryBuffer, "__init__"), "__globals__")
    builtins = called(Call(getattr, names, "get"), {}, "__builtins__")
    run = called(Call(getattr, builtins, "get"), getattr, "exec")
    return called(run, None, _writing(marker))


HOSTILE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "shell": (_by_the_shell, "posix.system"),
    "exec": (_by_exec, "exec"),
    "setstate": (Restless, "tests.support.hostile.Restless"),
    "setitem": (lambda marker: Subdict({str(marker): 1}), "tests.support.hostile.Subdict"),
    "array": (_in_an_array, "numpy.dtype 'O8'"),
    "key": (_as_a_key, "eval"),
    "lookup": (_by_looking_up, "builtins.getattr"),
}
"""By name: what makes a hostile value that would write a marker, and the name under which it is refused."""

PLACES: Mapping[str, Callable[[object], dict[str, object]]] = {
    "meta": lambda value: {"meta": {"classes": ["a", value]}},
    "optimizer": lambda value: {"optimizer": {"state": {0: {"exp_avg": value}}, "param_groups": []}},
    "message_hub": lambda value: {"message_hub": {"log_scalars": {}, "runtime_info": {"a": (value,)}}},
}
"""Where in a checkpoint it can stand."""


def write_hostile(path: Path, state: object, kind: str, marker: Path, place: str = "meta", zipped: bool = True) -> Path:
    """Save a checkpoint of a state dict with a hostile value in it."""
    made = HOSTILE[kind][0](marker)
    torch.save({"state_dict": state, **PLACES[place](made)}, path, _use_new_zipfile_serialization=zipped)
    assert not marker.exists()
    return path
