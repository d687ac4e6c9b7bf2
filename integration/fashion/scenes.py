"""Fashion scenes: items at random scale and position on plain or textured canvases, with boxes and masks.

A scene is a function of (items, seed, index, size) alone: it does not depend on which scenes were made before,
and all arithmetic is NumPy's element by element, so every machine makes the same pixels.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from integration.fashion.items import CLASSES, ITEM_SIZE, SPLITS, Items, UInt8Array, load_items
from repapq_plugin.errors import ConfigError

ANNOTATIONS_FILE = "annotations.json"
IMAGES_FOLDER = "images"

MAX_ITEMS = 4
SCALE_RANGE = (1.2, 2.4)
MAX_OVERLAP = 0.1  # of the smaller of two boxes
_PLACEMENT_TRIES = 20
_FOREGROUND = 24  # below it a pixel of the original photograph is background or its noise
_MIN_VISIBLE = 0.5  # an item hidden by more than this is taken out of the scene
_FORMAT = 1  # raise when the pixels or annotations of an unchanged set of parameters change

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scene:
    """One image and its annotations.

    Attributes:
        image: uint8 RGB, shape (size, size, 3).
        boxes: int64, shape (N, 4), pixels ``x, y, width, height``: the extent of each mask.
        masks: bool, shape (N, size, size), the visible part of each item.
        labels: int64, shape (N,).
        indices: int64, shape (N,), the items' positions in the original Fashion-MNIST file.
    """

    image: UInt8Array
    boxes: npt.NDArray[np.int64]
    masks: BoolArray
    labels: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]


def make_scene(items: Items, seed: int, index: int, size: int = 128) -> Scene:
    """Make one scene.

    Args:
        items: Where the items come from; its split is part of the random seed.
        seed: Which series of scenes.
        index: Which scene of the series.
        size: Side of the square image in pixels; large enough for the largest item (68 pixels).
    """
    largest = int(ITEM_SIZE * SCALE_RANGE[1]) + 1
    if size < largest:
        raise ConfigError(f"size={size} is too small for items of up to {largest} pixels; choose at least {largest}")
    rng = np.random.default_rng([SPLITS.index(items.split), seed, index])
    image = _canvas(rng, size)
    owner = np.full((size, size), -1, dtype=np.int64)
    extents: list[tuple[int, int, int, int]] = []
    areas: list[int] = []
    chosen: list[int] = []
    for _ in range(int(rng.integers(1, MAX_ITEMS + 1))):
        item = int(rng.integers(len(items)))
        side = round(ITEM_SIZE * float(rng.uniform(*SCALE_RANGE)))
        mirrored = bool(rng.integers(2))
        tint = rng.uniform(0.7, 1.0, size=3)
        pixels, mask = _enlarge(items.images[item], side, mirrored)
        rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            continue
        pixels = pixels[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        mask = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        place = _place(rng, mask.shape, extents, size)
        if place is None:
            continue
        x, y, width, height = place
        window = (slice(y, y + height), slice(x, x + width))
        image[window][mask] = pixels[mask][:, None] * tint
        owner[window][mask] = len(chosen)
        extents.append(place)
        areas.append(int(mask.sum()))
        chosen.append(item)
    masks = [owner == number for number in range(len(chosen))]
    kept = [n for n, mask in enumerate(masks) if mask.sum() >= _MIN_VISIBLE * areas[n]]
    picked = np.array([chosen[n] for n in kept], dtype=np.int64)
    return Scene(
        image=np.clip(np.rint(image), 0, 255).astype(np.uint8),
        boxes=np.array([_extent(masks[n]) for n in kept], dtype=np.int64).reshape(-1, 4),
        masks=np.array([masks[n] for n in kept], dtype=np.bool_).reshape(-1, size, size),
        labels=items.labels[picked],
        indices=items.indices[picked],
    )


def scene_folder(split: str, source: str, count: int, seed: int = 0, size: int = 128) -> str:
    """Name of the folder that a set of scenes has below a cache folder."""
    return f"{split}-{source}-{count}-seed{seed}-{size}px"


def write_coco(
    folder: str | Path,
    split: str,
    count: int,
    *,
    source: str = "auto",
    seed: int = 0,
    size: int = 128,
    root: str | Path | None = None,
) -> Path:
    """Write scenes as PNG images and a COCO annotation file, or reuse a folder that holds the same ones.

    The folder appears whole or not at all: everything is written beside it first and then renamed.

    Args:
        folder: Where the set shall be.
        split: ``'train'``, ``'val'`` or ``'test'``.
        count: Number of scenes.
        source: Items to use, see :func:`integration.fashion.items.load_items`.
        seed: Which series of scenes.
        size: Side of the images in pixels.
        root: Folder of the full Fashion-MNIST.

    Returns:
        Path of the annotation file; images lie in the folder ``images`` beside it.

    Raises:
        ConfigError: On a count below 1, or where the folder exists and holds something else.
    """
    folder = Path(folder)
    if count < 1:
        raise ConfigError(f"count={count} is not allowed; ask for at least one scene")
    items = load_items(split, source, root)
    parameters = {
        "format": _FORMAT,
        "split": split,
        "source": items.source,
        "count": count,
        "seed": seed,
        "size": size,
        "items": items.digest(),
    }
    annotations = folder / ANNOTATIONS_FILE
    if folder.exists():
        found = _parameters_of(annotations)
        if found != parameters:
            raise ConfigError(
                f"{folder} holds other scenes ({found}) than asked for ({parameters}); remove it or name another folder"
            )
        return annotations
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (draft / IMAGES_FOLDER).mkdir()
        coco = _write_scenes(draft / IMAGES_FOLDER, items, count, seed, size)
        (draft / ANNOTATIONS_FILE).write_text(json.dumps({"info": parameters, **coco}))
        draft.chmod(0o755)  # mkdtemp's folders are private
        try:
            draft.rename(folder)
        except OSError:
            # Another process was faster; its folder serves as well if it holds the same scenes.
            if _parameters_of(annotations) != parameters:
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return annotations


def _write_scenes(folder: Path, items: Items, count: int, seed: int, size: int) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = make_scene(items, seed, index, size)
        name = f"{index:06d}.png"
        Image.fromarray(scene.image).save(folder / name, compress_level=1)
        images.append({"id": index, "file_name": name, "width": size, "height": size})
        for box, mask, label, item in zip(scene.boxes, scene.masks, scene.labels, scene.indices, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": int(label) + 1,
                    "bbox": [int(value) for value in box],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [size, size], "counts": encode_rle(mask)},
                    "item": int(item),
                }
            )
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _parameters_of(annotations: Path) -> object:
    try:
        return json.loads(annotations.read_text())["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def encode_rle(mask: BoolArray) -> list[int]:
    """COCO's uncompressed run lengths of a mask: column by column, the first run is of background."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [not mask[-1, -1]]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(run) for run in np.diff(edges, prepend=0)]


def decode_rle(counts: list[int], size: tuple[int, int]) -> BoolArray:
    """Mask of shape ``size`` (height, width) from COCO's uncompressed run lengths."""
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size, order="F")


def _place(
    rng: np.random.Generator, shape: tuple[int, ...], taken: list[tuple[int, int, int, int]], size: int
) -> tuple[int, int, int, int] | None:
    """A place for a box of ``shape`` (height, width) that hardly overlaps those taken, or None."""
    height, width = shape[0], shape[1]
    for _ in range(_PLACEMENT_TRIES):
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        if all(_overlap((x, y, width, height), other) <= MAX_OVERLAP for other in taken):
            return x, y, width, height
    return None


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Area that two boxes share, as a part of the smaller one."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0) / min(one[2] * one[3], other[2] * other[3])


def _extent(mask: BoolArray) -> tuple[int, int, int, int]:
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(cols[0]), int(rows[0]), int(cols[-1] - cols[0] + 1), int(rows[-1] - rows[0] + 1)


def _canvas(rng: np.random.Generator, size: int) -> FloatArray:
    """Background of shape (size, size, 3), values 0 to 255: a colour, and mostly a texture on it."""
    colour = rng.uniform(20, 235, size=3)
    canvas = np.broadcast_to(colour, (size, size, 3)).copy()
    kind = int(rng.integers(4))
    amplitude = float(rng.uniform(8, 32))
    if kind == 1:  # clouds: coarse noise, enlarged
        canvas += _resize(rng.uniform(-amplitude, amplitude, size=(int(rng.integers(3, 10)),) * 2), size)[..., None]
    elif kind == 2:  # stripes or a chequered cloth
        period = int(rng.integers(4, 17))
        wave = np.where(np.arange(size) // period % 2 == 0, amplitude, -amplitude)
        canvas += (wave[:, None] if rng.integers(2) else wave[None, :] * np.sign(wave)[:, None])[..., None]
    elif kind == 3:  # a slope of light, and grain
        ramp = np.linspace(-amplitude, amplitude, size)
        canvas += (ramp[:, None] if rng.integers(2) else ramp[None, :])[..., None]
        canvas += rng.uniform(-amplitude / 2, amplitude / 2, size=(size, size, 1))
    return np.clip(canvas, 0, 255)


def _enlarge(image: UInt8Array, side: int, mirrored: bool) -> tuple[FloatArray, BoolArray]:
    """Item and its silhouette at ``side`` by ``side`` pixels."""
    silhouette = _silhouette(image.tobytes())
    if mirrored:
        image, silhouette = image[:, ::-1], silhouette[:, ::-1]
    return _resize(image.astype(np.float64), side), _resize(silhouette.astype(np.float64), side) >= 0.5


@lru_cache(maxsize=4096)
def _silhouette(raw: bytes) -> BoolArray:
    """Foreground of an item with its holes filled: all that background cannot reach from the border."""
    foreground = np.frombuffer(raw, dtype=np.uint8).reshape(ITEM_SIZE, ITEM_SIZE) >= _FOREGROUND
    free = np.pad(~foreground, 1, constant_values=True)
    reached = np.zeros_like(free)
    reached[0, 0] = True
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= free
        if np.array_equal(grown, reached):
            return ~reached[1:-1, 1:-1]
        reached = grown


def _resize(image: FloatArray, side: int) -> FloatArray:
    """Bilinear resize of a square image, pixel centres aligned as in image libraries, borders repeated."""
    length = image.shape[0]
    centre = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
    low = np.minimum(centre.astype(np.int64), length - 2)
    part = centre - low
    rows = image[low] * (1 - part)[:, None] + image[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part
