"""6-bit weights and activations."""

runner_type = "repapq_plugin.hosts.openmmlab.RepAPQRunner"
repapq = {"quantizer": {"preset": "w6a6"}, "calibration": {}}
