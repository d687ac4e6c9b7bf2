"""Notice blocks that add parallel linear branches, although nobody taught their class.

The sums are seen while the model runs: which tensors are a linear function of which module input,
and how many convolutions or norms stand side by side in it. An activation ends linearity, so an
ordinary residual block is not taken for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.running import inference
from repapq_plugin.core.tensor_notes import TensorNotes
from repapq_plugin.core.tensors import first_tensor, tensors_of
from repapq_plugin.core.watch import FunctionWatch
from repapq_plugin.reparam.branches import is_registered
from repapq_plugin.reparam.merged import MergedBlock
from repapq_plugin.reparam.norms import has_activation, is_norm

_SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "sub_", "__sub__", "__isub__"}
_SCALINGS = {"mul", "mul_", "__mul__", "__imul__", "__rmul__", "div", "__truediv__"}
_COPIES = {"clone", "contiguous", "dropout", "to"}

# Serial number of a tensor value -> the layers that read that value at the start of a branch.
Terms = dict[int, frozenset[nn.Module]]


@dataclass
class _Frame:
    """One running call of a composite module: its input, and the first value made inside it."""

    name: str
    source: int | None
    first: int
    sums: list[torch.Size] = field(default_factory=list)


@dataclass(frozen=True)
class _Value:
    """What is known about a tensor as it is now; a change in place makes it another value."""

    serial: int
    terms: Terms


class _LinearTerms(FunctionWatch):
    """Follows sums of branches through plain tensor arithmetic; layers report through hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[_Frame] = []
        self.found: set[str] = set()
        self._values: TensorNotes[_Value] = TensorNotes()
        self._serials = itertools.count()

    def value_of(self, tensor: Tensor) -> _Value:
        return self._values.get(tensor) or self.remember(tensor, {})

    def remember(self, tensor: Tensor, terms: Terms) -> _Value:
        value = _Value(next(self._serials), terms)
        self._values.put(tensor, value)
        return value

    def terms(self, tensor: Tensor) -> Terms:
        """Return which values ``tensor`` is a linear function of; always one of itself."""
        value = self.value_of(tensor)
        return {**value.terms, value.serial: frozenset()}

    def before(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Terms:
        """Terms of the result of a function, read before it may overwrite its arguments."""
        operands = [value for value in args[:2] if isinstance(value, Tensor)]
        if name in _SCALINGS:
            operands = [value for value in operands if not isinstance(value, nn.Parameter)]
            return self.terms(operands[0]) if len(operands) == 1 else {}
        if name in _SUMS and len(operands) == 2:
            left, right = self.terms(operands[0]), self.terms(operands[1])
            return {serial: left[serial] | right[serial] for serial in left.keys() & right.keys()}
        return self.terms(operands[0]) if name in _SUMS | _COPIES and operands else {}

    def after(
        self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object], result: object, note: Terms
    ) -> None:
        """Remember the terms of a result, and a sum of branches in the block that it lies in."""
        if isinstance(result, Tensor) and name != "__get__":
            self.remember(result, note)
            if name in _SUMS:
                self._note_sum(result, note)

    def _note_sum(self, result: Tensor, terms: Terms) -> None:
        sources = [serial for serial, starts in terms.items() if len(starts) >= 2]
        for frame in reversed(self.frames):
            if any(serial == frame.source or serial >= frame.first for serial in sources):
                frame.sums.append(result.shape)
                return

    def layer_ran(self, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        """A layer starts a branch from what it reads, and goes on with those that lead there."""
        given = first_tensor(args, kwargs)
        if given is None or not isinstance(output, Tensor):
            return
        terms: Terms = {}
        if not has_activation(layer):
            own = frozenset({layer})
            # Branches that were added before are one from here on.
            terms = {serial: starts if len(starts) == 1 else own for serial, starts in self.terms(given).items()}
        self.remember(output, terms)

    def enter(self, name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = first_tensor(args, kwargs)
        source = None if given is None else self.value_of(given).serial
        self.frames.append(_Frame(name, source, first=next(self._serials)))

    def leave(self, output: object) -> None:
        frame = self.frames.pop()
        if any(tensor.shape in frame.sums for tensor in tensors_of(output)):
            self.found.add(frame.name)


def find_unknown_multibranch(model: nn.Module, run: Callable[[nn.Module], object]) -> list[str]:
    """Find modules that look like reparameterizable blocks of a class that was not taught.

    Such a module adds the outputs of two or more convolutions or norms (each perhaps with its norm)
    that all read one tensor, its own first input or one that it made, and gives an output of the
    sum's shape.

    Args:
        model: A model, after `merge_branches`; run as at inference, its modes come back.
        run: Runs the model it is given on sample data.

    Returns:
        Module paths, in the order of ``model.named_modules()``. Classes that were taught are left
        out: for those `merge_branches` has said why they stay.
    """
    known = {inner for block in model.modules() if _is_known(block) for inner in block.modules()}
    watch = _LinearTerms()
    names = [(name, module) for name, module in model.named_modules() if module not in known]
    with Hooks() as hooks:
        for name, module in names:
            if isinstance(module, nn.modules.conv._ConvNd) or is_norm(module):
                hooks.after(module, watch.layer_ran, with_kwargs=True)
            elif any(True for _ in module.children()):
                hooks.before(module, lambda _, *given, name=name: watch.enter(name, *given), with_kwargs=True)
                hooks.after(module, lambda _, args, output: watch.leave(output))
        with inference(model), watch:
            run(model)
    return [name for name, _ in names if name in watch.found]


def _is_known(module: nn.Module) -> bool:
    return isinstance(module, MergedBlock) or is_registered(module)
