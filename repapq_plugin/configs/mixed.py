"""Mixed precision: 4-bit weights, 8-bit activations; first and last layers 8 bit throughout.

Weights are nearly all of a network's size, and calibration learns them. Activations carry the outliers of merged
branches, and nothing but their range can be learned. So the bits go where they are needed most.
"""

runner_type = "repapq_plugin.hosts.openmmlab.RepAPQRunner"
repapq = {"quantizer": {"preset": "w4a8"}, "calibration": {}}
