"""MobileOne of 17 blocks (widths 32, 96, 192) on Fashion-MNIST, trained with all its branches."""

_base_ = "./_data_/fashion_items.py"

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="MobileOne",
        arch=dict(
            # No fourth stage: MobileOne halves the image at every one, and 28 pixels do not last so long.
            num_blocks=[2, 3, 3, 0],
            # Of 64, 128 and 256 channels.
            width_factor=[0.5, 0.75, 0.75, 0.75],
            num_conv_branches=[2, 2, 2, 2],
            num_se_blocks=[0, 0, 0, 0],
        ),
        in_channels=1,
        out_indices=(3,),
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=10,
        in_channels=192,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.05, mode="original"),
        topk=(1,),
    ),
)

# Stem and three stages halve the image four times: 40 pixels become 20, 10, 5 and 3.
resize = dict(type="Resize", scale=(40, 40), interpolation="bilinear")
train_pipeline = [_base_.train_pipeline[0], resize, *_base_.train_pipeline[1:]]
test_pipeline = [resize, *_base_.test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
calib_dataloader = dict(dataset=dict(pipeline=test_pipeline))

max_epochs = 16
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [_base_.param_scheduler[0], {**_base_.param_scheduler[1], "T_max": max_epochs}]
