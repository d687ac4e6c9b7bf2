"""RepAPQ's settings as configs to import: one line beside whatever else a config says.

In an ordinary config, below its ``_base_``::

    from repapq_plugin.configs.w8a8 import *

In a config of mmengine's pure-Python kind, beside its other bases::

    with read_base():
        from repapq_plugin.configs.w8a8 import *

Each defines the two keys ``runner_type`` and ``repapq``, and nothing else, so that it can stand beside any other base.
What ``repapq`` may hold, with the values that apply where a key is left out::

    repapq = dict(
        quantizer=dict(preset="w8a8"),  # a preset, any key of RepAPQConfig, and `type` and `options` of another host
        calibration=dict(
            dataloader=None,  # calib_dataloader if the config has one, else the training set with the test pipeline
            num_samples=512,
        ),
        backend="simulated",  # what runs the network while it is scored: simulated, onnxruntime or openvino
        export=[],  # any of onnx and openvino
    )
"""
