"""What this host uses of torchao and of exported graphs that is undocumented, all of it (seen with torchao 0.18).

`integration/pt2e/test_pt2e_compat.py` fails with the name of what a later torchao or torch no longer has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

from torch.fx import Node
from torchao.quantization.pt2e import FakeQuantizeBase
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

ANNOTATION = "quantization_annotation"
"""Key of a node's ``meta`` that pt2e reads."""

PER_CHANNEL = "PerChannel"
"""Part of a class name by which pt2e tells that a class wants the axis of the channels."""

FACTS = ("val", "tensor_meta")
"""Keys of a node's ``meta`` that say shape and type of its tensor."""

MODULES = "nn_module_stack"
"""Key of a node's ``meta`` that says which modules were being called: a pair (path, class) by each."""

SELF = ("L['self']", "L__self__")
"""What a strict export calls the network itself; another one calls it nothing."""

BY_DICTIONARY = r"\.__dict__\['_modules'\]\['([^']+)'\]"
"""How a strict export writes a child of a module whose class has a ``__getattr__`` of its own."""

_Made = TypeVar("_Made")


def factory_of(kind: type[_Made], **arguments: object) -> Callable[..., _Made]:
    """Return what torchao's ``with_args`` makes of a fake quantizer that stands on torch.ao's base as well."""
    # Both bases have a ``with_args``, and the other one's comes first.
    return cast("Callable[..., _Made]", FakeQuantizeBase.with_args.__func__(kind, **arguments))


def is_annotated(node: Node) -> bool:
    """Whether a quantizer has said how a node is quantized."""
    return ANNOTATION in node.meta


def annotate(node: Node, inputs: Mapping[Node, QuantizationSpec]) -> None:
    """Say how a node's inputs are quantized; other quantizers then leave the node alone."""
    node.meta[ANNOTATION] = QuantizationAnnotation(input_qspec_map=dict(inputs), _annotated=True)


def copy_facts(source: Node, target: Node, *, with_modules: bool = False) -> None:
    """Let a new node say of its tensor what ``source`` says, and of its place in the network if wanted."""
    keys = (*FACTS, MODULES) if with_modules else FACTS
    target.meta = {key: source.meta[key] for key in keys if key in source.meta}


def module_path(node: Node) -> str:
    """Return the path of the module that called a node, ``""`` of the network itself."""
    stack: dict[str, tuple[str, object]] = node.meta.get(MODULES) or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    for prefix in SELF:
        path = path.removeprefix(prefix)
    return re.sub(BY_DICTIONARY, r".\1", path).lstrip(".")


def quantizer_of_inductor(activation: QuantizationSpec, weight: QuantizationSpec, *, is_qat: bool) -> Quantizer:
    """Return torchao's quantizer for inductor on x86 with these specifications for all layers."""
    from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    return X86InductorQuantizer().set_global(QuantizationConfig(activation, activation, weight, None, is_qat))
