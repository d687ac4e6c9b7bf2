"""ResNet-18 for CIFAR-100, trained without batch norm but for one behind its last layer."""

_base_ = "mmpretrain::resnet/resnet50_8xb16_cifar100.py"

custom_imports = dict(imports=["repapq_plugin.hosts.openmmlab"], allow_failed_imports=False)

model = dict(backbone=dict(depth=18, norm_cfg=dict(type="MimicNorm")), head=dict(in_channels=512))

custom_hooks = [dict(type="MimicNormHook", example_shape=(3, 32, 32))]
