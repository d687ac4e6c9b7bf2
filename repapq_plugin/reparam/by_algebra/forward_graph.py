"""One module's own forward as a graph, and what in it is a sum of linear branches.

Only the forward of the module itself is traced (torch.fx); its children are leaves, whatever they
are. So nothing is asked of the network as a whole, and a child that cannot be traced costs its
parent nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, map_arg

from repapq_plugin.core.modules import shallow_copy
from repapq_plugin.core.running import is_out_of_memory
from repapq_plugin.errors import MergeError

_ADDITIONS = {"add": 1, "iadd": 1, "radd": 1, "sub": -1, "isub": -1, "subtract": -1}
_PRODUCTS = {"mul", "imul", "rmul", "multiply"}
_QUOTIENTS = {"truediv", "itruediv", "div", "divide"}


@dataclass(frozen=True)
class Sum:
    """``sum(factor * node) + sum(factor * constant)``."""

    terms: tuple[tuple[float, fx.Node], ...]
    constants: tuple[tuple[float, object], ...] = ()


@dataclass(frozen=True)
class Scale:
    """``node * factor`` or ``node / factor``, the factor being a constant."""

    node: fx.Node
    factor: object
    divides: bool = False


@dataclass(frozen=True)
class Layer:
    """A call that reads one tensor; only looking into it tells whether it is linear."""

    node: fx.Node


class _OwnForwardTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def takes_one_input(module: nn.Module) -> bool:
    """Tell whether a module's forward takes one argument, and not more even if somebody gave more."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    plain = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return len(parameters) == len(plain) == 1


def _standin(module: nn.Module) -> nn.Module:
    """Return a shallow copy to trace, its arguments but the first at their defaults.

    What a forward writes to ``self`` while it is traced stays with the copy.
    """
    if "forward" in vars(module):
        raise MergeError("its forward was replaced on the instance.")
    cls = type(module)
    standin = shallow_copy(module)
    one_argument = {"forward": lambda self, x: cls.forward(self, x)}
    standin.__class__ = cast("type[nn.Module]", type(cls.__name__, (cls,), one_argument))
    return standin


def _name(node: fx.Node) -> str:
    target = node.target
    return (target if isinstance(target, str) else getattr(target, "__name__", "")).strip("_")


class ForwardGraph:
    """The own forward of one module.

    Args:
        module: A module in evaluation mode; left as it is.

    Raises:
        MergeError: Its forward cannot be traced.
    """

    def __init__(self, module: nn.Module) -> None:
        try:
            self.root = _standin(module)
            self.graph = _OwnForwardTracer().trace(self.root)
        except Exception as failure:
            if is_out_of_memory(failure):
                raise
            raise MergeError(f"its forward cannot be traced ({type(failure).__name__}: {failure})") from failure
        for node in list(self.graph.nodes):
            self._read_what_was_written(node)
        self.input = next(iter(self.graph.nodes))
        self._constants: dict[fx.Node, object] = {}
        self.live: list[fx.Node] = []
        reached: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder" or any(other in reached for other in node.all_input_nodes):
                reached.add(node)
                self.live.append(node)
        self._reached = reached

    def _read_what_was_written(self, node: fx.Node) -> None:
        """Let what reads a tensor after a write in place read the result of the write."""

        def is_later(user: fx.Node) -> bool:
            return user is not node and node < user

        if self._writes(node) and isinstance(node.args[0], fx.Node):
            node.args[0].replace_all_uses_with(node, is_later)

    def _writes(self, node: fx.Node) -> bool:
        if not node.args or node.op in ("placeholder", "output", "get_attr"):
            return False
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        in_place = node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))
        return in_place or (node.op == "call_module" and getattr(self.child(node), "inplace", False) is True)

    @property
    def output(self) -> object:
        """What the forward returns, nodes in place of tensors."""
        return next(iter(reversed(self.graph.nodes))).args[0]

    def is_live(self, value: object) -> TypeGuard[fx.Node]:
        """Tell whether a value depends on the input."""
        return isinstance(value, fx.Node) and value in self._reached

    def live_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that ``node`` reads and that depend on the input."""
        return [other for other in node.all_input_nodes if other in self._reached]

    def child(self, node: fx.Node) -> nn.Module:
        """Return the module that a node calls."""
        return self.root.get_submodule(str(node.target))

    def constant(self, value: object) -> object:
        """Evaluate what does not depend on the input."""
        if not isinstance(value, fx.Node):
            return map_arg(cast(Argument, value), lambda node: cast(Argument, self.constant(node)))
        if value not in self._constants:
            self._constants[value] = self.call(value, {})
        return self._constants[value]

    def call(self, node: fx.Node, given: Mapping[fx.Node, Tensor]) -> object:
        """Run one node; live inputs are taken from ``given``, and constants are then made float64."""
        if node.op == "get_attr":
            value: object = self.root
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value.detach() if isinstance(value, Tensor) else value

        def argument(other: fx.Node) -> Argument:
            if other in given:
                return given[other]
            value = self.constant(other)
            if given and isinstance(value, Tensor) and value.is_floating_point():
                return value.double()
            return cast(Argument, value)

        args, kwargs = map_arg(node.args, argument), map_arg(node.kwargs, argument)
        if node.op == "call_module":
            return cast(object, self.child(node)(*args, **kwargs))
        if node.op == "call_method":
            return cast(object, getattr(args[0], str(node.target))(*args[1:], **kwargs))
        return cast("Callable[..., object]", node.target)(*args, **kwargs)

    def rule(self, node: fx.Node) -> Sum | Scale | Layer | None:
        """Say what a live node does with what it reads; None is nothing that could be linear."""
        if node.op in ("placeholder", "output", "get_attr"):
            return None
        if node.op != "call_module":
            name, two = _name(node), len(node.args) == 2
            extra = set(node.kwargs)
            if name in _ADDITIONS and two and extra <= {"alpha"}:
                return self._sum(node, _ADDITIONS[name])
            if name in _PRODUCTS | _QUOTIENTS and two and not extra:
                return self._scale(node, name in _QUOTIENTS)
            if name in ("neg", "negative", "zeros_like") and self.is_live(node.args[0]):
                return Sum(((0.0 if name == "zeros_like" else -1.0, node.all_input_nodes[0]),))
            if name in ("sum", "mean"):
                stacked = self._sum_of_stack(node, name == "mean")
                if stacked is not None:
                    return stacked
        inputs = self.live_inputs(node)
        if len(inputs) != 1 or (node.op == "call_module" and (node.args != (inputs[0],) or node.kwargs)):
            return None
        return Layer(inputs[0])

    def _sum(self, node: fx.Node, sign: int) -> Sum | None:
        factor = node.kwargs.get("alpha", 1)
        if not isinstance(factor, int | float):
            return None
        members = ((1.0, node.args[0]), (float(sign * factor), node.args[1]))
        return Sum(
            tuple((weight, other) for weight, other in members if self.is_live(other)),
            tuple((weight, other) for weight, other in members if not self.is_live(other)),
        )

    def _scale(self, node: fx.Node, divides: bool) -> Scale | None:
        first, second = node.args
        if self.is_live(first) and not self.is_live(second):
            return Scale(first, second, divides)
        if self.is_live(second) and not self.is_live(first) and not divides:
            return Scale(second, first)
        return None

    def _sum_of_stack(self, node: fx.Node, mean: bool) -> Sum | None:
        """Read ``torch.stack(branches).sum(0)``."""
        stack = node.args[0]
        dim = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
        if not isinstance(stack, fx.Node) or _name(stack) != "stack" or dim not in (0, (0,), [0]):
            return None
        if set(node.kwargs) - {"dim"} or len(stack.args) > 1 + (stack.args[-1] == 0) or stack.kwargs.get("dim", 0) != 0:
            return None
        members = stack.args[0]
        if not isinstance(members, list | tuple) or not all(self.is_live(member) for member in members):
            return None
        factor = 1 / len(members) if mean else 1.0
        return Sum(tuple((factor, member) for member in members if isinstance(member, fx.Node)))

    def operands(self, node: fx.Node) -> Iterator[fx.Node]:
        """Live nodes that the rule of ``node`` speaks of."""
        rule = self.rule(node)
        if isinstance(rule, Sum):
            yield from (other for _, other in rule.terms)
        elif rule is not None:
            yield rule.node
