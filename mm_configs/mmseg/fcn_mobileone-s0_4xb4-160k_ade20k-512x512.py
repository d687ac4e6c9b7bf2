"""FCN on a MobileOne-S0 of mmpretrain, trained with all its branches."""

_base_ = "mmseg::fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py"

custom_imports = dict(imports=["mmpretrain.models"], allow_failed_imports=False)

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type="mmpretrain.MobileOne", arch="s0", norm_cfg=norm_cfg, out_indices=(0, 1, 2, 3)),
    # MobileOne has no dilations: a thirty-second of the image's size, joined with the sixteenth before it.
    decode_head=dict(in_channels=[256, 1024], in_index=[2, 3], input_transform="resize_concat", channels=256),
    auxiliary_head=dict(in_channels=256, channels=64),
)
