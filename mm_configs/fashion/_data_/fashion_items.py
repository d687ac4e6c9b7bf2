"""Fashion-MNIST for the classifiers: loaders, metric, runtime and schedule."""

_base_ = "mmpretrain::_base_/default_runtime.py"

custom_imports = dict(imports=["integration.fashion"], allow_failed_imports=False)

max_epochs = 8
batch_size = 128

data_preprocessor = dict(num_classes=10, mean=[73.0], std=[90.0], to_rgb=False)

train_pipeline = [
    dict(type="RandomCrop", crop_size=28, padding=1),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [dict(type="PackInputs")]

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="FashionItemsDataset", split="train", source="full", pipeline=train_pipeline),
)
plain_loader = dict(
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
val_dataloader = dict(
    batch_size=250,
    dataset=dict(type="FashionItemsDataset", split="val", source="full", pipeline=test_pipeline, test_mode=True),
    **plain_loader,
)
test_dataloader = dict(
    batch_size=250,
    dataset=dict(type="FashionItemsDataset", split="test", source="subset", pipeline=test_pipeline, test_mode=True),
    **plain_loader,
)
# What a calibration sees: training items without augmentation.
calib_dataloader = dict(
    batch_size=32,
    dataset=dict(
        type="FashionItemsDataset", split="train", source="subset", count=512, pipeline=test_pipeline, test_mode=True
    ),
    **plain_loader,
)

val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=400),
    dict(type="CosineAnnealingLR", T_max=max_epochs, eta_min=0.0, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
