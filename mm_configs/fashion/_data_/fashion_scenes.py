"""Splits of the fashion scenes of 128 x 128 pixels: every split has its own items.

Test and calibration use what ships with the repository.
"""

scene_size = (128, 128)
scenes_root = "work_dirs/fashion_scenes"

train_scenes = dict(data_root=scenes_root, split="train", source="full", count=12000)
val_scenes = dict(data_root=scenes_root, split="val", source="full", count=500)
test_scenes = dict(data_root=scenes_root, split="test", source="subset", count=300)
# What a calibration sees: training items without augmentation.
calib_scenes = dict(data_root=scenes_root, split="train", source="subset", count=512)

val_annotations = f"{scenes_root}/val-full-500-seed0-128px/annotations.json"
test_annotations = f"{scenes_root}/test-subset-300-seed0-128px/annotations.json"

plain_loader = dict(
    num_workers=0, persistent_workers=False, drop_last=False, sampler=dict(type="DefaultSampler", shuffle=False)
)
