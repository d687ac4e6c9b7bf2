"""What a reparameterizable block says about itself: its linear branches, and what follows their sum.

A block class is taught once, by a function that reads one of its instances::

    @register_branches(MyBlock)
    def my_branches(block: MyBlock) -> BranchSpec:
        return BranchSpec(
            branches=(Branch((block.conv3, block.bn3)), Branch((block.conv1, block.bn1)), Branch(())),
            after=(block.act,),
        )
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar, overload

from torch import Tensor, nn

from repapq_plugin.core.modules import own_class
from repapq_plugin.core.running import is_out_of_memory
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.merged import MergedBlock

BlockFunction = Callable[..., "BranchSpec | None"]
"""Takes one block, of the class that it was registered for."""

F = TypeVar("F", bound=BlockFunction)

_BY_CLASS: dict[type[nn.Module], BlockFunction] = {}
_BY_NAME: dict[str, BlockFunction] = {}


def _modules(owner: str, layers: Iterable[object]) -> tuple[nn.Module, ...]:
    modules = []
    for module in layers:
        if not isinstance(module, nn.Module):
            raise MergeError(f"{owner} holds {module!r}, which is not an nn.Module; leave it out.")
        modules.append(module)
    return tuple(modules)


@dataclass(frozen=True)
class Branch:
    """One linear branch from the block's input to the sum.

    Args:
        layers: What the input passes, in order: convolutions, norms, average pooling, identities.
            Only a norm is the normalised identity branch; empty is the plain identity.
        scale: Multiplies the branch's output; a number, a tensor of one element, or a tensor of one
            element per output channel.

    Raises:
        MergeError: A layer is not a module.
    """

    layers: tuple[nn.Module, ...]
    scale: Tensor | float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _modules("Branch.layers", self.layers))


@dataclass(frozen=True)
class BranchSpec:
    """The branches of a block and what follows their sum.

    Args:
        branches: At least one branch; all read the block's input and their outputs are added.
        after: What follows the sum, in order (attention, activation, ...); kept as it is.

    Raises:
        MergeError: There is no branch, or a member has the wrong type.
    """

    branches: tuple[Branch, ...]
    after: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        branches = tuple(self.branches)
        if not branches or not all(isinstance(branch, Branch) for branch in branches):
            raise MergeError(f"BranchSpec.branches={branches!r} is not allowed; give one or more Branch.")
        object.__setattr__(self, "branches", branches)
        object.__setattr__(self, "after", _modules("BranchSpec.after", self.after))


@overload
def register_branches(block_class: type[nn.Module] | str, fn: None = None) -> Callable[[F], F]: ...
@overload
def register_branches(block_class: type[nn.Module] | str, fn: F) -> F: ...
def register_branches(block_class: type[nn.Module] | str, fn: F | None = None) -> F | Callable[[F], F]:
    """Teach the branches of a block class; usable as a call or as a decorator.

    Args:
        block_class: The class, or its full name ``"package.module.Class"`` where importing it is not
            wanted. Subclasses inherit what their nearest known ancestor was taught.
        fn: Takes a block and returns its `BranchSpec`, or None where this block is already in its
            deployed form. Registering a class again replaces what was there.

    Returns:
        ``fn``, or the decorator that registers one.
    """

    def register(function: F) -> F:
        if isinstance(block_class, str):
            _BY_NAME[block_class] = function
        else:
            _BY_CLASS[block_class] = function
        return function

    return register if fn is None else register(fn)


def qualified_name(cls: type) -> str:
    """Return ``"package.module.Class"``, the name under which a class is registered."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _function_of(block: nn.Module) -> BlockFunction | None:
    if isinstance(block, MergedBlock):
        return None
    for cls in own_class(block).__mro__:
        function = _BY_CLASS.get(cls) or _BY_NAME.get(qualified_name(cls))
        if function is not None:
            return function
    return None


def is_registered(block: nn.Module) -> bool:
    """Tell whether the class of ``block``, or an ancestor of it, was taught, and its branches are not merged yet."""
    return _function_of(block) is not None


def branches_of(block: nn.Module) -> BranchSpec | None:
    """Ask a block for its branches.

    Args:
        block: A module.

    Returns:
        Its branches; None if nothing is known about its class or the block is already deployed or merged.

    Raises:
        MergeError: The registered function failed or returned something else.
    """
    function = _function_of(block)
    if function is None:
        return None
    what = f"The function registered for {qualified_name(own_class(block))}"
    try:
        spec = function(block)
    except MergeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise MergeError(f"{what} failed: {type(error).__name__}: {error}") from error
    if spec is not None and not isinstance(spec, BranchSpec):
        raise MergeError(f"{what} returned {spec!r}; return a BranchSpec, or None for a deployed block.")
    return spec
