"""A block computes what its merged form computes, and stays the user's own module.

Its class, attributes, hooks and names are its own; of its children, parameters and buffers it keeps what the merged
form needs. State-dict keys are those of the merged form.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import cast

from torch import Tensor, fx, nn

from repapq_plugin.core.modules import become, may_become, shallow_copy
from repapq_plugin.reparam.merged import MergedBlock, OneInput
from repapq_plugin.reparam.norms import is_norm


@dataclass(frozen=True)
class _Imported:
    """A Python module among the names that a source needs; by its name it can be pickled."""

    name: str


class WrittenForward:
    """A forward as source text, which copies and pickles with the module whose it is.

    Args:
        source: Defines ``forward(self, x)``.
        names: The global names that it reads.
    """

    def __init__(self, source: str, names: Mapping[str, object]) -> None:
        self.source = source
        self.names = {key: _Imported(v.__name__) if isinstance(v, ModuleType) else v for key, v in names.items()}
        scope = {key: importlib.import_module(v.name) if isinstance(v, _Imported) else v for key, v in names.items()}
        exec(compile(source, "<merged forward>", "exec"), scope)  # written by torch.fx, or by this class before
        self.run = cast(Callable[[nn.Module, Tensor], object], scope["forward"])

    def __deepcopy__(self, memo: object) -> WrittenForward:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return WrittenForward, (self.source, self.names)


class RewrittenBlock(OneInput):
    """The role of a block that has merged convolutions inside its own forward, which is written anew."""

    _repapq_forward: WrittenForward

    def forward(self, x: Tensor) -> object:
        """Map the block's input to its output, whatever that is."""
        return self._repapq_forward.run(self, x)


def take_over(block: nn.Module, made: MergedBlock | fx.GraphModule) -> nn.Module:
    """Let a block compute what ``made`` computes, in place.

    Args:
        block: The module; its children that ``made`` does not hold are gone.
        made: Its merged form: the convolution and what follows it, or the block's forward with convolutions in it.

    Returns:
        ``block``; or ``made``, with the plain attributes and the hooks of the block, where the block cannot go on: it
        is a layer itself, whose weight others would look for, or a traced module.
    """
    if isinstance(block, nn.modules.conv._ConvNd | nn.Linear) or is_norm(block) or not may_become(block):
        carry_attributes(block, made)
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            for registry in (name, f"{name}_with_kwargs", f"{name}_always_called"):
                getattr(made, registry, {}).update(getattr(block, registry, {}))
        return made
    vars(block).pop("forward", None)
    if isinstance(made, MergedBlock):
        _become_merged(block, made)
    else:
        _keep(block, made)
        code = made.graph.python_code("self")
        become(block, RewrittenBlock)._repapq_forward = WrittenForward(code.src, code.globals)
    return block


def carry_attributes(old: nn.Module, new: nn.Module) -> None:
    """Give a module the plain attributes of the one that it replaces: what a parser noted there, for example."""
    for name, value in vars(old).items():
        if not name.startswith("_") and not hasattr(new, name) and not isinstance(value, nn.Module | Tensor):
            setattr(new, name, value)


def _become_merged(block: nn.Module, made: MergedBlock) -> None:
    # An identity has no place behind the convolution, but may be read by name; it holds nothing.
    idle = {name: child for name, child in block._modules.items() if type(child) is nn.Identity}
    names = ("conv", "after")
    conv, after = (_free(name, block, idle) for name in names)
    places = {part: f"{after}.{index}" for index, part in enumerate(made.after)}
    moved = {name: places[child] for name, child in block._modules.items() if child is not None and child in places}
    _set_children(block, {conv: made.conv, after: made.after, **idle})
    block._parameters.clear()
    block._non_persistent_buffers_set.update(block._buffers)
    merged = become(block, MergedBlock)
    if (conv, after) != names:
        merged._repapq_children = (conv, after)
    merged._repapq_moved = moved


def _free(name: str, block: nn.Module, others: Mapping[str, nn.Module | None]) -> str:
    """Return a name that is no attribute of a block."""
    while name in vars(block) or name in block._buffers or name in others or hasattr(type(block), name):
        name += "_"
    return name


def _set_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
    module._modules.clear()
    module._modules.update(children)


def _keep(owner: nn.Module, made: nn.Module) -> None:
    """Leave an owner the children and the state that ``made`` has, containers being the owner's own."""
    children: dict[str, nn.Module | None] = {}
    for name, child in made._modules.items():
        own = owner._modules.get(name)
        if own is not None and own is not child and type(child) is nn.Module:
            # Others may hold this container too.
            own = shallow_copy(own)
            _keep(own, child)
            children[name] = own
        else:
            children[name] = child
    _set_children(owner, children)
    owner._parameters.clear()
    owner._parameters.update(made._parameters)
    owner._buffers.update(made._buffers)
    owner._non_persistent_buffers_set = {name for name in owner._buffers if name not in set(_persistent(made))}
    for name in (*made._parameters, *made._buffers):
        vars(owner).pop(name, None)  # a tensor that was a plain attribute


def _persistent(module: nn.Module) -> Iterator[str]:
    return (name for name in module._buffers if name not in module._non_persistent_buffers_set)
