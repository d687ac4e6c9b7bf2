"""Faster R-CNN with FPN on a RepVGG-A0 of mmpretrain, trained with all its branches."""

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

custom_imports = dict(imports=["mmpretrain.models"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmpretrain.RepVGG",
        arch="A0",
        # A detection batch is small: the statistics stay those of the pretraining.
        norm_eval=True,
        frozen_stages=0,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[48, 96, 192, 1280]),
)
