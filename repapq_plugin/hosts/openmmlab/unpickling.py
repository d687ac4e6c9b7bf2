"""What stands in for the values that mmengine's own checkpoints hold, as they are read without running code.

A checkpoint of mmengine's runner holds more than tensors: logged scalars as `HistoryBuffer`, NumPy arrays, numbers of
data sets, states of schedulers. A file decides with which arguments each of these is called, so none is called itself:
NumPy's own functions trust the description of a memory layout, and ``getattr`` reaches everything. Each has a stand-in
here that takes what mmengine writes and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, SupportsIndex, TypeAlias, cast

import numpy as np
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner.priority import Priority

from repapq_plugin.core.unpickling import Refused, StandIns

PLAIN_TYPE = re.compile(r"[biufcSU]\d+")
"""NumPy's names of types whose values are plain: numbers, truth values and text, no Python objects."""

BYTE_ORDERS: Mapping[object, Literal["<", ">", "="]] = {"<": "<", ">": ">", "=": "=", "|": "="}
"""Byte orders that a file names, and which they are; ``|`` says that there is none."""

ArrayState: TypeAlias = "tuple[SupportsIndex, SupportsIndex, np.dtype[np.generic], np.bool[bool], bytes]"


class DType:
    """Stands in for `numpy.dtype`; NumPy takes it wherever it takes a type.

    Args:
        name: As NumPy writes it, ``'f4'``.
        *how: Alignment and copying, which do not matter.

    Attributes:
        dtype: The type.

    Raises:
        Refused: It is no plain type.
    """

    def __init__(self, name: str, *how: object) -> None:
        if not isinstance(name, str) or not PLAIN_TYPE.fullmatch(name):
            raise Refused(f"numpy.dtype {name!r}")
        self.dtype: np.dtype[np.generic] = np.dtype(name)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        """Take the byte order; the rest of the state describes memory, which the name has done."""
        order = state[1]
        if order not in BYTE_ORDERS or any(part is not None for part in state[2:5]):
            raise Refused("numpy.dtype with fields")
        self.dtype = self.dtype.newbyteorder(BYTE_ORDERS[order])

    def __reduce__(self) -> str | tuple[object, ...]:
        """Be saved as the type itself."""
        return self.dtype.__reduce__()


class Array(np.ndarray):  # type: ignore[type-arg]
    """Stands in for `numpy.ndarray`: begins empty, and is filled by its state."""

    def __new__(cls, *shape: object) -> Array:
        """Make an empty array; a file has no reason to ask for another.

        Raises:
            Refused: It does.
        """
        if shape:
            raise Refused("a call of numpy.ndarray")
        return super().__new__(cls, (0,), np.int8)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        """Take ``(version, shape, type, column-major, bytes)``.

        Raises:
            Refused: The values are Python objects.
        """
        version, shape, dtype, column_major, data = state
        if not isinstance(dtype, DType) or not isinstance(data, bytes):
            raise Refused("a numpy.ndarray of Python objects")
        # NumPy checks the others.
        super().__setstate__(cast(ArrayState, (version, shape, dtype.dtype, column_major, data)))

    def __reduce__(self) -> str | tuple[object, ...]:
        """Be saved as an array of NumPy's own."""
        return np.array(self).__reduce__()

    def __reduce_ex__(self, protocol: object) -> str | tuple[object, ...]:
        """See `__reduce__`."""
        return self.__reduce__()


class Buffer(HistoryBuffer):  # type: ignore[misc]
    """Stands in for `HistoryBuffer`, and becomes one when it is filled."""

    def __setstate__(self, state: Mapping[str, object]) -> None:
        """Take the logged values and their counts; how they are averaged is not the file's to say."""
        logged, counts = (np.array(state[key]) for key in ("_log_history", "_count_history"))
        longest = state.get("max_length")
        self.__class__ = HistoryBuffer
        self.__init__(logged, counts, longest if isinstance(longest, int) else 1_000_000)  # type: ignore[misc]


class OneCycle:
    """Stands in for `OneCycleParamScheduler`, of which files name only the functions in `METHODS`."""


METHODS: Mapping[tuple[object, object], object] = {
    **{(Buffer, name): getattr(HistoryBuffer, name) for name in ("min", "max", "mean", "current")},
    **{(OneCycle, name): getattr(OneCycleParamScheduler, name) for name in ("_annealing_cos", "_annealing_linear")},
}
"""What a file may look up in a class."""


def method(owner: type, name: str) -> object:
    """Stand in for ``getattr``.

    Raises:
        Refused: It is not in `METHODS`.
    """
    if (owner, name) not in METHODS:
        raise Refused(f"builtins.getattr(..., {name!r})")
    return METHODS[owner, name]


def reconstruct(kind: type, *_: object) -> Array:
    """Stand in for NumPy's ``_reconstruct``, which begins an array.

    Raises:
        Refused: It is to be another class.
    """
    if kind is not Array:
        raise Refused(f"a numpy.ndarray of class {kind}")
    return Array()


def scalar(dtype: DType, data: bytes) -> np.generic:
    """Stand in for NumPy's ``scalar``.

    Raises:
        Refused: The value is a Python object.
    """
    if not isinstance(dtype, DType) or not isinstance(data, bytes):
        raise Refused("a numpy scalar of a Python object")
    if not dtype.dtype.itemsize:  # an empty text
        return dtype.dtype.type()
    value: np.generic = np.frombuffer(data, dtype.dtype)[0]
    return value


def mapping(*content: object) -> dict[object, object]:
    """Stand in for dictionaries of other classes; a default factory is left out."""
    return dict(*(part for part in content if isinstance(part, dict)))


def no_bytes() -> bytes:
    """Stand in for ``bytes``, which files call for none at all; other bytes stand in them as text."""
    return b""


STAND_INS: StandIns = {
    "numpy.dtype": DType,
    "numpy.ndarray": Array,
    **{
        f"numpy.{core}.multiarray.{name}": function
        for core in ("core", "_core")  # NumPy 1 and 2
        for name, function in (("_reconstruct", reconstruct), ("scalar", scalar))
    },
    "builtins.bytes": no_bytes,
    "builtins.getattr": method,
    **{f"builtins.{kind.__name__}": kind for kind in (bool, int, float, str, tuple, list, dict, slice)},
    "collections.defaultdict": mapping,
    "mmengine.config.config.ConfigDict": mapping,
    "mmengine.logging.history_buffer.HistoryBuffer": Buffer,
    "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler": OneCycle,
    "mmengine.runner.priority.Priority": Priority,
}
"""All that a checkpoint may hold besides what torch itself takes, by the name that stands in the file."""
