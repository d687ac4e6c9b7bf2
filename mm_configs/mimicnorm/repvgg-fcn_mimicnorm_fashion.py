"""The RepVGG with a fully convolutional head, trained without batch norm but for one behind its last layer."""

_base_ = "../fashion/repvgg-fcn_fashion.py"

custom_imports = dict(
    imports=["integration.fashion", "mmpretrain.models", "repapq_plugin.hosts.openmmlab"], allow_failed_imports=False
)

norm_cfg = dict(type="MimicNorm")
model = dict(backbone=dict(norm_cfg=norm_cfg), decode_head=dict(norm_cfg=norm_cfg))

custom_hooks = [dict(type="MimicNormHook", example_shape=(3, 128, 128))]
