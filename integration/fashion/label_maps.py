"""Label maps of fashion scenes: one class number a pixel, for semantic segmentation."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from integration.fashion.items import CLASSES, UInt8Array
from integration.fashion.scenes import decode_rle

LABEL_MAPS_FOLDER = "label_maps"
LABELS = ("background", *CLASSES)
"""What the numbers of a label map mean; an item's is its COCO ``category_id``."""


def write_label_maps(annotations: str | Path) -> Path:
    """Write the label maps of a set of scenes beside its images, or reuse those that are there.

    The folder appears whole or not at all, like the scenes themselves.

    Args:
        annotations: What :func:`integration.fashion.scenes.write_coco` returned.

    Returns:
        Folder of 8-bit PNG files, named as the images are; values index :data:`LABELS`.
    """
    annotations = Path(annotations)
    folder = annotations.parent / LABEL_MAPS_FOLDER
    if folder.exists():
        return folder
    coco = json.loads(annotations.read_text())
    items: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for item in coco["annotations"]:
        items[item["image_id"]].append(item)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for image in coco["images"]:
            pixels = label_map(items[image["id"]], (image["height"], image["width"]))
            Image.fromarray(pixels).save(draft / image["file_name"], compress_level=1)
        draft.chmod(0o755)  # mkdtemp's folders are private
        try:
            draft.rename(folder)
        except OSError:
            # Another process was faster; it wrote the same scenes.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def label_map(items: list[dict[str, Any]], size: tuple[int, int]) -> UInt8Array:
    """Class number of each pixel, uint8, shape ``size`` (height, width), from the COCO annotations of one image."""
    pixels = np.zeros(size, dtype=np.uint8)
    for item in items:
        mask = item["segmentation"]
        pixels[decode_rle(mask["counts"], tuple(mask["size"]))] = item["category_id"]
    return pixels
