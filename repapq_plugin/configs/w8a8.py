"""8-bit weights and activations."""

runner_type = "repapq_plugin.hosts.openmmlab.RepAPQRunner"
repapq = {"quantizer": {"preset": "w8a8"}, "calibration": {}}
