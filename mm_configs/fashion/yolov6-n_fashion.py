"""A narrow YOLOv6-n on fashion scenes of 128 x 128 pixels, trained with all its branches."""

_base_ = 'mmyolo::yolov6/yolov6_n_syncbn_fast_8xb32-400e_coco.py'

custom_imports = dict(imports=['integration.fashion'], allow_failed_imports=False)

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
        assigner=dict(num_classes=num_classes)),
    # An image of this size has 336 cells and at most 4 items.
    test_cfg=dict(nms_pre=1000, max_per_img=100))

# ---- data: every split has its own items; test and calibration use what ships with the repository ----
img_scale = (128, 128)
data_root = 'work_dirs/fashion_scenes'
dataset_type = 'FashionScenesDataset'

train_scenes = dict(type=dataset_type, data_root=data_root, split='train', source='full', count=12000)
val_scenes = dict(type=dataset_type, data_root=data_root, split='val', source='full', count=500)
test_scenes = dict(type=dataset_type, data_root=data_root, split='test', source='subset', count=300)
calib_scenes = dict(type=dataset_type, data_root=data_root, split='train', source='subset', count=512)

train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='YOLOv5RandomAffine',
        max_rotate_degree=0.0,
        max_translate_ratio=0.1,
        scaling_ratio_range=(0.8, 1.2),
        max_shear_degree=0.0,
        border_val=(114, 114, 114)),
    dict(type='mmdet.RandomFlip', prob=0.5),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'flip', 'flip_direction')),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='YOLOv5KeepRatioResize', scale=img_scale),
    dict(type='LetterResize', scale=img_scale, allow_scale_up=False, pad_val=dict(img=114)),
    dict(type='LoadAnnotations', with_bbox=True, _scope_='mmdet'),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'pad_param')),
]

train_dataloader = dict(
    _delete_=True,
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    collate_fn=dict(type='yolov5_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(filter_cfg=dict(filter_empty_gt=False, min_size=32), pipeline=train_pipeline, **train_scenes))
plain_loader = dict(
    num_workers=0,
    persistent_workers=False,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False))
val_dataloader = dict(
    _delete_=True,
    batch_size=50,
    dataset=dict(test_mode=True, pipeline=test_pipeline, **val_scenes),
    **plain_loader)
test_dataloader = dict(
    _delete_=True,
    batch_size=50,
    dataset=dict(test_mode=True, pipeline=test_pipeline, **test_scenes),
    **plain_loader)
# What a calibration sees: training items without augmentation.
calib_dataloader = dict(
    batch_size=16, dataset=dict(test_mode=True, pipeline=test_pipeline, **calib_scenes), **plain_loader)

val_evaluator = dict(ann_file=f'{data_root}/val-full-500-seed0-128px/annotations.json')
test_evaluator = dict(ann_file=f'{data_root}/test-subset-300-seed0-128px/annotations.json')

# ---- schedule ----
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=20.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min_ratio=0.01, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs, val_interval=2, dynamic_intervals=[(max_epochs - 2, 1)])
default_hooks = dict(
    logger=dict(interval=25),
    param_scheduler=dict(_delete_=True, type='ParamSchedulerHook'),
    checkpoint=dict(interval=1, max_keep_ckpts=2, save_best='auto'))
custom_hooks = [
    # A short training needs a faster average than the base config's 400 epochs.
    dict(
        type='EMAHook',
        ema_type='ExpMomentumEMA',
        momentum=0.001,
        gamma=500,
        update_buffers=True,
        strict_load=False,
        priority=49),
]
randomness = dict(seed=0)
