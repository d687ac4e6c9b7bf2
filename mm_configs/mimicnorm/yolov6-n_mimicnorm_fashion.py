"""The narrow YOLOv6-n of the fashion scenes, trained without batch norm but for those in front of its predictions."""

_base_ = "../fashion/yolov6-n_fashion.py"

custom_imports = dict(imports=["integration.fashion", "repapq_plugin.hosts.openmmlab"], allow_failed_imports=False)

custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type="MimicNormHook",
        # mmyolo's RepVGG blocks make their norms without asking norm_cfg.
        convert=True,
        example_shape=(3, 128, 128),
        # Behind what the prediction layers read: boxes and scores keep their scale and their starting bias.
        last=[f"bbox_head.head_module.{branch}_convs.{level}.conv" for branch in ("cls", "reg") for level in range(3)],
    ),
]
