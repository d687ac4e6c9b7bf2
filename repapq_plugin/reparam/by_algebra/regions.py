"""Which parts of a module's own forward are one convolution of two or more branches."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import fx, nn

from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.by_algebra.composition import Composition
from repapq_plugin.reparam.by_algebra.forward_graph import Layer, Scale, Sum
from repapq_plugin.reparam.by_algebra.impulse import NotAffineError
from repapq_plugin.reparam.linear_map import to_conv

logger = logging.getLogger(__name__)

# One convolution may hold this many times the weights of the layers that it replaces (our choice): a
# row and a column make a cross of 3/2 their size, a depthwise and a pointwise layer a dense kernel.
MAX_GROWTH = 8


@dataclass(frozen=True)
class Region:
    """A part of a forward that is one convolution.

    Args:
        source: The tensor that it reads.
        node: The tensor that it gives.
        inside: The nodes on the way, ``node`` among them.
        branches: How many branches it adds.
        conv: The convolution.
    """

    source: fx.Node
    node: fx.Node
    inside: frozenset[fx.Node]
    branches: int
    conv: nn.Conv2d


@dataclass(frozen=True)
class _Path:
    """How a tensor may depend on another one: the branches' first layers, and how many were added."""

    starts: frozenset[fx.Node] = frozenset()
    branches: int = 1
    summed: bool = False


class RegionSearch:
    """Looks for regions in one forward.

    Args:
        forward: The forward, composed.
        takes_identity: Whether a single convolution and the identity are two branches. Elsewhere that is an ordinary
            residual block.
    """

    def __init__(self, forward: Composition, *, takes_identity: bool = False) -> None:
        self.forward, self.graph = forward, forward.graph
        self.takes_identity = takes_identity

    def _paths(self) -> dict[fx.Node, dict[fx.Node, _Path]]:
        """For every node the nodes that it may be a linear function of; always one of itself."""
        paths: dict[fx.Node, dict[fx.Node, _Path]] = {}
        for node in self.graph.live:
            rule, found = self.graph.rule(node), {}
            if isinstance(rule, Sum) and rule.terms:
                operands = [paths[other] for _, other in rule.terms]
                common = set.intersection(*(set(operand) for operand in operands))
                found = {key: self._added(node, key, [operand[key] for operand in operands]) for key in common}
            elif isinstance(rule, Scale):
                found = dict(paths[rule.node])
            elif isinstance(rule, Layer):
                found = {
                    source: _Path(path.starts or frozenset({node}), path.branches, path.summed)
                    for source, path in paths[rule.node].items()
                }
            paths[node] = {**found, node: _Path()}
        return paths

    def _added(self, node: fx.Node, source: fx.Node, members: list[_Path]) -> _Path:
        if len(members) == 1:
            return members[0]
        marks = [path.starts or (frozenset({source}) if self.takes_identity else frozenset()) for path in members]
        starts: frozenset[fx.Node] = frozenset().union(*marks)
        branches = sum(path.branches for path in members)
        if len(starts) >= 2:
            return _Path(frozenset({node}), branches, True)
        return _Path(starts, branches, any(path.summed for path in members))

    def _inside(self, node: fx.Node, source: fx.Node) -> frozenset[fx.Node] | None:
        """Nodes that make ``node`` of ``source``; None if others read them too, or they read others."""
        inside, waiting = {node}, [node]
        while waiting:
            current = waiting.pop()
            for other in self.graph.live_inputs(current):
                if other is source or other in inside:
                    continue
                if self.graph.rule(other) is None and other.op in ("placeholder", "output"):
                    return None
                inside.add(other)
                waiting.append(other)
        closed = all(user in inside for other in inside - {node} for user in other.users)
        return frozenset(inside) if closed else None

    def run(self) -> tuple[list[Region], str | None]:
        """Find the largest parts that are one convolution of two or more branches.

        Returns:
            The regions, and, if there is none, why what looked like one is none: empty if it is not
            known to be linear, None if nothing looked like one.
        """
        paths, order = self._paths(), {node: index for index, node in enumerate(self.graph.live)}
        candidates = [
            (node, source, path)
            for node in reversed(self.graph.live)
            for source, path in sorted(paths[node].items(), key=lambda item: order[item[0]])
            if path.summed
        ]
        found: list[Region] = []
        taken: set[fx.Node] = set()
        reason = ""
        # First without more weights than there are, which keeps layers around the sum apart where
        # swallowing them costs; only then what grows.
        for growth in (1, MAX_GROWTH):
            for node, source, path in candidates:
                inside = self._inside(node, source)
                if inside is None or inside & taken:
                    continue
                try:
                    conv = self._conv(node, source, inside, growth)
                except NotAffineError as failure:
                    logger.debug("%s: %s", type(self.forward.module).__name__, failure)
                    continue
                except MergeError as failure:
                    reason = str(failure)
                    continue
                found.append(Region(source, node, inside, path.branches, conv))
                taken |= inside
        return found, reason if candidates and not found else None

    def _conv(self, node: fx.Node, source: fx.Node, inside: Collection[fx.Node], growth: int) -> nn.Conv2d:
        channels = self.forward.channels(source)
        if channels is None:
            raise NotAffineError(f"{source}: no layer tells its number of channels.")
        linear = self.forward.term(node, source, channels).linear
        weights = 0
        for other in inside:
            rule = self.graph.rule(other)
            if isinstance(rule, Layer):
                read = self.forward.term(rule.node, source, channels).linear.out_channels
                weights += self.forward.step(other, read).weight.numel()
        if not any(self._holds_convolution(other) for other in inside):
            raise NotAffineError(f"{node}: holds no convolution.")
        parameters = [parameter for other in inside for parameter in self._parameters(other)]
        parameters = parameters or list(self.forward.module.parameters())
        dtype = next(parameter.dtype for parameter in parameters if parameter.is_floating_point())
        conv = to_conv(linear, dtype)
        if conv.weight.numel() > growth * weights:
            raise MergeError(
                f"one convolution would hold {conv.weight.numel()} weights in place of {weights}; merge it by "
                "register_branches if that is wanted."
            )
        if not all(bool(parameter.isfinite().all()) for parameter in conv.parameters()):
            raise MergeError(f"the merged weights are not finite in {dtype}; check the checkpoint.")
        return conv.requires_grad_(any(parameter.requires_grad for parameter in parameters))

    def _holds_convolution(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return any(isinstance(layer, nn.Conv2d) for layer in self.graph.child(node).modules())
        return self.forward.is_conv2d(node)

    def _parameters(self, node: fx.Node) -> Iterator[nn.Parameter]:
        if node.op == "call_module":
            yield from self.graph.child(node).parameters()
