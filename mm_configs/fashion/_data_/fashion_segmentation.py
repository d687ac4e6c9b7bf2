"""Fashion scenes of 128 x 128 pixels for segmentors: loaders, metric, runtime and schedule."""

default_scope = 'mmseg'
custom_imports = dict(imports=['integration.fashion', 'mmpretrain.models'], allow_failed_imports=False)

max_epochs = 3

# ---- data: every split has its own items; test and calibration use what ships with the repository ----
img_scale = (128, 128)
data_root = 'work_dirs/fashion_scenes'
dataset_type = 'FashionSegmentationDataset'

train_scenes = dict(type=dataset_type, data_root=data_root, split='train', source='full', count=12000)
val_scenes = dict(type=dataset_type, data_root=data_root, split='val', source='full', count=500)
test_scenes = dict(type=dataset_type, data_root=data_root, split='test', source='subset', count=300)
calib_scenes = dict(type=dataset_type, data_root=data_root, split='train', source='subset', count=512)

data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    size=img_scale,
    pad_val=0,
    seg_pad_val=255)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]

train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(pipeline=train_pipeline, **train_scenes))
plain_loader = dict(
    num_workers=0,
    persistent_workers=False,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False))
val_dataloader = dict(
    batch_size=50, dataset=dict(test_mode=True, pipeline=test_pipeline, **val_scenes), **plain_loader)
test_dataloader = dict(
    batch_size=50, dataset=dict(test_mode=True, pipeline=test_pipeline, **test_scenes), **plain_loader)
# What a calibration sees: training items without augmentation.
calib_dataloader = dict(
    batch_size=16, dataset=dict(test_mode=True, pipeline=test_pipeline, **calib_scenes), **plain_loader)

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

# ---- schedule ----
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=0.0, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'))
log_processor = dict(by_epoch=True)
env_cfg = dict(
    cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0), dist_cfg=dict(backend='gloo'))
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=0)
