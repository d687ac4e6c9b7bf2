"""RepVGG of 13 blocks (widths 24, 48, 96) with a fully convolutional head, every pixel of a fashion scene a class."""

_base_ = "./_data_/fashion_segmentation.py"

model = dict(
    type="EncoderDecoder",
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        type="mmpretrain.RepVGG",
        arch=dict(
            # No fourth stage: the third one, at 8 x 8 cells, sees the whole scene.
            num_blocks=[2, 4, 6, 0],
            # Of 64, 128 and 256 channels.
            width_factor=[0.375, 0.375, 0.375, 0.375],
            group_layer_map=None,
            se_cfg=None,
            stem_channels=16,
        ),
        out_indices=(0, 1, 2),
    ),
    # Three levels in one tensor at a quarter of the image's size, from which two layers decide for each cell.
    decode_head=dict(
        type="FCNHead",
        in_channels=[24, 48, 96],
        in_index=[0, 1, 2],
        input_transform="resize_concat",
        channels=48,
        kernel_size=1,
        num_convs=2,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=dict(type="BN"),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
