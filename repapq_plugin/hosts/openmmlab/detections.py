"""Detections of an exported detector, put where those of the toolbox's own head would be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from repapq_plugin.core.origin import Decoding
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab.network import replaced, serving_points


@contextmanager
def serve_detections(model: nn.Module, network: nn.Module, example: Tensor, decoding: Decoding) -> Iterator[nn.Module]:
    """Let ``network`` find what ``model`` finds; undone at the end. The metric stays the toolbox's.

    Args:
        model: A one-stage detector of a toolbox; its weights and its decoding take no part.
        network: One image, float ``(1, C, H, W)``, to boxes, scores and labels (see `decoding.OUTPUTS`).
        example: Preprocessed image of the size that ``network`` was exported for.
        decoding: What it leaves to whoever runs it.

    Raises:
        HostError: The model has no single head, or (later) an image has another size or padding, or the network gives
            no such three tensors.
    """
    head, _ = serving_points(model)

    def predict(images: Tensor, samples: Sequence[object], rescale: bool = True) -> list[InstanceData]:
        if images.shape[1:] != example.shape[1:]:
            raise HostError(
                f"The detector was exported for images of {tuple(example.shape[1:])} (channels, height, width), but "
                f"got {tuple(images.shape[1:])}; give every test image one size (batch_shapes_cfg=None in mmyolo)."
            )
        return [
            _found(network, image, getattr(sample, "metainfo"), decoding, rescale)  # noqa: B009 - a toolbox's element
            for image, sample in zip(images, samples, strict=True)
        ]

    with replaced(head, "predict", predict), replaced(model, "extract_feat", lambda images, *_, **__: images):
        yield model


def _found(
    network: nn.Module, image: Tensor, metas: Mapping[str, object], decoding: Decoding, rescale: bool
) -> InstanceData:
    """Run one image, float ``(C, H, W)``, and return what is found in it, in the pixels of the original if wanted."""
    shape = tuple(_numbers(metas["img_shape"])[:2])
    if decoding.image_shape is not None and shape != decoding.image_shape:
        raise HostError(
            f"The detector was exported for images of {decoding.image_shape} (height, width) before padding, but got "
            f"{shape}. Its boxes would be clamped elsewhere than the toolbox's; let the test pipeline pad (type='Pad') "
            "or score a file that was exported without decoding."
        )
    outputs = network(image[None])
    if not isinstance(outputs, tuple) or len(outputs) != 3:
        raise HostError("The file says that it holds a whole detector, but gives no boxes, scores and labels.")
    boxes, scores, labels = outputs
    if rescale:
        boxes = on_original(boxes, metas, decoding.clamp)
    return InstanceData(bboxes=boxes, scores=scores, labels=labels.long())


def on_original(boxes: Tensor, metas: Mapping[str, object], clamp: bool) -> Tensor:
    """Return boxes of a network's input, float ``(n, 4)`` in pixels, as boxes of the original image.

    Args:
        boxes: x1, y1, x2, y2.
        metas: The toolbox's ``scale_factor`` (width, height), ``pad_param`` (top, bottom, left, right; optional) and
            ``ori_shape`` (height, width) of the image.
        clamp: Clamp them to the original image.
    """
    padding = metas.get("pad_param")
    if padding is not None:
        top, _, left, _ = _numbers(padding)
        boxes = boxes - boxes.new_tensor([left, top, left, top])
    boxes = boxes / boxes.new_tensor(_numbers(metas["scale_factor"])[:2]).repeat(2)
    if not clamp:
        return boxes
    height, width = _numbers(metas["ori_shape"])[:2]
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def _numbers(values: object) -> list[float]:
    return torch.as_tensor(values).flatten().tolist()
