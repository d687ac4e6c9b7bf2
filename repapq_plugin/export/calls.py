"""How a network is called in an export: from one flat list of tensors to its own arguments, and back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks, other_forwards
from repapq_plugin.core.tensors import tensors_of, with_tensors
from repapq_plugin.errors import ExportError

Example = object
"""One input as ``forward`` takes it, or the tuple of all of them; a dict at its end holds keywords."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call.

    Args:
        args: By position.
        kwargs: By keyword.
    """

    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    @classmethod
    def of(cls, example: Example, model: nn.Module) -> Call:
        """Return the call that an example stands for, its floating tensors in the model's dtype.

        Args:
            example: See `Example`. As for torch's own exporter, a dict that is meant by position is followed by
                an empty one; it need not be where ``forward`` takes no such keywords.
            model: What will be called.

        Raises:
            ExportError: The example holds tensors inside objects of a kind that is not known.
        """
        args = example if isinstance(example, tuple) else (example,)
        call = cls(args, {})
        if args and isinstance(args[-1], Mapping) and all(isinstance(key, str) for key in args[-1]):
            named = cls(args[:-1], dict(args[-1]))
            call = named if named._suits(model) or not call._suits(model) else call
        dtype = _dtype_of(model)
        tensors = call.tensors
        if dtype is not None and any(x.is_floating_point() and x.dtype != dtype for x in tensors):
            call = call.with_inputs([x.to(dtype) if x.is_floating_point() else x for x in tensors])
        return call

    def _suits(self, model: nn.Module) -> bool:
        try:
            inspect.signature(model.forward).bind(*self.args, **self.kwargs)
        except (TypeError, ValueError):
            return False
        return True

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, however deep in containers: the inputs of the graph."""
        return tensors_of((self.args, self.kwargs))

    @property
    def is_flat(self) -> bool:
        """Whether the arguments are tensors by position and nothing else."""
        return not self.kwargs and all(isinstance(x, Tensor) for x in self.args)

    def with_inputs(self, tensors: Sequence[Tensor]) -> Call:
        """Return the call with other tensors in the places of its own.

        Raises:
            ExportError: Some stand inside an object of a kind that is not known.
        """
        left = iter(tensors)
        args = tuple(with_tensors(value, left) for value in self.args)
        kwargs = {key: with_tensors(value, left) for key, value in self.kwargs.items()}
        made = Call(args, kwargs)
        if len(made.tensors) != len(tensors) or any(a is not b for a, b in zip(made.tensors, tensors, strict=True)):
            kinds = sorted({type(value).__name__ for value in (*self.args, *self.kwargs.values())})
            raise ExportError(
                f"The example holds tensors inside objects that cannot be taken apart ({', '.join(kinds)}); give "
                "tensors, sequences, mappings or dataclasses of them."
            )
        return made

    def run(self, model: nn.Module) -> object:
        """Call ``model``."""
        return model(*self.args, **self.kwargs)

    @contextmanager
    def flattened(self, model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
        """Let ``model`` take the call's tensors by position, and return a tuple of tensors, inside a ``with`` block.

        Yields:
            The tensors.
        """

        def unfold(
            _: nn.Module, args: tuple[object, ...], kwargs: object
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            made = self.with_inputs([x for x in args if isinstance(x, Tensor)])
            return made.args, dict(made.kwargs)

        def fold(_: nn.Module, args: tuple[object, ...], output: object) -> object:
            if isinstance(output, Tensor):
                return None
            return tuple(tensors_of(output))

        with Hooks() as hooks, _signature_hidden(model):
            if not self.is_flat:
                hooks.before(model, unfold, with_kwargs=True, first=True)
            hooks.after(model, fold)
            yield tuple(self.tensors)


@contextmanager
def _signature_hidden(model: nn.Module) -> Iterator[None]:
    """Keep torch's exporter from adding the defaults of ``forward`` to the arguments, keyword-only ones too."""
    own = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        return own(*args, **kwargs)

    with other_forwards({model: forward}):
        yield


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the floating dtype of a model; None where it has none, or several."""
    dtypes = {x.dtype for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None
