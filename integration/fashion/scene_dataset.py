"""Fashion scenes for mmyolo (and, through its base class, mmdet)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmyolo.datasets import YOLOv5CocoDataset
from mmyolo.registry import DATASETS

from integration.fashion.items import CLASSES, load_items
from integration.fashion.scenes import IMAGES_FOLDER, scene_folder, write_coco

_PALETTE = [
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (127, 127, 127),
    (188, 189, 34),
    (23, 190, 207),
]


@DATASETS.register_module(force=True)
class FashionScenesDataset(YOLOv5CocoDataset):  # type: ignore[misc]
    """A COCO data set of fashion scenes that makes its images and annotations on first use.

    They lie in ``data_root`` in a folder that :func:`integration.fashion.scenes.scene_folder` names, so that a
    ``CocoMetric`` of the same config finds ``annotations.json`` there.

    Args:
        split: ``'train'``, ``'val'`` or ``'test'``; items of different splits never mix.
        source: ``'full'``, ``'subset'`` (the items that ship with the repository) or ``'auto'``.
        count: Number of scenes.
        seed: Which series of scenes.
        size: Side of the images in pixels.
        data_root: Cache folder; a relative one counts from the working directory.
        root: Folder of the full Fashion-MNIST.
        **kwargs: ``pipeline``, ``test_mode``, ``batch_shapes_cfg``, ... of mmyolo's base class.
    """

    METAINFO = {"classes": CLASSES, "palette": _PALETTE}

    def __init__(
        self,
        split: str,
        source: str = "auto",
        count: int = 300,
        seed: int = 0,
        size: int = 128,
        data_root: str = "work_dirs/fashion_scenes",
        root: str | None = None,
        **kwargs: Any,
    ) -> None:
        used = load_items(split, source, root).source
        folder = Path(data_root) / scene_folder(split, used, count, seed, size)
        annotations = write_coco(folder, split, count, source=used, seed=seed, size=size, root=root)
        super().__init__(
            data_root=str(folder), ann_file=annotations.name, data_prefix={"img": f"{IMAGES_FOLDER}/"}, **kwargs
        )
