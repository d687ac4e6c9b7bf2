"""Predictions of networks on the same images, side by side, drawn by the toolbox's own visualizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, cast

import mmcv
import numpy as np
from mmengine.registry import VISUALIZERS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from repapq_plugin.core.running import inference
from repapq_plugin.hosts.openmmlab.network import serve_with

Image = NDArray[np.uint8]
"""``(height, width, 3)``, red, green and blue."""

SHOWN = 3
"""How many images a page shows (our choice)."""

GAP = 8
"""White pixels between two images."""

SMALLEST = 320
"""In pixels: smaller images are drawn larger, so that what is written on them can be read."""


class _Tests(Protocol):
    """A toolbox model, of which only this is used here."""

    def test_step(self, data: object) -> Sequence[BaseDataElement]:
        """Return what is predicted for a collated batch."""


def sample_name(sample: object, number: int) -> str:
    """Return what to call a sample: the name of its file, or its number."""
    path = getattr(sample, "img_path", None)
    return str(path).replace("\\", "/").rpartition("/")[2] if path else f"number {number}"


def names_in(batches: Sequence[object]) -> list[str]:
    """Return the names of all samples of collated batches, in order."""
    names: list[str] = []
    for batch in batches:
        said = batch if isinstance(batch, Mapping) else {}
        samples = said.get("data_samples")
        listed = samples if isinstance(samples, list | tuple) else [None] * len(said.get("inputs", ()))
        names += [sample_name(sample, len(names) + index) for index, sample in enumerate(listed)]
    return names


def predictions(
    runner: Runner, networks: Mapping[str, tuple[nn.Module, nn.Module | None]], example: Tensor, count: int = SHOWN
) -> Iterator[tuple[str, list[Image]]]:
    """Yield the first test images as each of several networks sees them.

    Args:
        runner: Holds the test data and the visualizer.
        networks: By name a toolbox model, and what computes its network part in its place, if anything does.
        example: Preprocessed image, float ``(1, C, H, W)``, that such a network was made for.
        count: How many images.

    Yields:
        The name of an image, and what the toolbox draws of each network's prediction.
    """
    batch = _first(next(iter(runner.test_dataloader)), count)
    found: list[Sequence[BaseDataElement]] = []
    for model, network in networks.values():
        served: AbstractContextManager[object] = nullcontext()
        if network is not None:
            served = serve_with(model, network, example)
        with served, inference(model):
            found.append(cast(_Tests, model).test_step(copy.deepcopy(batch)))
    visualizer = _visualizer(runner)
    for index, raw in enumerate(cast("Sequence[Tensor]", batch["inputs"])):
        yield sample_name(found[0][index], index), [_drawn(visualizer, raw, samples[index]) for samples in found]


def side_by_side(images: Sequence[Image]) -> Image:
    """Return images of one height beside each other."""
    between = np.full((images[0].shape[0], GAP, 3), 255, np.uint8)
    parts = [part for image in images for part in (between, image)][1:]
    return np.concatenate(parts, axis=1)


def _first(batch: Mapping[str, object], count: int) -> dict[str, object]:
    """Return the first samples of a collated batch."""
    return {key: value[:count] if isinstance(value, list | tuple | Tensor) else value for key, value in batch.items()}


def _visualizer(runner: Runner) -> Visualizer:
    """Return a visualizer like the runner's that writes nowhere."""
    said = {**(runner.cfg.get("visualizer") or {"type": "Visualizer"}), "vis_backends": None, "save_dir": None}
    visualizer = VISUALIZERS.build({**said, "name": "repapq"})
    visualizer.dataset_meta = getattr(runner.test_dataloader.dataset, "metainfo", {})
    return visualizer


def _drawn(visualizer: Visualizer, raw: Tensor, sample: BaseDataElement) -> Image:
    """Return an image with what was predicted on it."""
    image = _as_loaded(raw, sample)
    factor = max(1.0, SMALLEST / max(image.shape[:2]))
    if factor > 1:
        image = mmcv.imrescale(image, factor)
    if "pred_label" in sample and hasattr(visualizer, "visualize_cls"):
        return np.asarray(visualizer.visualize_cls(image, sample, draw_gt=True), np.uint8)
    visualizer.add_datasample(
        "prediction", image, _scaled(sample, factor, image.shape[:2]), draw_gt=False, draw_pred=True, show=False
    )
    return np.asarray(visualizer.get_image(), np.uint8)


def raw_image(raw: Tensor) -> Image:
    """Return what a toolbox collates, ``(channels, height, width)`` from 0 to 255, as an image."""
    pixels = raw.detach().cpu().float().permute(1, 2, 0).numpy().clip(0, 255).astype(np.uint8)
    # Toolboxes load blue, green and red.
    return np.ascontiguousarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., ::-1])


def _as_loaded(raw: Tensor, sample: BaseDataElement) -> Image:
    """Return the image of a sample before it was resized and padded, from what the network is given of it."""
    pixels = raw_image(raw)
    padding = sample.get("pad_param")
    if padding is not None:
        top, bottom, left, right = (round(float(each)) for each in padding)
        pixels = pixels[top : pixels.shape[0] - bottom, left : pixels.shape[1] - right]
    elif sample.get("img_shape"):
        pixels = pixels[: sample.img_shape[0], : sample.img_shape[1]]
    height, width = (sample.get("ori_shape") or pixels.shape)[:2]
    return np.ascontiguousarray(mmcv.imresize(pixels, (width, height)))


def _scaled(sample: BaseDataElement, factor: float, size: tuple[int, ...]) -> BaseDataElement:
    """Return a prediction for an image that is drawn larger."""
    if factor == 1:
        return sample
    shown = sample.clone()
    instances = shown.get("pred_instances")
    if instances is not None:
        if "bboxes" in instances:
            instances.bboxes = instances.bboxes * factor
        if "masks" in instances and len(instances.masks):
            instances.masks = _at_size(instances.masks, size)
    if shown.get("pred_sem_seg") is not None:
        # Such data refuses another size in its place.
        shown.pred_sem_seg = type(shown.pred_sem_seg)(data=_at_size(shown.pred_sem_seg.data, size))
    return shown


def _at_size(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return maps of labels, ``(maps, height, width)``, at another size."""
    return interpolate(maps[None].float(), size=size, mode="nearest")[0].to(maps.dtype)
