"""The RepVGG of the fashion items, trained without batch norm but for one behind its last layer."""

_base_ = "../fashion/repvgg_fashion.py"

custom_imports = dict(imports=["integration.fashion", "repapq_plugin.hosts.openmmlab"], allow_failed_imports=False)

model = dict(backbone=dict(norm_cfg=dict(type="MimicNorm")))

custom_hooks = [dict(type="MimicNormHook", example_shape=(1, 28, 28))]
