"""ShuffleNetV2 for ImageNet, trained without batch norm by the recipe of MimicNorm's authors."""

_base_ = "./shufflenet-v2-1x_mimicnorm_16xb64_in1k.py"

custom_hooks = [dict(type="MimicNormHook", recipe="authors")]

# Their rate is 0.1 for batches of 256; weight decay acts on all parameters, and momentum does not look ahead.
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.4, momentum=0.9, weight_decay=1e-4, nesterov=False), paramwise_cfg=None
)
