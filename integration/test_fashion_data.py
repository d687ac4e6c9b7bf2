"""The shipped items and the scenes made of them: fixed, apart by split, annotated as they look."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from integration.fashion.items import (
    CLASSES,
    NUM_TRAIN,
    SPLITS,
    SUBSET_FILE,
    Items,
    find_full,
    load_items,
)
from integration.fashion.scenes import (
    ANNOTATIONS_FILE,
    IMAGES_FOLDER,
    decode_rle,
    encode_rle,
    make_scene,
    scene_folder,
    write_coco,
)
from repapq_plugin.errors import ConfigError

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module", params=SPLITS)
def items(request: pytest.FixtureRequest) -> Items:
    return load_items(request.param, "subset")


def test_subset_is_the_one_described(items: Items) -> None:
    described = json.loads(SUBSET_FILE.with_suffix(".json").read_text())[items.split]
    assert len(items) == described["count"]
    assert items.digest() == described["sha256"]
    assert items.images.dtype == np.uint8
    assert items.images.shape == (len(items), 28, 28)


def test_subset_equals_the_full_set(items: Items) -> None:
    # Where no full copy is installed, the digests of the shipped description stand in for it.
    if find_full() is None:
        described = json.loads(SUBSET_FILE.with_suffix(".json").read_text())[items.split]
        assert items.digest() == described["sha256"]
        return
    full = load_items(items.split, "full")
    positions = np.searchsorted(full.indices, items.indices)
    same = Items(items.split, "subset", full.images[positions], full.labels[positions], full.indices[positions])
    assert same.digest() == items.digest()


def test_subset_is_balanced(items: Items) -> None:
    counts = np.bincount(items.labels, minlength=len(CLASSES))
    assert counts.min() == counts.max() > 0


def test_splits_share_no_item() -> None:
    train, val, test = (load_items(split, "subset") for split in SPLITS)
    assert train.indices.max() < NUM_TRAIN <= val.indices.min()
    for one, other in ((train, val), (train, test), (val, test)):
        assert not {image.tobytes() for image in one.images} & {image.tobytes() for image in other.images}


def test_scene_depends_on_nothing_but_its_arguments(items: Items) -> None:
    later = make_scene(items, seed=3, index=7)
    for index in range(3):
        make_scene(items, seed=3, index=index)
    again = make_scene(items, seed=3, index=7)
    np.testing.assert_array_equal(later.image, again.image)
    np.testing.assert_array_equal(later.masks, again.masks)
    assert (make_scene(items, seed=4, index=7).image != later.image).any()
    assert (make_scene(items, seed=3, index=8).image != later.image).any()


def test_scenes_of_two_splits_differ() -> None:
    canvases = [make_scene(load_items(split, "subset"), 0, 0).image for split in SPLITS]
    assert (canvases[0] != canvases[1]).any()
    assert (canvases[1] != canvases[2]).any()


def test_boxes_are_the_extents_of_masks(items: Items) -> None:
    total = 0
    for index in range(20):
        scene = make_scene(items, seed=0, index=index)
        assert len(scene.boxes) == len(scene.masks) == len(scene.labels) == len(scene.indices)
        assert not (scene.masks.sum(axis=0) > 1).any()
        for (x, y, width, height), mask, label, item in zip(
            scene.boxes, scene.masks, scene.labels, scene.indices, strict=True
        ):
            rows, cols = np.nonzero(mask)
            assert (cols.min(), rows.min()) == (x, y)
            assert (cols.max() + 1, rows.max() + 1) == (x + width, y + height)
            assert items.labels[items.indices == item] == [label]
            total += 1
    assert total > 20


@pytest.mark.parametrize("fill", ["none", "all", "some", "first", "last"])
def test_run_lengths_return_the_mask(fill: str) -> None:
    mask = np.zeros((5, 7), dtype=np.bool_)
    if fill == "all":
        mask[:] = True
    elif fill == "some":
        mask[1:4, 2:6] = np.random.default_rng(0).integers(0, 2, (3, 4)) > 0
    elif fill == "first":
        mask[0, 0] = True
    elif fill == "last":
        mask[-1, -1] = True
    counts = encode_rle(mask)
    assert sum(counts) == mask.size
    np.testing.assert_array_equal(decode_rle(counts, (5, 7)), mask)


def test_run_lengths_are_those_of_coco() -> None:
    from pycocotools import mask as coco_mask

    scene = make_scene(load_items("test", "subset"), 0, 0)
    for mask in scene.masks:
        theirs = coco_mask.decode(coco_mask.frPyObjects({"size": [128, 128], "counts": encode_rle(mask)}, 128, 128))
        np.testing.assert_array_equal(theirs > 0, mask)


def test_written_set_is_what_was_made(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / scene_folder("test", "subset", 5)
    annotations = write_coco(folder, "test", 5, source="subset")
    assert annotations == folder / ANNOTATIONS_FILE
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    coco = json.loads(annotations.read_text())
    assert [category["name"] for category in coco["categories"]] == list(CLASSES)
    items = load_items("test", "subset")
    for index, entry in enumerate(coco["images"]):
        scene = make_scene(items, 0, index)
        written = np.asarray(Image.open(folder / IMAGES_FOLDER / entry["file_name"]))
        np.testing.assert_array_equal(written, scene.image)
        of_image = [a for a in coco["annotations"] if a["image_id"] == entry["id"]]
        assert [a["bbox"] for a in of_image] == scene.boxes.tolist()
        assert [a["category_id"] - 1 for a in of_image] == scene.labels.tolist()
        assert [a["area"] for a in of_image] == scene.masks.sum(axis=(1, 2)).tolist()


def test_written_set_is_reused_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    annotations = write_coco(folder, "val", 2, source="subset")
    before = annotations.stat().st_mtime_ns
    assert write_coco(folder, "val", 2, source="subset") == annotations
    assert annotations.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="other scenes"):
        write_coco(folder, "val", 3, source="subset")


def test_failed_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("integration.fashion.scenes.Image.Image.save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_coco(tmp_path / "scenes", "val", 2, source="subset")
    assert list(tmp_path.iterdir()) == []


def test_wrong_requests_say_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split='dev'.*train, val, test"):
        load_items("dev")
    with pytest.raises(ConfigError, match="source='web'.*auto, full, subset"):
        load_items("test", "web")
    with pytest.raises(ConfigError, match="REPAPQ_FASHION_MNIST"):
        load_items("test", "full", tmp_path)
    with pytest.raises(ConfigError, match="at least one"):
        write_coco(tmp_path / "scenes", "val", 0, source="subset")
    with pytest.raises(ConfigError, match="size=32"):
        make_scene(load_items("val", "subset"), 0, 0, size=32)


def test_missing_full_set_falls_back_to_the_subset(tmp_path: Path) -> None:
    assert load_items("test", "auto", tmp_path).source == "subset"


def test_environment_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    image = np.arange(28 * 28, dtype=np.uint32).reshape(1, 28, 28).astype(np.uint8)
    for stem in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + np.array(image.shape, dtype=">i4").tobytes()
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + image.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 9]))
    monkeypatch.setenv("REPAPQ_FASHION_MNIST", str(tmp_path))
    items = load_items("test", "full")
    np.testing.assert_array_equal(items.images, image)
    assert items.labels.tolist() == [9]


def test_broken_full_set_is_named(tmp_path: Path) -> None:
    for stem in ("train", "t10k"):
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(b"not an IDX file")
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(b"not an IDX file")
    with pytest.raises(ConfigError, match="t10k-images-idx3-ubyte is no IDX file"):
        load_items("test", "full", tmp_path)


def test_subset_stays_small() -> None:
    assert SUBSET_FILE.stat().st_size <= 2 * MEBIBYTE
