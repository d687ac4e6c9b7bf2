"""What `latency` lets race on XNNPACK, through ExecuTorch: float, ours, and pt2e's own XNNPACK quantizer.

ExecuTorch wants other packages than the toolboxes do. So a network is written as programs where the toolbox is, and
raced from these where executorch is.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from integration.bench.latency_candidates import Candidate, Prepared
from repapq_plugin.evaluation.mobile import ExecuTorchNetwork
from repapq_plugin.export.executorch import export_executorch
from repapq_plugin.export.program import quantized_program

FLOAT, OURS, IMAGES = "float.pt2", "executorch.pt2", "images.pt"


def write_programs(made: Prepared, folder: Path) -> None:
    """Write what `on_xnnpack` reads: the float program, ours, and the images that ranges are found on."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        torch.export.save(torch.export.export(made.merged, (made.image,)), folder / FLOAT)
        quantized_program(made.result("executorch"), made.image, batches=made.images).save(folder / OURS)
    torch.save(made.images, folder / IMAGES)


def on_xnnpack(folder: Path) -> dict[str, Candidate]:
    """Return float32, ours and pt2e's own INT8; XNNPACK takes as many threads as it likes."""
    images: list[Tensor] = torch.load(folder / IMAGES)
    exported = torch.export.load(folder / FLOAT)
    lower(exported, folder / "float.pte")
    export_executorch(folder / OURS, None, folder / "ours.pte")
    theirs = torch.export.export(quantized_with_pt2e(exported.module(), images), (images[0],))
    lower(theirs, folder / "pt2e.pte")

    def candidate(name: str, precision: str, **more: Any) -> Candidate:
        network, array = ExecuTorchNetwork(folder / f"{name}.pte"), images[0].numpy()
        return Candidate(lambda: network.run_arrays([array]), precision, **more)

    return {
        "float32": candidate("float", "float32"),
        "RepAPQ": candidate("ours", "int8, the rest float32", against="pt2e"),
        "pt2e": candidate("pt2e", "int8, the rest float32", rival=True),
    }


def quantized_with_pt2e(graph: torch.nn.Module, images: list[Tensor]) -> torch.nn.Module:
    """Quantize a float graph with the quantizer that ExecuTorch brings for XNNPACK, weights per channel."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = xnnpack.XNNPACKQuantizer()
    quantizer.set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=True))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared: GraphModule = prepare_pt2e(graph, quantizer)
        for image in images:
            prepared(image)
        converted: torch.nn.Module = convert_pt2e(prepared)
    return converted


def lower(exported: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program as a ``.pte`` file for XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from repapq_plugin.export._xnnpack import flatc_found

    with warnings.catch_warnings(), flatc_found(), torch.no_grad():
        warnings.simplefilter("ignore")
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)
