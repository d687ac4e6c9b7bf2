"""RepVGG of 13 blocks (widths 24, 48, 96, 192) on Fashion-MNIST, trained with all its branches."""

_base_ = "./_data_/fashion_items.py"

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="RepVGG",
        arch=dict(
            num_blocks=[2, 4, 5, 1],
            # Of 64, 128, 256 and 512 channels.
            width_factor=[0.375, 0.375, 0.375, 0.375],
            group_layer_map=None,
            se_cfg=None,
        ),
        in_channels=1,
        # The stem halves 28 pixels to 14; the stages run at 14, 7, 4 and 4.
        strides=(1, 2, 2, 1),
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
