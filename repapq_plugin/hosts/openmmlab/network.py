"""The network part of a toolbox model, taken out for a runtime and put back in its place.

A detector, classifier or segmentor of the toolboxes is Python around a network: data preprocessing in front, decoding
and non-maximum suppression behind. Only the network part is exported. The rest stays the toolbox's own, so that one
metric judges the float network, the simulation and the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from repapq_plugin.core.tensors import tensors_of, with_tensors
from repapq_plugin.errors import HostError

HEADS = ("bbox_head", "decode_head", "mask_head", "head")
"""Attributes under which the toolboxes keep the one head of a single-stage model."""


class Preprocessed(TypedDict, total=False):
    """A batch after a toolbox model's own data preprocessor.

    Attributes:
        inputs: Images as the network takes them, float ``(N, C, H, W)``.
        data_samples: The toolbox's annotations and image sizes.
    """

    inputs: Tensor
    data_samples: object


class TensorPath(nn.Module):
    """``images -> (tensor, ...)``: a toolbox model's ``mode='tensor'``, its nested output laid flat.

    Args:
        model: A detector, classifier or segmentor; its preprocessor and decoding take no part.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run preprocessed images, float ``(N, C, H, W)``, up to the head's raw outputs."""
        return tuple(tensors_of(self.model(images, mode="tensor"), Proxy))


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

    Feature extraction hands the images on, and the head's ``forward`` returns the outputs of ``network``. Everything
    else (decoding, metric) is the toolbox's.

    Args:
        model: A toolbox model that stands for the structure of the outputs.
        network: ``images -> tensor or tuple of tensors``, in the order of `TensorPath`.
        example: Preprocessed images, float ``(N, C, H, W)``, of the size ``network`` was exported for.

    Raises:
        HostError: The model has no single head, or (later, while serving) images have another size or the network
            another number of outputs.
    """
    head, extracts = serving_points(model)
    with torch.no_grad():
        template = model(example, mode="tensor")
    wanted = len(tensors_of(template))

    def serve(images: Tensor, *_: object, **__: object) -> object:
        if images.shape[1:] != example.shape[1:]:
            raise HostError(
                f"The network was exported for images of {tuple(example.shape[1:])} (channels, height, width), but "
                f"got {tuple(images.shape[1:])}; give every test image one size (batch_shapes_cfg=None in mmyolo)."
            )
        outputs = tensors_of(network(images))
        if len(outputs) != wanted:
            raise HostError(f"The network gives {len(outputs)} outputs where {type(model).__name__} has {wanted}.")
        return with_tensors(template, (output.to(images.device) for output in outputs))

    with replaced(head, "forward", serve):
        if not extracts:
            yield model
            return
        with replaced(model, "extract_feat", lambda images, *_, **__: images):
            yield model


@contextmanager
def replaced(module: nn.Module, name: str, function: Callable[..., object]) -> Iterator[None]:
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


def run_batch(model: nn.Module, batch: object) -> object:
    """Run one collated batch up to the raw outputs: the toolbox's preprocessor, then ``mode='tensor'``."""
    data = preprocess(model, batch)
    return model(data["inputs"], data.get("data_samples"), mode="tensor")


def preprocess(model: nn.Module, batch: object) -> Preprocessed:
    """Return a collated batch after the model's own data preprocessor, as at inference."""
    preprocessor = cast(Callable[[object, bool], Preprocessed], model.data_preprocessor)
    return preprocessor(batch, False)
