"""FCN on a RepVGG-A0 of mmpretrain, at an eighth of the image's size, trained with all its branches."""

_base_ = "mmseg::fcn/fcn_r50-d8_4xb2-80k_cityscapes-512x1024.py"

custom_imports = dict(imports=["mmpretrain.models"], allow_failed_imports=False)

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="mmpretrain.RepVGG",
        arch="A0",
        # Stem and first stage halve the image twice, the second stage once more; the others see further instead.
        strides=(2, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        norm_cfg=norm_cfg,
        out_indices=(0, 1, 2, 3),
    ),
    decode_head=dict(in_channels=1280, channels=256),
    auxiliary_head=dict(in_channels=192, channels=64),
)
