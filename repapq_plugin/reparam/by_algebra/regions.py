"""Which parts of a module's own forward are one convolution, composed step by step.

A branch is composed from what is known to be linear: convolutions, norms at inference, average
pooling, sums, scales, and children that are composed themselves. A step that is not known is run,
and taken for a convolution if it equals its impulse response.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.branches import qualified_name
from repapq_plugin.reparam.by_algebra.forward_graph import ForwardGraph, Layer, Scale, Sum
from repapq_plugin.reparam.by_algebra.impulse import NotAffineError, impulse_map
from repapq_plugin.reparam.linear_map import (
    LinearMap,
    branch_map,
    conv2d_map,
    identity_map,
    in_parallel,
    in_series,
    input_channels,
    is_plain_conv,
    scaled,
    to_conv,
)
from repapq_plugin.reparam.merged import MergedBlock
from repapq_plugin.reparam.norms import has_activation, is_norm

logger = logging.getLogger(__name__)

# One convolution may hold this many times the weights of the layers that it replaces (our choice): a
# row and a column make a cross of 3/2 their size, a depthwise and a pointwise layer a dense kernel.
MAX_GROWTH = 8
_ACTIVATIONS = tuple(
    value
    for value in vars(nn.modules.activation).values()
    if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == nn.modules.activation.__name__
)


@dataclass(frozen=True)
class _Term:
    """A tensor as a map of another one; ``shifted`` if the layers on the way may add something."""

    linear: LinearMap
    shifted: bool = False


@dataclass(frozen=True)
class _Path:
    """How a tensor may depend on another one: the branches' first layers, and how many were added."""

    starts: frozenset[fx.Node] = frozenset()
    branches: int = 1
    summed: bool = False


@dataclass(frozen=True)
class Region:
    """A part of a forward that is one convolution."""

    source: fx.Node
    node: fx.Node
    inside: frozenset[fx.Node]
    branches: int
    conv: nn.Conv2d


class Algebra:
    """What the modules of one network are as maps; every module is looked into once.

    Args:
        with_identity: Full names of classes that a single convolution and the identity make a
            multi-branch block in. Elsewhere that is an ordinary residual block.
    """

    def __init__(self, with_identity: Collection[str] = ()) -> None:
        self.with_identity = frozenset(with_identity)
        self._maps: dict[tuple[nn.Module, int], LinearMap | MergeError] = {}
        self._forwards: dict[nn.Module, LinearForward | MergeError] = {}

    def forget(self) -> None:
        """Drop all maps, which are large; what was traced stays."""
        self._maps.clear()
        for forward in self._forwards.values():
            if isinstance(forward, LinearForward):
                forward.terms.clear()
                forward.steps.clear()

    def forward_of(self, module: nn.Module) -> LinearForward:
        """Trace the own forward of a module."""
        if module not in self._forwards:
            try:
                self._forwards[module] = LinearForward(module, self)
            except MergeError as failure:
                self._forwards[module] = failure
        found = self._forwards[module]
        if isinstance(found, MergeError):
            raise NotAffineError(f"{type(module).__name__}: {found}")
        return found

    def map_of(self, module: nn.Module, channels: int) -> LinearMap:
        """Return a module as a map of images of ``channels`` channels.

        Raises:
            NotAffineError: It is none.
            MergeError: It is linear, but no convolution with zero padding.
        """
        key = (module, channels)
        if key not in self._maps:
            try:
                self._maps[key] = self._read(module, channels)
            except MergeError as failure:
                self._maps[key] = failure
        found = self._maps[key]
        if isinstance(found, MergeError):
            raise found
        return found

    def _read(self, module: nn.Module, channels: int) -> LinearMap:
        name, like = type(module).__name__, empty_like(module).double()
        if is_plain_conv(module) or type(module) is nn.AvgPool2d or (is_norm(module) and not has_activation(module)):
            return branch_map([module], channels, like, name)
        if holds_activation(module):
            raise NotAffineError(f"{name} applies an activation.")
        if isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd):
            return identity_map(channels, like)
        if not is_builtin(module) or type(module) is nn.Sequential:
            try:
                forward = self.forward_of(module)
                return forward.term(forward.graph.output, forward.graph.input, channels).linear
            except NotAffineError as failure:
                logger.debug("%s is not composed of what is known: %s", name, failure)
            except MergeError:
                # Every step is known and they do not compose; together they may be exact all the same.
                with suppress(NotAffineError):
                    return whole_map(module, channels, name)
                raise
        return whole_map(module, channels, name)

    def channels_of(self, module: nn.Module) -> int | None:
        """Channels that a module reads, or None where that is not known."""
        if isinstance(module, nn.Conv2d) or is_norm(module):
            return input_channels([module])
        if is_builtin(module) and type(module) is not nn.Sequential:
            return None
        try:
            forward = self.forward_of(module)
        except NotAffineError:
            return next((inner.in_channels for inner in module.modules() if isinstance(inner, nn.Conv2d)), None)
        return forward.channels(forward.graph.input)


class LinearForward:
    """The own forward of one module, and which parts of it are convolutions."""

    def __init__(self, module: nn.Module, algebra: Algebra) -> None:
        self.module, self.algebra = module, algebra
        self.graph = ForwardGraph(module)
        self.like = empty_like(module).double()
        self.takes_identity = qualified_name(type(module)) in algebra.with_identity
        self.terms: dict[tuple[fx.Node, fx.Node, int], _Term | MergeError] = {}
        self.steps: dict[tuple[fx.Node, int], LinearMap] = {}

    # -- what a tensor is as a map of another one

    def term(self, node: Any, source: fx.Node, channels: int) -> _Term:
        """Return ``node`` as a map of ``source``, an image of ``channels`` channels."""
        if not self.graph.is_live(node):
            raise NotAffineError("what is returned is no tensor made of the input.")
        key = (node, source, channels)
        if key not in self.terms:
            try:
                self.terms[key] = self._term(node, source, channels)
            except MergeError as failure:
                self.terms[key] = failure
        found = self.terms[key]
        if isinstance(found, MergeError):
            raise found
        return found

    def _term(self, node: fx.Node, source: fx.Node, channels: int) -> _Term:
        if node is source:
            return _Term(identity_map(channels, self.like))
        rule = self.graph.rule(node)
        if isinstance(rule, Sum):
            members = [(factor, self.term(other, source, channels)) for factor, other in rule.terms]
            total = in_parallel([scaled(term.linear, self._number(factor)) for factor, term in members], str(node))
            return self._shifted(total, rule, any(term.shifted for _, term in members))
        if isinstance(rule, Scale):
            before = self.term(rule.node, source, channels)
            factor = self._per_channel(rule.factor, before.linear.out_channels)
            return _Term(scaled(before.linear, 1 / factor if rule.divides else factor), before.shifted)
        if rule is None:
            raise NotAffineError(f"{node} is not a linear function of one tensor.")
        return self._behind(self.term(rule.node, source, channels), node)

    def _shifted(self, total: LinearMap, rule: Sum, shifted: bool) -> _Term:
        for factor, value in rule.constants:
            if isinstance(value, int | float) and value == 0:
                continue  # sum() starts from it
            shift = factor * self._per_channel(value, total.out_channels)
            total, shifted = scaled(total, self._number(1.0), shift.expand(total.out_channels)), True
        return _Term(total, shifted)

    def _behind(self, before: _Term, node: fx.Node) -> _Term:
        step, linear = self.step(node, before.linear.out_channels), before.linear
        shifted = before.shifted or bool(step.bias.any()) or self._may_shift(node)
        if step.is_diagonal and step.stride == (1, 1) and linear.out_channels == step.in_channels:
            return _Term(scaled(linear, step.weight.flatten(), step.bias), shifted)
        # That a bias is zero now says nothing of the next checkpoint, whose merge has to be the same.
        return _Term(in_series(linear, step, str(node), shifts=before.shifted), shifted)

    def _may_shift(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return self._is_conv2d(node) and (len(node.args) > 2 or "bias" in node.kwargs)
        layers = self.graph.child(node).modules()
        return any(is_norm(layer) or getattr(layer, "bias", None) is not None for layer in layers)

    def step(self, node: fx.Node, channels: int) -> LinearMap:
        """Return what a `Layer` node does, as a map."""
        key = (node, channels)
        if key not in self.steps:
            self.steps[key] = self._step(node, channels)
        return self.steps[key]

    def _step(self, node: fx.Node, channels: int) -> LinearMap:
        if node.op == "call_module":
            return self.algebra.map_of(self.graph.child(node), channels)
        if self._is_conv2d(node):
            names = ("weight", "bias", "stride", "padding", "dilation", "groups")
            given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
            values = {name: self.graph.constant(value) for name, value in given.items()}
            return conv2d_map(values.pop("weight"), values.pop("bias", None), **values)
        source = self.graph.live_inputs(node)[0]
        return impulse_map(lambda image: self.graph.call(node, {source: image}), channels, self.like, str(node))

    def _number(self, value: float) -> Tensor:
        return self.like.new_tensor(value, dtype=torch.float64)

    def _per_channel(self, value: Any, channels: int) -> Tensor:
        """Read a constant that an image is added to or multiplied with: one number, or one per channel."""
        constant = self.graph.constant(value)
        if isinstance(constant, int | float):
            return self._number(constant)
        if not isinstance(constant, Tensor) or not constant.is_floating_point():
            raise NotAffineError(f"{value} is not a real number.")
        tensor = constant.to(self.like.device)
        shape = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
        if tensor.numel() == 1:
            return tensor.double().reshape(())
        if shape != (1, channels, 1, 1):
            raise NotAffineError(f"a constant of shape {tuple(tensor.shape)} depends on the position.")
        return tensor.double().flatten()

    # -- where the regions are

    def channels(self, source: fx.Node) -> int | None:
        """Channels of a tensor, from the first layer that reads it; None if none tells."""
        waiting, seen = [source], {source}
        while waiting:
            node = waiting.pop(0)
            for user in node.users:
                if user in seen or self.graph.rule(user) is None:
                    continue
                seen.add(user)
                known = self._channels_read(user)
                if known is not None:
                    return known
                waiting.append(user)
        return None

    def _channels_read(self, node: fx.Node) -> int | None:
        if node.op == "call_module":
            return self.algebra.channels_of(self.graph.child(node))
        if self._is_conv2d(node):
            return self.step(node, 0).in_channels
        return None

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

    def regions(self) -> tuple[list[Region], str | None]:
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
                    logger.debug("%s: %s", type(self.module).__name__, failure)
                    continue
                except MergeError as failure:
                    reason = str(failure)
                    continue
                found.append(Region(source, node, inside, path.branches, conv))
                taken |= inside
        return found, reason if candidates and not found else None

    def _conv(self, node: fx.Node, source: fx.Node, inside: Collection[fx.Node], growth: int) -> nn.Conv2d:
        channels = self.channels(source)
        if channels is None:
            raise NotAffineError(f"{source}: no layer tells its number of channels.")
        linear = self.term(node, source, channels).linear
        weights = 0
        for other in inside:
            rule = self.graph.rule(other)
            if isinstance(rule, Layer):
                weights += self.step(other, self.term(rule.node, source, channels).linear.out_channels).weight.numel()
        if not any(self._holds_convolution(other) for other in inside):
            raise NotAffineError(f"{node}: holds no convolution.")
        parameters = [parameter for other in inside for parameter in self._parameters(other)]
        parameters = parameters or list(self.module.parameters())
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
        return self._is_conv2d(node)

    def _is_conv2d(self, node: fx.Node) -> bool:
        return node.target is nn.functional.conv2d and self.graph.live_inputs(node) == list(node.args[:1])

    def _parameters(self, node: fx.Node) -> Iterator[nn.Parameter]:
        if node.op == "call_module":
            yield from self.graph.child(node).parameters()

    # -- what becomes of the forward

    def rewritten(self, regions: Collection[Region]) -> nn.Module:
        """Return a module with a convolution in place of each region; this graph is used up by it."""
        graph, root = self.graph.graph, self.graph.root
        after = self._chain_behind(regions)
        if after is not None:
            return MergedBlock(next(iter(regions)).conv, after)
        calls: dict[fx.Node, fx.Node] = {}
        for index, region in enumerate(sorted(regions, key=lambda region: self.graph.live.index(region.node))):
            name = "merged" if index == 0 else f"merged_{index}"
            while hasattr(root, name):
                name += "_"
            root.add_module(name, MergedBlock(region.conv))
            source = calls.get(region.source, region.source)
            with graph.inserting_after(source):
                calls[region.node] = graph.call_module(name, (source,))
            region.node.replace_all_uses_with(calls[region.node])
        merged = {node for region in regions for node in region.inside}
        for node in reversed(list(graph.nodes)):
            if not node.users and (node in merged or not self.graph.is_live(node)) and node not in calls.values():
                graph.erase_node(node)
        graph.lint()  # type: ignore[no-untyped-call]
        return fx.GraphModule(root, graph, type(self.module).__name__)

    def _chain_behind(self, regions: Collection[Region]) -> list[nn.Module] | None:
        """Modules between the only region and the output, if there is nothing else in the forward."""
        region = next(iter(regions))
        if len(regions) > 1 or region.source is not self.graph.input:
            return None
        if any(user not in region.inside for user in region.source.users):
            return None
        after, node = [], region.node
        while node is not self.graph.output:
            users = list(node.users)
            if len(users) != 1 or users[0].op != "call_module" or users[0].args != (node,) or users[0].kwargs:
                return None
            node = users[0]
            after.append(self.graph.child(node))
        return after


def empty_like(module: nn.Module) -> Tensor:
    """Return an empty tensor of the dtype and on the device of a module."""
    tensors = [*module.parameters(), *module.buffers()]
    return next((tensor.new_empty(0) for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def is_builtin(module: nn.Module) -> bool:
    """Tell whether a module is of a class that torch itself ships."""
    return type(module).__module__.startswith("torch.nn.")


def whole_map(module: nn.Module, channels: int, where: str) -> LinearMap:
    """Impulse response of a float64 copy of a module."""
    lone = copy.deepcopy(module).double()
    convs = [layer for layer in lone.modules() if isinstance(layer, nn.Conv2d)]
    groups = math.gcd(*(conv.groups for conv in convs)) if convs else 1
    weights = sum(conv.weight.numel() for conv in convs)
    return impulse_map(lone, channels, empty_like(lone), where, groups=groups, weights=weights)


def holds_activation(module: nn.Module) -> bool:
    """Tell whether an activation of torch is somewhere in a module, which is then hardly affine."""
    return any(isinstance(inner, _ACTIVATIONS) for inner in module.modules())
