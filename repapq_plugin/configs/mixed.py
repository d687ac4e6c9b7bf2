"""Mixed precision: 4-bit weights, 8-bit activations; first and last layers 8 bit throughout.

Weights are nearly all of a network's size, and calibration learns them; activations carry the outliers of
merged branches, and nothing but their range can be learned. So the bits go where they are needed most.
"""

runner_type = "repapq_plugin.hosts.openmmlab.RepAPQRunner"
repapq = {
    # Preset and any key of RepAPQConfig.
    "quantizer": {"preset": "w4a8"},
    # None: calib_dataloader if the config has one, else the training set with the test pipeline.
    "calibration": {"dataloader": None, "num_samples": 512},
    # What runs the network while it is scored: simulated, onnxruntime, openvino.
    "backend": "simulated",
    # Any of onnx, openvino.
    "export": [],
}
