"""Files of full-size networks of timm keep the rules of every target: residual, dense, depthwise and merged ones.

Their weights are random; a rule is about the form of a file.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch

from repapq_plugin import RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.export.check import check_onnx
from repapq_plugin.targets import TARGETS

NETWORKS = (
    *("repvgg_a0", "mobileone_s0", "fastvit_t8", "resnet18", "resnet50", "resnext26ts"),
    *("mobilenetv2_100", "efficientnet_lite0", "densenet121", "regnetx_002", "cspresnet50", "hrnet_w18_small"),
)

GRIDS = {"qnn": ("generic", "openvino", "qnn"), "litert": ("executorch", "litert", "rknn")} | {
    name: (name,) for name in ("onnxruntime", "tensorrt", "coreml")
}
"""Which target a network is quantized for, and the targets whose rules its file then has to keep."""


def executed_in_integers(path: Path) -> int:
    """Return how many layers onnxruntime computes in integers, read from the graph that it executes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".executed.onnx"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    return sum(node.op_type in ("QLinearConv", "QGemm") for node in graph.node)


PAIRS = [
    (name, made_for)
    for row, name in enumerate(NETWORKS)
    for column, made_for in enumerate(GRIDS)
    if (row + column) % 5 < 2 or "REPAPQ_ALL_TARGETS" in os.environ
]
"""Each network for two grids, each grid with four networks or five; the variable asks for all of them."""


@pytest.mark.parametrize(("name", "made_for"), PAIRS)
def test_files_of_full_size_networks_have_no_findings(name: str, made_for: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, images = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    config = RepAPQConfig(target=made_for).plain()
    result = quantize_model(network, [images], config)
    path = export_onnx(result, images[:1], tmp_path / "model.onnx", dynamic_batch=False).path
    findings = {target: [str(finding) for finding in check_onnx(path, target)] for target in GRIDS[made_for]}
    assert findings == {target: [] for target in GRIDS[made_for]}
    if made_for == "onnxruntime":
        assert executed_in_integers(path) == len(result.plan.layers)
    assert set(TARGETS) == {target for targets in GRIDS.values() for target in targets}
