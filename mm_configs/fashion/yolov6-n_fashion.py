"""A narrow YOLOv6-n on fashion scenes of 128 x 128 pixels, trained with all its branches."""

_base_ = ["mmyolo::yolov6/yolov6_n_syncbn_fast_8xb32-400e_coco.py", "./_data_/fashion_scenes.py"]

custom_imports = dict(imports=["integration.fashion"], allow_failed_imports=False)

# ---- model: half the width of YOLOv6-n, ten classes ----
widen_factor = 0.125
num_classes = 10
max_epochs = 12
initial_epoch = 1

model = dict(
    use_syncbn=False,
    backbone=dict(widen_factor=widen_factor),
    neck=dict(widen_factor=widen_factor),
    bbox_head=dict(head_module=dict(widen_factor=widen_factor, num_classes=num_classes)),
    train_cfg=dict(
        initial_epoch=initial_epoch,
        initial_assigner=dict(num_classes=num_classes),
        assigner=dict(num_classes=num_classes),
    ),
    # An image of this size has 336 cells and at most 4 items.
    test_cfg=dict(nms_pre=1000, max_per_img=100),
)

# ---- data ----
dataset_type = "FashionScenesDataset"

train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="YOLOv5RandomAffine",
        max_rotate_degree=0.0,
        max_translate_ratio=0.1,
        scaling_ratio_range=(0.8, 1.2),
        max_shear_degree=0.0,
        border_val=(114, 114, 114),
    ),
    dict(type="mmdet.RandomFlip", prob=0.5),
    dict(
        type="mmdet.PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "flip", "flip_direction")
    ),
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="YOLOv5KeepRatioResize", scale=_base_.scene_size),
    dict(type="LetterResize", scale=_base_.scene_size, allow_scale_up=False, pad_val=dict(img=114)),
    dict(type="LoadAnnotations", with_bbox=True, _scope_="mmdet"),
    dict(
        type="mmdet.PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "pad_param"),
    ),
]

train_dataloader = dict(
    _delete_=True,
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    collate_fn=dict(type="yolov5_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        filter_cfg=dict(filter_empty_gt=False, min_size=32),
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
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=20.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", T_max=max_epochs, eta_min_ratio=0.01, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs, val_interval=2, dynamic_intervals=[(max_epochs - 2, 1)])
default_hooks = dict(
    logger=dict(interval=25),
    param_scheduler=dict(_delete_=True, type="ParamSchedulerHook"),
    checkpoint=dict(interval=1, max_keep_ckpts=2, save_best="auto"),
)
custom_hooks = [
    # A short training needs a faster average than the base config's 400 epochs.
    dict(
        type="EMAHook",
        ema_type="ExpMomentumEMA",
        momentum=0.001,
        gamma=500,
        update_buffers=True,
        strict_load=False,
        priority=49,
    ),
]
randomness = dict(seed=0)
