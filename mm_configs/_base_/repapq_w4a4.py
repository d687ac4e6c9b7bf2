"""RepAPQ with 4-bit weights and activations: one more `_base_` beside any config of any toolbox.

Only these two keys, so that no other `_base_` file can collide with them.
"""

runner_type = 'repapq_plugin.hosts.openmmlab.RepAPQRunner'
repapq = dict(
    # preset and any key of RepAPQConfig
    quantizer=dict(preset='w4a4'),
    # None: calib_dataloader if the config has one, else the training set with the test pipeline
    calibration=dict(dataloader=None, num_samples=512),
    # what runs the network while it is scored: simulated, onnxruntime, openvino
    backend='simulated',
    # any of onnx, openvino
    export=[])
