"""Every runtime that can be installed against its simulation: both classifiers on all 10,000 test images.

    python -m integration.bench.runtimes prepare FOLDER
    python -m integration.bench.runtimes score FOLDER onnxruntime openvino
    python -m integration.bench.runtimes score FOLDER executorch     # where executorch is installed
    python -m integration.bench.runtimes score FOLDER litert         # where litert-torch is installed

The first command quantizes and writes what the runtimes are given, the images and the simulated outputs. The others
need neither the toolboxes nor the network's code, so they run in environments of their own. A simulation is the
calibrated network with what the runtime rounds beside it: biases, and in the form "all rounded" also outputs of layers
that the calibration left unrounded, so that integer kernels can write them. Results go to ``results/runtimes.json``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from integration.bench.reference import RESULTS, write_result
from repapq_plugin.core.tensors import tensors_of

KEYS = ("model", "preset", "runtime", "form")
INTEGER_OPERATORS = ("QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul")
"""onnxruntime's layers with integer weights and integer inputs, in the graph that it has optimized."""

BATCH = 50
"""Images of one run; files for phones take no other number."""

PACKAGES = ("torch", "onnxruntime", "openvino", "executorch", "litert-torch", "ai-edge-litert")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def simulated(network: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs of a network on all images."""
    with torch.no_grad():
        return torch.cat([tensors_of(network(batch))[0] for batch in images.split(BATCH)])


def compared(outputs: Tensor, reference: Tensor, labels: Tensor) -> dict[str, float]:
    """Return scores in percent, and how alike outputs are."""
    score, wanted = (100 * float((y.argmax(1) == labels).double().mean()) for y in (outputs, reference))
    return {
        "accuracy": score,
        "simulated": wanted,
        "difference": score - wanted,
        "same_class": 100 * float((outputs.argmax(1) == reference.argmax(1)).double().mean()),
        "equal": 100 * float((outputs == reference).double().mean()),
        "max_rel_difference": float((outputs.double() - reference.double()).abs().max() / reference.abs().max()),
    }


@click.group()
def main() -> None:
    """Compare runtimes with their simulation."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", "names", multiple=True, default=("repvgg", "mobileone"), help="Which classifiers.")
@click.option("--preset", "presets", multiple=True, default=("w8a8", "w4a4"), help="Which bits.")
@click.option("--steps", type=int, help="Steps a stage. [default: the configuration's]")
def prepare(folder: Path, names: Sequence[str], presets: Sequence[str], steps: int | None) -> None:
    """Quantize the classifiers for each runtime, and write files, images and simulated outputs into FOLDER."""
    from integration.bench.reference import calibration_batches, forward, images_and_labels, load_classifier
    from repapq_plugin import RepAPQConfig, quantize_model
    from repapq_plugin.export import export_onnx, export_openvino
    from repapq_plugin.export.program import quantized_program
    from repapq_plugin.hosts.openmmlab.network import TensorPath

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.json").write_text(json.dumps(steps or RepAPQConfig().steps))
    for name in names:
        model = load_classifier(name)
        images, labels = images_and_labels("test", "full", model)
        batches = calibration_batches(model)
        save_file({"images": images.contiguous(), "labels": labels.contiguous()}, folder / f"{name}.safetensors")
        for preset in presets:
            for target in ("onnxruntime", "openvino", "executorch"):
                config = RepAPQConfig.from_preset(preset, target=target)
                config = config.replace(steps=config.steps if steps is None else steps)
                result = quantize_model(model, batches, config, forward_fn=forward)
                network = TensorPath(result.model).eval()
                outputs = {"calibrated": simulated(network, images)}
                stem = folder / f"{name}_{preset}_{target}"
                if target == "openvino":
                    export_openvino(network, images[:BATCH], stem.with_suffix(".xml"))
                elif target == "onnxruntime":
                    export_onnx(network, images[:BATCH], stem.with_suffix(".onnx"), target=config.runs_on)
                else:
                    for form, given in (("integers", None), ("rounded", batches)):
                        program = quantized_program(network, images[:BATCH], batches=_of_size(given))
                        program.save(folder / f"{name}_{preset}_{form}.pt2")
                        outputs[form] = simulated(program.graph, images)
                save_file(outputs, stem.with_suffix(".safetensors"))
                click.echo(f"{name} {preset} for {target}: {len(result.plan.layers)} layers")


def _of_size(batches: list[Tensor] | None) -> list[Tensor] | None:
    """Return the images of batches in batches of the size that a program takes."""
    return None if batches is None else [x for x in torch.cat(batches).split(BATCH) if len(x) == BATCH]


def run_onnxruntime(stem: Path, folder: Path, form: str) -> tuple[nn.Module, int, int]:
    """Open a file in onnxruntime; return the network, how many layers it computes in integers, and of how many."""
    import onnx
    import onnxruntime

    from repapq_plugin.core.onnx_weights import integer_layers
    from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork

    path = stem.with_suffix(".onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    integer = sum(node.op_type in INTEGER_OPERATORS for node in graph.node)
    network = OnnxRuntimeNetwork(path, threads=1, arithmetic="integer" if form == "integers" else "exact")
    return network, integer if form == "integers" else 0, len(integer_layers(onnx.load(path).graph))


def run_openvino(stem: Path, folder: Path, form: str) -> tuple[nn.Module, int, int]:
    """Open a file in OpenVINO; see `run_onnxruntime`."""
    from repapq_plugin.evaluation.runtimes import OpenVINONetwork
    from repapq_plugin.export.openvino import computes_integers, layer_kernels

    network = OpenVINONetwork(stem.with_suffix(".xml"), threads=1)
    kernels = layer_kernels(network.compiled).values()
    return network, sum(map(computes_integers, kernels)), len(kernels)


def run_executorch(stem: Path, folder: Path, form: str) -> tuple[nn.Module, int, int]:
    """Lower a program for XNNPACK, and open it; see `run_onnxruntime`."""
    from repapq_plugin.evaluation.mobile import ExecuTorchNetwork
    from repapq_plugin.export.executorch import export_executorch

    base = folder / (f"{stem.name}_{FORMS[form]}" if form else stem.name)
    written = export_executorch(base.with_suffix(".pt2"), None, base.with_suffix(".pte"))
    return ExecuTorchNetwork(written.path), written.integer_layers, written.layers


def run_litert(stem: Path, folder: Path, form: str) -> tuple[nn.Module, int, int]:
    """Convert a program for LiteRT, and open it; see `run_onnxruntime`."""
    from repapq_plugin.evaluation.mobile import LiteRTNetwork
    from repapq_plugin.export.litert import export_litert

    base = folder / (f"{stem.name}_{FORMS[form]}" if form else stem.name)
    written = export_litert(base.with_suffix(".pt2"), None, base.with_suffix(".tflite"))
    return LiteRTNetwork(written.path, threads=1), written.integer_layers, written.layers


FORMS = {"float products": "calibrated", "integers": "integers", "all rounded": "rounded"}
"""Which simulation stands beside a form: of the calibrated network, or of its program with what a runtime rounds."""

Opens = Callable[[Path, Path, str], tuple[nn.Module, int, int]]
RUNTIMES: dict[str, tuple[Opens, str, tuple[str, ...]]] = {
    "onnxruntime": (run_onnxruntime, "onnxruntime", ("float products", "integers")),
    "openvino": (run_openvino, "openvino", ("integers",)),
    "executorch": (run_executorch, "executorch", ("integers", "all rounded")),
    "litert": (run_litert, "executorch", ("integers", "all rounded")),
}
"""What opens a file, the target for which its network was quantized, and the forms that are scored."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("runtimes", nargs=-1, type=click.Choice(list(RUNTIMES)), required=True)
def score(folder: Path, runtimes: Sequence[str]) -> None:
    """Score what FOLDER holds on RUNTIMES, and keep the figures."""
    path = RESULTS / "runtimes.json"
    kept = json.loads(path.read_text()) if path.exists() else {"environments": {}, "rows": []}
    rows = {tuple(row[key] for key in KEYS): row for row in kept["rows"]}
    for file in sorted(folder.glob("*_w*_onnxruntime.safetensors"), reverse=True):
        model, preset, _ = file.stem.split("_")
        data = load_file(folder / f"{model}.safetensors")
        for runtime in runtimes:
            opens, target, forms = RUNTIMES[runtime]
            reference = load_file(folder / f"{model}_{preset}_{target}.safetensors")
            if target != "executorch":  # one adds float biases, the other's are rounded in the calibrated network
                reference["integers"] = reference["calibrated"]
            for form in forms:
                mobile = runtime in ("executorch", "litert")
                stem = folder / (f"{model}_{preset}" if mobile else f"{model}_{preset}_{target}")
                network, integer, layers = opens(stem, folder, form)
                outputs = simulated(network, data["images"])
                found = compared(outputs, reference[FORMS[form]], data["labels"])
                calibrated = reference["calibrated"]
                found |= {"calibrated": compared(calibrated, calibrated, data["labels"])["accuracy"]}
                key = (model, preset, runtime, form)
                found |= {
                    "integer": integer,
                    "layers": layers,
                    "steps": json.loads((folder / "steps.json").read_text()),
                }
                rows[key] = {**dict(zip(KEYS, key, strict=True)), **found}
                click.echo(json.dumps(rows[key]))
    environments = {**kept["environments"], **{runtime: environment() for runtime in runtimes}}
    write_result("runtimes", {"environments": environments, "rows": list(rows.values())})


def environment() -> dict[str, Any]:
    """Return what figures of this environment depend on."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "features": [feature for feature in FEATURES if feature in flags],
        "versions": found,
    }


if __name__ == "__main__":
    main()
