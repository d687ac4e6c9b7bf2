"""One random network through everything: merged, quantized, calibrated, folded, saved, loaded, exported and run.

Each ends as equal to its simulation or as refused with a reason; whatever else comes of it is a fault of the package.
"""

from __future__ import annotations

import math
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from integration.fuzz.networks import Case, drawn
from integration.fuzz.rounding import plainly_rounded, wobbled
from repapq_plugin import CalibrationResult, export_onnx, quantize_model
from repapq_plugin.core.copies import own_batch, own_copy
from repapq_plugin.core.running import call_model
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import RepAPQError
from repapq_plugin.merging import Merged, merge_for_inference
from tests.support.comparing import equal_numbers, flags, hooks_of, numbers

MERGED = 1e-4
"""What a merged network may differ by, of the largest output: as much as in the package's own check of a merge."""

ONNX = 1e-4
"""What onnxruntime, node by node, may differ by, of the largest output."""

LEAST = 10.0
"""Decibels at the output below which a result has to be no worse than plain rounding (our choice)."""

WORSE = {True: 6.0, False: 15.0}
"""By how many decibels it may be worse; at 8 bits throughout, and at fewer, where few steps on few samples may harm."""


class Fault(Exception):
    """A network ended as it should not."""


@dataclass
class Ending:
    """How a network ended.

    Args:
        seed: Of the network.
        end: ``equal``, ``refused``, or what is wrong.
        stage: What was being done.
        reason: What a refusal said, or what is wrong in detail.
        figures: What was measured.
    """

    seed: int
    end: str = "equal"
    stage: str = ""
    reason: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether it ended as it should."""
        return self.end in ("equal", "refused")


def put_to_the_test(seed: int) -> Ending:
    """Return how the network of a seed ends; nothing is raised."""
    ending = Ending(seed, stage="drawing")
    try:
        case = drawn(seed)
        with tempfile.TemporaryDirectory() as folder, _unchanged(case):
            _all_stages(case, ending, Path(folder))
    except RepAPQError as error:
        ending.end, ending.reason = "refused", f"{type(error).__name__}: {error}"
    except Fault as error:
        ending.end, ending.reason = "wrong", str(error)
    except TimeoutError as error:
        ending.end, ending.reason = "hangs", _where(error)
    except Exception as error:
        ending.end, ending.reason = "crashes", _where(error)
    return ending


def _where(error: Exception) -> str:
    frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__}: {error} [{' '.join(frames[-6:])}]"


def _all_stages(case: Case, ending: Ending, folder: Path) -> None:
    config, figures = case.config(), ending.figures
    example = next(batch for batch in case.batches if tensors_of(batch)[0].numel())
    ending.stage = "float"
    wanted = outputs(case.model, example)
    ending.stage = "merge"
    merged = merge_for_inference(case.model, lambda model: call_model(model, own_batch(example)))
    _compare_merged(case, merged, example, wanted, figures)
    ending.stage = "quantize"
    result = quantize_model(case.model, case.batches, config)
    got = outputs(result.model, example)
    _compare_float(case, result, merged, wanted, got, figures)
    ending.stage = "load"
    loaded = CalibrationResult.load(result.save(folder / "result.safetensors"), case.model)
    if not same(outputs(loaded.model, example), got):
        raise Fault("the loaded network gives something else")
    ending.stage = "export"
    given = example[0] if isinstance(example, tuple) else example
    summary = export_onnx(result, own_batch(given), folder / "network.onnx")
    ending.stage = "run"
    session = _session(folder / "network.onnx")
    for batch in case.batches:
        tensors = tensors_of(batch)[:1]
        if tensors[0].numel() and (summary.dynamic_batch or len(tensors[0]) == len(tensors_of(example)[0])):
            _compare_onnx(session, result.model, batch, figures)
    ending.stage = ""


@torch.no_grad()
def outputs(model: nn.Module, batch: object) -> list[Tensor]:
    """Return the tensors that a network, at inference, gives for a batch, which it may change."""
    own = own_copy(model)
    return [tensor.clone() for tensor in tensors_of(call_model(own, own_batch(batch)))]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists of tensors have the same bits, NaN wherever the other has it."""
    return [(x.shape, x.dtype) for x in some] == [(x.shape, x.dtype) for x in others] and all(
        torch.equal(x.nan_to_num(1e30), y.nan_to_num(1e30)) for x, y in zip(some, others, strict=True)
    )


def apart(some: list[Tensor], others: list[Tensor]) -> float:
    """Return the largest difference of two lists of tensors, relative to the others; infinity where NaN differ."""
    worst = 0.0
    for one, other in zip(some, others, strict=True):
        x, y = one.double(), other.double()
        if x.shape != y.shape or not torch.equal(x.isfinite(), y.isfinite()):
            return float("inf")
        x, y = x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0)
        if y.numel():
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)))
    return worst


def decibels(wanted: list[list[Tensor]], got: list[list[Tensor]]) -> tuple[float, float]:
    """Return the signal-to-noise ratio of the worst output: over all values, and as the mean over samples.

    The first counts large samples most, the second all alike. What is zero throughout does not count.

    Args:
        wanted: What a network returned, by batch; samples along the first axis.
        got: What another one did.
    """
    together, each = 200.0, 200.0
    for one, other in zip(*(map(list, zip(*outputs, strict=True)) for outputs in (wanted, got)), strict=True):
        if not one[0].is_floating_point() or not one[0].dim():
            continue
        signals, noises = (
            torch.cat([x.double().square().reshape(len(x), -1).sum(1) for x in made])
            for made in (one, [x - y for x, y in zip(one, other, strict=True)])
        )
        if (counts := signals > 0).any():
            ratios = 10 * torch.log10(signals / noises.clamp_min(1e-20 * signals))[counts]
            together = min(together, _ratio(float(signals.sum()), float(noises.sum())))
            each = min(each, float(ratios.mean()))
    return together, each


def _ratio(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / max(noise, 1e-20 * signal))


def _compare_merged(
    case: Case, merged: Merged, example: object, wanted: list[Tensor], figures: dict[str, float]
) -> None:
    """A merged network computes what the float one does, as exactly as that does itself."""
    got = outputs(merged.network, example)
    figures["merged"] = apart(got, wanted)
    if figures["merged"] <= MERGED:
        return
    exact = in_double(case.model, example)
    own = apart(wanted, exact)
    figures["merged"], figures["float32"] = apart(got, exact), own
    if not figures["merged"] <= max(MERGED, 20 * own):
        raise Fault(f"the merged network differs by {figures['merged']:.1e}, where float32 does by {own:.1e}")


@torch.no_grad()
def in_double(model: nn.Module, batch: object) -> list[Tensor]:
    """Return what a network gives in double precision."""
    own = own_copy(model).double()
    (first, *_) = tensors_of(batch)
    exact = first.double()
    return tensors_of(own(image=exact) if isinstance(batch, dict) else own(exact))


def _compare_float(
    case: Case,
    result: CalibrationResult,
    merged: Merged,
    wanted: list[Tensor],
    got: list[Tensor],
    figures: dict[str, float],
) -> None:
    """A quantized network returns what the float one does, roughly: if it is far off, plain rounding is so too."""
    if [(x.shape, x.dtype) for x in got] != [(x.shape, x.dtype) for x in wanted]:
        raise Fault("the quantized network returns tensors of other shapes or types")
    if not all(x.isfinite().all() for x in got) and all(x.isfinite().all() for x in wanted):
        raise Fault("the quantized network returns what is not finite")
    batches = [batch for batch in case.batches if tensors_of(batch)[0].numel()]
    floats = [outputs(case.model, batch) for batch in batches]
    ours = decibels(floats, [outputs(result.model, batch) for batch in batches])
    figures["decibels"] = max(ours)
    if figures["decibels"] >= LEAST:
        return
    rounded = plainly_rounded(merged.network, result, batches)
    plain = decibels(floats, [outputs(rounded, batch) for batch in batches])
    figures["plain decibels"] = min(plain)
    eight = all(bits == (8, 8) for bits in result.layers.values())
    if all(one < other - WORSE[eight] for one, other in zip(ours, plain, strict=True)):
        raise Fault(f"{ours[0]:.1f} dB, where plain rounding keeps {plain[0]:.1f} dB")


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _compare_onnx(
    session: onnxruntime.InferenceSession, model: nn.Module, batch: object, figures: dict[str, float]
) -> None:
    """The file computes what the simulation does, as exactly as that does if its sums are rounded otherwise."""
    wanted = outputs(model, batch)
    feeds = {
        value.name: tensor.numpy()
        for value, tensor in zip(session.get_inputs(), tensors_of(own_batch(batch)), strict=False)
    }
    got = [torch.as_tensor(array) for array in session.run(None, feeds)]
    if len(got) != len(wanted):
        raise Fault(f"the file gives {len(got)} tensors and the network {len(wanted)}")
    found = apart(got, wanted)
    if found > ONNX:
        wobble = max(apart(outputs(wobbled(model, seed), batch), wanted) for seed in range(4))
        figures["wobble"] = max(figures.get("wobble", 0.0), wobble)
        if not found <= max(ONNX, 4 * wobble):
            raise Fault(f"onnxruntime differs by {found:.1e}, the simulation by {wobble:.1e} if its sums are disturbed")
    figures["onnx"] = max(figures.get("onnx", 0.0), found)


@contextmanager
def _unchanged(case: Case) -> Iterator[None]:
    """Make sure that a user's network and batches are what they were, bit for bit, whatever happened inside."""
    model = case.model
    before = (numbers(model), flags(model), hooks_of(model), _shape_of(model))
    given = [tensor.clone() for tensor in tensors_of(case.batches)]
    refused = None
    try:
        yield
    except RepAPQError as error:
        refused = error
    if not equal_numbers(numbers(model), before[0]):
        raise Fault("the user's network has other numbers")
    if (flags(model), hooks_of(model), _shape_of(model)) != before[1:]:
        raise Fault("the user's network has other flags, hooks, classes, modes or gradients")
    if not same(tensors_of(case.batches), given):
        raise Fault("the user's batches have other numbers")
    if refused is not None:
        raise refused


def _shape_of(model: nn.Module) -> list[object]:
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    return [*modules, *(parameter.grad is None for parameter in model.parameters())]
