"""Fashion scenes of 128 x 128 pixels for segmentors: loaders, metric, runtime and schedule."""

_base_ = "./fashion_scenes.py"

default_scope = "mmseg"
custom_imports = dict(imports=["integration.fashion", "mmpretrain.models"], allow_failed_imports=False)

max_epochs = 3

# ---- data ----
dataset_type = "FashionSegmentationDataset"

data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    size=_base_.scene_size,
    pad_val=0,
    seg_pad_val=255,
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]

train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(pipeline=train_pipeline, type=dataset_type, **_base_.train_scenes),
)
val_dataloader = dict(
    batch_size=50,
    dataset=dict(test_mode=True, pipeline=test_pipeline, type=dataset_type, **_base_.val_scenes),
    **_base_.plain_loader,
)
test_dataloader = dict(
    batch_size=50,
    dataset=dict(test_mode=True, pipeline=test_pipeline, type=dataset_type, **_base_.test_scenes),
    **_base_.plain_loader,
)
calib_dataloader = dict(
    batch_size=16,
    dataset=dict(test_mode=True, pipeline=test_pipeline, type=dataset_type, **_base_.calib_scenes),
    **_base_.plain_loader,
)

val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

# ---- schedule ----
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", T_max=max_epochs, eta_min=0.0, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
log_processor = dict(by_epoch=True)
env_cfg = dict(
    cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="gloo")
)
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer")
log_level = "INFO"
load_from = None
resume = False
randomness = dict(seed=0)
