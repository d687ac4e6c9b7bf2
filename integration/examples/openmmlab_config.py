# An OpenMMLab config that quantizes: your own config, and one more `_base_` beside it.
#
#     repapq quantize integration/examples/openmmlab_config.py
#
# Everything below the two base files is optional; it makes this example quick.
_base_ = [
    "../../mm_configs/fashion/repvgg_fashion.py",  # here: your config, of any toolbox
    "../../mm_configs/_base_/repapq_w6a6.py",  # for pip users: "repapq_plugin::_base_/repapq_w6a6.py"
]

load_from = "{{ fileDirname }}/../assets/repvgg_fashion.pth"

repapq = dict(
    quantizer=dict(steps=5),  # any key of RepAPQConfig
    calibration=dict(num_samples=64),
    export=["onnx"],
)

# Only few images, of the subset that ships with the repository.
test_dataloader = dict(dataset=dict(source="subset", count=200))
