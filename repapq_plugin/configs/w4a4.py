"""4-bit weights and activations; first and last layers 8 bit."""

runner_type = "repapq_plugin.hosts.openmmlab.RepAPQRunner"
repapq = {"quantizer": {"preset": "w4a4"}, "calibration": {}}
