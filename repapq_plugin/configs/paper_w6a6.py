"""6-bit weights and activations, with the paper's own settings where this package's differ (`RepAPQConfig.paper`)."""

runner_type = "repapq_plugin.hosts.openmmlab.RepAPQRunner"
repapq = {"quantizer": {"preset": "paper-w6a6"}, "calibration": {}}
