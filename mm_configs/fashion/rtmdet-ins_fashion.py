"""RTMDet-Ins with a RepVGG of 11 blocks (widths 24, 48, 96) on fashion scenes of 128 x 128 pixels: boxes and masks."""

_base_ = 'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py'

custom_imports = dict(imports=['integration.fashion', 'mmpretrain.models'], allow_failed_imports=False)

# ---- model: a reparameterizable backbone, two levels, ten classes ----
num_classes = 10
channels = 48
max_epochs = 3
norm_cfg = dict(type='BN')

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.RepVGG',
        arch=dict(
            # No fourth stage: items of 34 to 67 pixels want cells of 8 and 16.
            num_blocks=[2, 4, 4, 0],
            # Of 64, 128 and 256 channels.
            width_factor=[0.375, 0.375, 0.375, 0.375],
            group_layer_map=None,
            se_cfg=None,
            stem_channels=16),
        out_indices=(1, 2)),
    neck=dict(in_channels=[48, 96], out_channels=channels, norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=num_classes,
        in_channels=channels,
        feat_channels=channels,
        norm_cfg=norm_cfg,
        anchor_generator=dict(strides=[8, 16])),
    # An image of this size has 320 cells and at most 4 items.
    test_cfg=dict(nms_pre=300, max_per_img=20))

# ---- data: every split has its own items; test and calibration use what ships with the repository ----
img_scale = (128, 128)
data_root = 'work_dirs/fashion_scenes'
dataset_type = 'mmyolo.FashionScenesDataset'

train_scenes = dict(type=dataset_type, data_root=data_root, split='train', source='full', count=12000)
val_scenes = dict(type=dataset_type, data_root=data_root, split='val', source='full', count=500)
test_scenes = dict(type=dataset_type, data_root=data_root, split='test', source='subset', count=300)
calib_scenes = dict(type=dataset_type, data_root=data_root, split='train', source='subset', count=512)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    # Changes nothing but notes the scale factor, which masks are brought back to the image by.
    dict(type='Resize', scale=img_scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

train_dataloader = dict(
    _delete_=True,
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(filter_cfg=dict(filter_empty_gt=True, min_size=32), pipeline=train_pipeline, **train_scenes))
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
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=20.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min_ratio=0.01, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=max_epochs, val_interval=1, dynamic_intervals=None)
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=1, max_keep_ckpts=2))
custom_hooks = [
    # A short training needs a faster average than the base config's 300 epochs.
    dict(
        type='EMAHook',
        ema_type='ExpMomentumEMA',
        momentum=0.001,
        gamma=500,
        update_buffers=True,
        priority=49),
]
randomness = dict(seed=0)
