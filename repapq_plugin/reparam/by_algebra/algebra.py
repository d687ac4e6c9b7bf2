"""What the modules of a network are as maps: read where they are known, composed or run where they are not."""

from __future__ import annotations

import logging
from contextlib import suppress

from torch import nn

from repapq_plugin.core.modules import own_class
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.by_algebra.composition import Composition
from repapq_plugin.reparam.by_algebra.impulse import NotAffineError, empty_like, whole_map
from repapq_plugin.reparam.by_algebra.memo import Memo
from repapq_plugin.reparam.layer_maps import branch_map, input_channels, is_plain_conv
from repapq_plugin.reparam.linear_map import LinearMap, identity_map
from repapq_plugin.reparam.norms import has_activation, is_norm

logger = logging.getLogger(__name__)

_ACTIVATIONS = tuple(
    value
    for value in vars(nn.modules.activation).values()
    if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == nn.modules.activation.__name__
)


def is_builtin(module: nn.Module) -> bool:
    """Tell whether a module is of a class that torch itself ships."""
    return own_class(module).__module__.startswith("torch.nn.")


def holds_activation(module: nn.Module) -> bool:
    """Tell whether an activation of torch is somewhere in a module, which is then hardly affine."""
    return any(isinstance(inner, _ACTIVATIONS) for inner in module.modules())


class Algebra:
    """What the modules of one network are as maps; every module is looked into once."""

    def __init__(self) -> None:
        self._maps: Memo[tuple[nn.Module, int], LinearMap] = Memo()
        self._forwards: Memo[nn.Module, Composition] = Memo()

    def forget(self) -> None:
        """Drop all maps, which are large; what was traced stays."""
        self._maps.clear()
        for forward in self._forwards.values():
            forward.forget()

    def forward_of(self, module: nn.Module) -> Composition:
        """Trace the own forward of a module.

        Raises:
            NotAffineError: It cannot be traced.
        """
        try:
            return self._forwards.get(module, lambda: Composition(module, self))
        except MergeError as failure:
            raise NotAffineError(f"{type(module).__name__}: {failure}") from failure

    def map_of(self, module: nn.Module, channels: int) -> LinearMap:
        """Return a module as a map of images of ``channels`` channels.

        Raises:
            NotAffineError: It is none.
            MergeError: It is linear, but no convolution with zero padding.
        """
        return self._maps.get((module, channels), lambda: self._read(module, channels))

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
                return self.forward_of(module).whole(channels)
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
