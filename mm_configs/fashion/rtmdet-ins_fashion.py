"""RTMDet-Ins with a RepVGG of 11 blocks (widths 24, 48, 96) on fashion scenes of 128 x 128 pixels: boxes and masks."""

_base_ = ["mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py", "./_data_/fashion_scenes.py"]

custom_imports = dict(imports=["integration.fashion", "mmpretrain.models"], allow_failed_imports=False)

# ---- model: a reparameterizable backbone, two levels, ten classes ----
num_classes = 10
channels = 48
max_epochs = 3
norm_cfg = dict(type="BN")

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmpretrain.RepVGG",
        arch=dict(
            # No fourth stage: items of 34 to 67 pixels want cells of 8 and 16.
            num_blocks=[2, 4, 4, 0],
            # Of 64, 128 and 256 channels.
            width_factor=[0.375, 0.375, 0.375, 0.375],
            group_layer_map=None,
            se_cfg=None,
            stem_channels=16,
        ),
        out_indices=(1, 2),
    ),
    neck=dict(in_channels=[48, 96], out_channels=channels, norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=num_classes,
        in_channels=channels,
        feat_channels=channels,
        norm_cfg=norm_cfg,
        anchor_generator=dict(strides=[8, 16]),
    ),
    # An image of this size has 320 cells and at most 4 items.
    test_cfg=dict(nms_pre=300, max_per_img=20),
)

# ---- data ----
dataset_type = "mmyolo.FashionScenesDataset"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    # Changes nothing but notes the scale factor, which masks are brought back to the image by.
    dict(type="Resize", scale=_base_.scene_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]

train_dataloader = dict(
    _delete_=True,
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
        type=dataset_type,
        **_base_.train_scenes,
    ),
)
val_dataloader = dict(
    _delete_=True,
    batch_size=50,
    dataset=dict(test_mode=True, pipeline=test_pipeline, type=dataset_type, **_base_.val_scenes),
    **_base_.plain_loader,
)
test_dataloader = dict(
    _delete_=True,
    batch_size=50,
    dataset=dict(test_mode=True, pipeline=test_pipeline, type=dataset_type, **_base_.test_scenes),
    **_base_.plain_loader,
)
calib_dataloader = dict(
    batch_size=16,
    dataset=dict(test_mode=True, pipeline=test_pipeline, type=dataset_type, **_base_.calib_scenes),
    **_base_.plain_loader,
)

val_evaluator = dict(ann_file=_base_.val_annotations)
test_evaluator = dict(ann_file=_base_.test_annotations)

# ---- schedule ----
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=20.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", T_max=max_epochs, eta_min_ratio=0.01, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs, val_interval=1, dynamic_intervals=None)
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=1, max_keep_ckpts=2))
custom_hooks = [
    # A short training needs a faster average than the base config's 300 epochs.
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.001, gamma=500, update_buffers=True, priority=49),
]
randomness = dict(seed=0)
