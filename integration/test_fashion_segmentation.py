"""Label maps of fashion scenes: the masks of the scenes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mmseg.registry import TRANSFORMS
from PIL import Image

from integration.fashion.items import CLASSES, load_items
from integration.fashion.label_maps import LABEL_MAPS_FOLDER, LABELS, label_map, write_label_maps
from integration.fashion.scenes import encode_rle, make_scene, scene_folder, write_coco
from integration.fashion.segmentation_dataset import FashionSegmentationDataset


def test_label_maps_are_the_masks_of_the_scenes(tmp_path: Path) -> None:
    folder = write_label_maps(write_coco(tmp_path / "scenes", "test", 6, source="subset"))
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "scenes" / "images").iterdir())
    items = load_items("test", "subset")
    for index, name in enumerate(names):
        scene = make_scene(items, 0, index)
        wanted = ((scene.labels + 1)[:, None, None] * scene.masks).sum(axis=0)
        written = np.asarray(Image.open(folder / name))
        assert written.dtype == np.uint8
        np.testing.assert_array_equal(written, wanted)


def test_every_class_has_a_number_and_a_name() -> None:
    mask = np.zeros((4, 6), dtype=np.bool_)
    mask[1:3, 2:5] = True
    for category, name in enumerate(CLASSES, start=1):
        pixels = label_map(
            [{"category_id": category, "segmentation": {"size": [4, 6], "counts": encode_rle(mask)}}], (4, 6)
        )
        assert {LABELS[value] for value in np.unique(pixels)} == {"background", name}
        np.testing.assert_array_equal(pixels == category, mask)
    assert not label_map([], (4, 6)).any()


def test_label_maps_are_reused(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "scenes", "val", 2, source="subset")
    folder = write_label_maps(annotations)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_label_maps(annotations) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_failed_writing_leaves_no_label_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = write_coco(tmp_path / "scenes", "val", 2, source="subset")
    before = sorted(annotations.parent.iterdir())

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("integration.fashion.label_maps.Image.Image.save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_label_maps(annotations)
    assert sorted(annotations.parent.iterdir()) == before


def test_data_set_gives_image_and_label_map_of_one_scene(tmp_path: Path) -> None:
    pipeline = [TRANSFORMS.build({"type": name}) for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")]
    scenes = FashionSegmentationDataset(
        split="test", source="subset", count=4, data_root=str(tmp_path), pipeline=pipeline, test_mode=True
    )
    assert len(scenes) == 4
    assert scenes.metainfo["classes"] == LABELS
    assert [path.name for path in tmp_path.iterdir()] == [scene_folder("test", "subset", 4)]
    assert (tmp_path / scene_folder("test", "subset", 4) / LABEL_MAPS_FOLDER).is_dir()
    items = load_items("test", "subset")
    for index in range(4):
        scene = make_scene(items, 0, index)
        sample = scenes[index]
        # OpenCV reads channels the other way round.
        np.testing.assert_array_equal(sample["inputs"].numpy(), scene.image[..., ::-1].transpose(2, 0, 1))
        labels = sample["data_samples"].gt_sem_seg.data.numpy()
        assert labels.shape == (1, 128, 128)
        np.testing.assert_array_equal(labels[0], ((scene.labels + 1)[:, None, None] * scene.masks).sum(axis=0))
