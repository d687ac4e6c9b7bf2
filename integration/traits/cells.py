"""One cell of the matrix: a network with a trait, quantized in a host; equal to what was calibrated, or refused."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nncf
import onnxruntime
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from integration.traits.networks import IMAGE, settled
from integration.traits.parallel import process_group
from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.core.copies import is_half, own_batch
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.errors import RepAPQError
from repapq_plugin.hosts import pt2e, torch_ao
from repapq_plugin.hosts.nncf import quantize_with_record
from repapq_plugin.hosts.nncf.hosted import NNCFNetwork, load_network
from repapq_plugin.result import Calibrated

HOSTS = ("own", "NNCF", "torch.ao FX", "torch.ao eager", "pt2e")
BATCH = 4

LOADED = 0.0
"""What a saved and loaded network may differ by."""

ONNX = 1e-4
"""What onnxruntime, node by node, may differ by, of the largest output."""

OPENVINO = 2e-2
"""What OpenVINO may differ by from NNCF's network, of the largest output."""

FLOAT = 0.1
"""What a network of 8 bits may differ by from the float one in the mean, of the mean output (our choice)."""

CONVERTED = {"torch.ao FX": 0.03, "torch.ao eager": 0.06, "pt2e": 1e-5}
"""What a host's form may differ by from the calibrated network in the mean, of the mean output: integer modules of
torch.ao round outputs to 8 bits besides, and in eager mode once more behind every layer (our choice)."""


@dataclass
class Cell:
    """What came of one network in one host.

    Args:
        host: One of `HOSTS`.
        figures: What was compared, how far it was apart, and what it may be apart.
        refused: What a `RepAPQError` said; empty if there was none.
        part: What was refused, if the network itself was not.
    """

    host: str
    figures: list[tuple[str, float, float]] = field(default_factory=list)
    refused: str = ""
    part: str = ""

    @property
    def fails(self) -> list[str]:
        """What is too far apart."""
        return [f"{name} {found:.1e} > {bound:.0e}" for name, found, bound in self.figures if not found <= bound]

    def __str__(self) -> str:
        """The cell of a table."""
        found = [f"{name} {found:.0e}" if found else f"{name} 0" for name, found, _ in self.figures]
        if self.refused:
            found.append(f"{self.part} refused".strip())
        return ", ".join(["FAIL", *found] if self.fails else found)


def quantize_cell(trait: str, host: str, preset: str, steps: int) -> Cell:
    """Quantize a network in a host, and compare what the host makes of it with what was calibrated.

    Args:
        trait: Name of a network.
        host: One of `HOSTS`.
        preset: Bits.
        steps: Of learning.
    """
    cell = Cell(host)
    try:
        with tempfile.TemporaryDirectory() as folder, process_group():
            MAKERS[host](cell, trait, preset, steps, Path(folder))
    except RepAPQError as error:
        cell.refused = str(error)
    return cell


def images(trait: str, count: int = 3) -> list[Tensor]:
    """Return calibration batches in the dtype of the network."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(settled(trait).parameters()).dtype
    return [torch.randn(BATCH, *IMAGE, generator=generator).to(dtype) for _ in range(count)]


def in_full(trait: str) -> nn.Module:
    """Return the network, in float32 if it is in half precision."""
    model = settled(trait)
    return model.float() if is_half(model) else model


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what a network gives for images that it may change."""
    with torch.no_grad():
        return [tensor.float() for tensor in floating_tensors(model(own_batch(x)))]


def apart(some: Sequence[Tensor], others: Sequence[Tensor], *, mean: bool = True) -> float:
    """Return the largest mean (or largest single) difference of two lists of outputs, of the others' size."""
    assert len(some) == len(others)
    found = 0.0
    for one, other in zip(some, others, strict=True):
        difference, size = (one - other).abs(), other.abs()
        pair = (difference.mean(), size.mean()) if mean else (difference.max(), size.max())
        found = max(found, float(pair[0] / pair[1]))
    return found


@cache
def calibrated(trait: str, preset: str, steps: int) -> CalibrationResult:
    """Return what `quantize_model` makes of a network."""
    return quantize_model(settled(trait), images(trait), configuration(preset, steps))


def configuration(preset: str, steps: int) -> RepAPQConfig:
    return RepAPQConfig.from_preset(preset, steps=steps, activation_observer="mse")


def against_float(cell: Cell, trait: str, preset: str, record: Calibrated) -> None:
    """Compare a quantized network of 8 bits with the float one; both are run with a batch of another size too."""
    if preset == "w8a8":
        model = in_full(trait)
        found = max(
            apart(outputs(record.model, x), outputs(model, x)) for x in (images(trait)[0], images(trait)[1][:1])
        )
        cell.figures.append(("float", found, FLOAT))


def own(cell: Cell, trait: str, preset: str, steps: int, folder: Path) -> None:
    result, x = calibrated(trait, preset, steps), images(trait)[0]
    against_float(cell, trait, preset, result)
    wanted = outputs(result.model, x)
    loaded = CalibrationResult.load(result.save(folder / "result.safetensors"), settled(trait))
    cell.figures.append(("loaded", apart(outputs(loaded.model, x), wanted), LOADED))
    cell.part = "ONNX"
    export_onnx(result, own_batch(x), folder / "model.onnx")
    cell.figures.append(("ONNX", apart(in_onnxruntime(folder / "model.onnx", x), wanted, mean=False), ONNX))


def in_onnxruntime(path: Path, x: Tensor) -> list[Tensor]:
    """Return what onnxruntime gives, node by node."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [torch.as_tensor(each) for each in session.run(None, {"input": own_batch(x).numpy()})]


def with_nncf(cell: Cell, trait: str, preset: str, steps: int, folder: Path) -> None:
    items = [image[None] for batch in images(trait) for image in batch]
    record = quantize_with_record(settled(trait), nncf.Dataset(items), repapq=configuration(preset, steps))
    against_float(cell, trait, preset, record)
    x = own_batch(images(trait)[0])
    wanted, network = outputs(record.model, x), NNCFNetwork(record)
    cell.part = "loading"
    (path,) = network.save(folder)
    loaded = load_network(path, in_full(trait), own_batch(x)).network
    cell.figures.append(("loaded", apart(outputs(loaded, x), wanted), LOADED))
    cell.part = "OpenVINO"
    written = network.export("openvino", own_batch(x), folder / "model")
    cell.figures.append(("OpenVINO", written.max_rel_difference, OPENVINO))


Converter = Callable[[CalibrationResult, list[Tensor]], tuple[nn.Module, str]]
"""Brings a calibrated network into a host's form, and names the engine that it is for, if any."""


def converting(convert: Converter) -> Callable[[Cell, str, str, int, Path], None]:
    """Compare a host's form of a calibrated network with the network, and with that of the network loaded again."""

    def make(cell: Cell, trait: str, preset: str, steps: int, folder: Path) -> None:
        result, data = calibrated(trait, preset, steps), images(trait)
        loaded = CalibrationResult.load(result.save(folder / "result.safetensors"), settled(trait))
        (converted, engine), (again, _) = convert(result, data), convert(loaded, data)
        with torch_ao.integer_engine(engine) if engine else nullcontext():
            given = [outputs(converted, x) for x in data]
            found = max(apart(mine, outputs(result.model, x)) for mine, x in zip(given, data, strict=True))
            cell.figures.append(("simulated", found, CONVERTED[cell.host]))
            cell.figures.append(("loaded", max(map(apart, (outputs(again, x) for x in data), given)), LOADED))

    return make


def to_fx(result: CalibrationResult, data: list[Tensor]) -> tuple[nn.Module, str]:
    prepared = torch_ao.prepare_learned(result, (data[0],), data)
    return torch_ao.convert_to_int8(prepared), prepared.meta["repapq_engine"]


def to_eager(result: CalibrationResult, data: list[Tensor]) -> tuple[nn.Module, str]:
    return torch_ao.convert_eager(torch_ao.prepare_learned_eager(result, data)), torch_ao.exact_engine()


def to_pt2e(result: CalibrationResult, data: list[Tensor]) -> tuple[nn.Module, str]:
    return convert_pt2e(pt2e.prepare_learned(result, (own_batch(data[0]),))), ""


MAKERS: dict[str, Callable[[Cell, str, str, int, Path], None]] = dict(
    zip(HOSTS, (own, with_nncf, *map(converting, (to_fx, to_eager, to_pt2e))), strict=True)
)
