"""ResNet-18 for CIFAR-10, trained without batch norm but for one behind its last layer."""

_base_ = "mmpretrain::resnet/resnet18_8xb16_cifar10.py"

custom_imports = dict(imports=["repapq_plugin.hosts.openmmlab"], allow_failed_imports=False)

model = dict(backbone=dict(norm_cfg=dict(type="MimicNorm")))

custom_hooks = [dict(type="MimicNormHook", example_shape=(3, 32, 32))]
