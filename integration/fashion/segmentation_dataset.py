"""Fashion scenes for mmseg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from integration.fashion.items import load_items
from integration.fashion.label_maps import LABEL_MAPS_FOLDER, LABELS, write_label_maps
from integration.fashion.scenes import IMAGES_FOLDER, scene_folder, write_coco


@DATASETS.register_module(force=True)
class FashionSegmentationDataset(BaseSegDataset):  # type: ignore[misc]
    """Fashion scenes with a class for every pixel, made on first use.

    The scenes are those that ``FashionScenesDataset`` makes of the same arguments, in the same folder.

    Args:
        split: ``'train'``, ``'val'`` or ``'test'``; items of different splits never mix.
        source: ``'full'``, ``'subset'`` (the items that ship with the repository) or ``'auto'``.
        count: Number of scenes.
        seed: Which series of scenes.
        size: Side of the images in pixels.
        data_root: Cache folder; a relative one counts from the working directory.
        root: Folder of the full Fashion-MNIST.
        **kwargs: ``pipeline``, ``test_mode``, ``indices``, ... of mmseg's base class.
    """

    METAINFO = {"classes": LABELS}

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
        write_label_maps(write_coco(folder, split, count, source=used, seed=seed, size=size, root=root))
        super().__init__(
            data_root=str(folder),
            data_prefix={"img_path": IMAGES_FOLDER, "seg_map_path": LABEL_MAPS_FOLDER},
            img_suffix=".png",
            **kwargs,
        )
