"""The network part of a toolbox model, taken out for a runtime and put back in its place.

A detector, classifier or segmentor of the toolboxes is Python around a network: data preparation in
front, decoding and non-maximum suppression behind. Only the network part is exported; the rest stays
the toolbox's own, so that one metric judges the float network, the simulation and the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from repapq_plugin.errors import HostError

HEADS = ("bbox_head", "decode_head", "mask_head", "head")
"""Attributes under which the toolboxes keep the one head of a single-stage model."""


class TensorPath(nn.Module):
    """``images -> (tensor, ...)``: a toolbox model's ``mode='tensor'``, its nested output laid flat.

    Args:
        model: A detector, classifier or segmentor; its preprocessor and decoding take no part.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run prepared images, float ``(N, C, H, W)``, up to the head's raw outputs."""
        return tuple(flatten(self.model(images, mode="tensor")))


def flatten(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dicts in order, and what stands for them in a trace."""
    if isinstance(value, Tensor | Proxy):
        yield cast(Tensor, value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from flatten(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from flatten(item)


def unflatten(template: Any, tensors: Iterator[Tensor]) -> Any:
    """Return ``template`` with its tensors replaced, in the order of `flatten`."""
    if isinstance(template, Tensor):
        return next(tensors)
    if isinstance(template, Mapping):
        return {key: unflatten(item, tensors) for key, item in template.items()}
    if isinstance(template, tuple | list):
        return type(template)(unflatten(item, tensors) for item in template)
    return template


def serving_points(model: nn.Module) -> tuple[nn.Module, bool]:
    """Return the module whose output is the network's, and whether features are extracted before it.

    Raises:
        HostError: The model has no single head (a two-stage detector, for example).
    """
    if not isinstance(getattr(model, "roi_head", None), nn.Module):
        for name in HEADS:
            head = getattr(model, name, None)
            if isinstance(head, nn.Module) and hasattr(model, "extract_feat"):
                return head, True
        inner = getattr(model, "model", None)
        if isinstance(inner, nn.Module):
            return inner, False
    raise HostError(
        f"{type(model).__name__} has no single head (one of {', '.join(HEADS)}), so its network part cannot be "
        "taken out for a runtime. It can still be quantized and scored with backend='simulated'."
    )


@contextmanager
def serve_with(model: nn.Module, network: nn.Module, example: Tensor) -> Iterator[nn.Module]:
    """Let ``network`` compute what ``model``'s own network part computes; undone at the end.

    Feature extraction hands the images on, the head's ``forward`` returns the outputs of
    ``network``; everything else (decoding, metric) is the toolbox's.

    Args:
        model: A toolbox model that stands for the structure of the outputs.
        network: ``images -> tensor or tuple of tensors``, in the order of `TensorPath`.
        example: Prepared images, float ``(N, C, H, W)``, of the size ``network`` was exported for.

    Raises:
        HostError: The model has no single head, or (later, while serving) images have another size
            or the network another number of outputs.
    """
    head, extracts = serving_points(model)
    with torch.no_grad():
        template = model(example, mode="tensor")
    wanted = sum(1 for _ in flatten(template))

    def serve(images: Tensor, *_: Any, **__: Any) -> Any:
        if images.shape[1:] != example.shape[1:]:
            raise HostError(
                f"The network was exported for images of {tuple(example.shape[1:])} (channels, height, width), but "
                f"got {tuple(images.shape[1:])}; give every test image one size (batch_shapes_cfg=None in mmyolo)."
            )
        outputs = list(flatten(network(images)))
        if len(outputs) != wanted:
            raise HostError(f"The network gives {len(outputs)} outputs where {type(model).__name__} has {wanted}.")
        return unflatten(template, (output.to(images.device) for output in outputs))

    with replaced(head, "forward", serve):
        if not extracts:
            yield model
            return
        with replaced(model, "extract_feat", lambda images, *_, **__: images):
            yield model


@contextmanager
def replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Give one object another method for a while."""
    own = vars(module)
    before = own.get(name)
    own[name] = function
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Run one collated batch up to the raw outputs: the toolbox's preprocessor, then ``mode='tensor'``."""
    data = prepare(model, batch)
    return model(data["inputs"], data.get("data_samples"), mode="tensor")


def prepare(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Return a batch after the model's own data preprocessor: ``inputs`` float ``(N, C, H, W)`` and more."""
    preprocessor = cast(Callable[[Any, bool], Any], model.data_preprocessor)
    return cast(dict[str, Any], preprocessor(batch, False))
