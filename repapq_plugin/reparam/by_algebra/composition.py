"""Tensors of a module's own forward as maps of one another, composed step by step.

A step that is not known is run, and taken for a convolution if it equals its impulse response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, fx, nn

from repapq_plugin.reparam.by_algebra.forward_graph import ForwardGraph, Scale, Sum
from repapq_plugin.reparam.by_algebra.impulse import NotAffineError, empty_like, impulse_map
from repapq_plugin.reparam.by_algebra.memo import Memo
from repapq_plugin.reparam.layer_maps import Size, conv2d_map
from repapq_plugin.reparam.linear_map import LinearMap, identity_map, in_parallel, in_series, on_device_of, scaled
from repapq_plugin.reparam.norms import is_norm

_CONV2D_ARGUMENTS = ("weight", "bias", "stride", "padding", "dilation", "groups")


class ModuleMaps(Protocol):
    """What a composition asks about the children of its module."""

    def map_of(self, module: nn.Module, channels: int) -> LinearMap:
        """Return a module as a map of images of ``channels`` channels, or raise `MergeError`."""

    def channels_of(self, module: nn.Module) -> int | None:
        """Return the channels that a module reads, or None where that is not known."""


@dataclass(frozen=True)
class Term:
    """A tensor as a map of another one; ``shifted`` if the layers on the way may add something."""

    linear: LinearMap
    shifted: bool = False


class Composition:
    """The own forward of one module, its tensors as maps of one another.

    Args:
        module: A module in evaluation mode; left as it is.
        maps: Knows the module's children.

    Raises:
        MergeError: Its forward cannot be traced.
    """

    def __init__(self, module: nn.Module, maps: ModuleMaps) -> None:
        self.module, self.maps = module, maps
        self.graph = ForwardGraph(module)
        self.like = empty_like(module).double()
        self._terms: Memo[tuple[fx.Node, fx.Node, int], Term] = Memo()
        self._steps: Memo[tuple[fx.Node, int], LinearMap] = Memo()

    def forget(self) -> None:
        """Drop all maps, which are large."""
        self._terms.clear()
        self._steps.clear()

    def whole(self, channels: int) -> LinearMap:
        """Return the output as a map of the input, an image of ``channels`` channels.

        Raises:
            MergeError: It is none; `NotAffineError` where it is not known to be linear.
        """
        return self.term(self.graph.output, self.graph.input, channels).linear

    def term(self, node: object, source: fx.Node, channels: int) -> Term:
        """Return ``node`` as a map of ``source``, an image of ``channels`` channels.

        Raises:
            MergeError: It is none; `NotAffineError` where it is not known to be linear.
        """
        if not self.graph.is_live(node):
            raise NotAffineError("what is returned is no tensor made of the input.")
        tensor: fx.Node = node
        return self._terms.get((tensor, source, channels), lambda: self._term(tensor, source, channels))

    def _term(self, node: fx.Node, source: fx.Node, channels: int) -> Term:
        if node is source:
            return Term(identity_map(channels, self.like))
        rule = self.graph.rule(node)
        if isinstance(rule, Sum):
            members = [(factor, self.term(other, source, channels)) for factor, other in rule.terms]
            total = in_parallel([scaled(term.linear, self._number(factor)) for factor, term in members], str(node))
            return self._shifted(total, rule, any(term.shifted for _, term in members))
        if isinstance(rule, Scale):
            before = self.term(rule.node, source, channels)
            factor = self._per_channel(rule.factor, before.linear.out_channels)
            return Term(scaled(before.linear, 1 / factor if rule.divides else factor), before.shifted)
        if rule is None:
            raise NotAffineError(f"{node} is not a linear function of one tensor.")
        return self._behind(self.term(rule.node, source, channels), node)

    def _shifted(self, total: LinearMap, rule: Sum, shifted: bool) -> Term:
        for factor, value in rule.constants:
            if isinstance(value, int | float) and value == 0:
                continue  # sum() starts from it
            shift = factor * self._per_channel(value, total.out_channels)
            total, shifted = scaled(total, self._number(1.0), shift.expand(total.out_channels)), True
        return Term(total, shifted)

    def _behind(self, before: Term, node: fx.Node) -> Term:
        step, linear = self.step(node, before.linear.out_channels), before.linear
        shifted = before.shifted or bool(step.bias.any()) or self._may_shift(node)
        if step.is_diagonal and step.stride == (1, 1) and linear.out_channels == step.in_channels:
            return Term(scaled(linear, step.weight.flatten(), step.bias), shifted)
        # That a bias is zero now says nothing of the next checkpoint, whose merge has to be the same.
        return Term(in_series(linear, step, str(node), shifts=before.shifted), shifted)

    def _may_shift(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return self.is_conv2d(node) and (len(node.args) > 2 or "bias" in node.kwargs)
        layers = self.graph.child(node).modules()
        return any(is_norm(layer) or getattr(layer, "bias", None) is not None for layer in layers)

    def step(self, node: fx.Node, channels: int) -> LinearMap:
        """Return what a node that reads one image of ``channels`` channels does, as a map.

        Raises:
            MergeError: It is no convolution.
        """
        return self._steps.get((node, channels), lambda: self._step(node, channels))

    def _step(self, node: fx.Node, channels: int) -> LinearMap:
        if node.op == "call_module":
            # A child without parameters does not tell where it runs.
            return on_device_of(self.maps.map_of(self.graph.child(node), channels), self.like)
        if self.is_conv2d(node):
            return self._conv2d(node)
        source = self.graph.live_inputs(node)[0]

        def run(image: Tensor) -> object:
            return self.graph.call(node, {source: image})

        return impulse_map(run, channels, self.like, str(node))

    def is_conv2d(self, node: fx.Node) -> bool:
        """Tell whether a node calls ``torch.nn.functional.conv2d`` with constant weights."""
        return node.target is nn.functional.conv2d and self.graph.live_inputs(node) == list(node.args[:1])

    def _conv2d(self, node: fx.Node) -> LinearMap:
        given = dict(zip(_CONV2D_ARGUMENTS, node.args[1:], strict=False)) | dict(node.kwargs)
        values = {name: self.graph.constant(value) for name, value in given.items()}
        return conv2d_map(
            cast(Tensor, values["weight"]),
            cast("Tensor | None", values.get("bias")),
            cast(Size, values.get("stride", 1)),
            cast("Size | str", values.get("padding", 0)),
            cast(Size, values.get("dilation", 1)),
            cast(int, values.get("groups", 1)),
        )

    def _number(self, value: float) -> Tensor:
        return self.like.new_tensor(value, dtype=torch.float64)

    def _per_channel(self, value: object, channels: int) -> Tensor:
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
            return self.maps.channels_of(self.graph.child(node))
        return self.step(node, 0).in_channels if self.is_conv2d(node) else None
