"""6-bit weights and activations."""

runner_type = "repapq_plugin.hosts.openmmlab.RepAPQRunner"
repapq = {
    # Preset and any key of RepAPQConfig.
    "quantizer": {"preset": "w6a6"},
    # None: calib_dataloader if the config has one, else the training set with the test pipeline.
    "calibration": {"dataloader": None, "num_samples": 512},
    # What runs the network while it is scored: simulated, onnxruntime, openvino.
    "backend": "simulated",
    # Any of onnx, openvino.
    "export": [],
}
