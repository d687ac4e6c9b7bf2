"""ResNet-50 for ImageNet, trained without batch norm but for one behind its last layer."""

_base_ = "mmpretrain::resnet/resnet50_8xb32_in1k.py"

custom_imports = dict(imports=["repapq_plugin.hosts.openmmlab"], allow_failed_imports=False)

model = dict(backbone=dict(norm_cfg=dict(type="MimicNorm")))

custom_hooks = [dict(type="MimicNormHook")]
