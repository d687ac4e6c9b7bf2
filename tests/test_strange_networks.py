"""Networks that are odd in ways of their own: each is quantized as what it is, or an error or a note says why not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.core.copies import own_batch
from repapq_plugin.core.running import call_model
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import CalibrationError, ExportError
from repapq_plugin.export.deploy import deployable
from tests.support.comparing import equal_numbers, flags, hooks_of, numbers
from tests.support.strange_networks import STRANGE, Strange

# Each is a whole job, saved, loaded and exported.
pytestmark = pytest.mark.slow

LEAST = 25.0
"""Decibels that 8 bits keep of every output."""

NOT_CALLED = "not called in a forward pass"

STAYS_FLOAT: dict[str, dict[str, str]] = {
    "divides its input by its weight": {"2": "changes its input before it is multiplied"},
    "complex weight": {"": "ComplexWeight runs in float"},
    "words": {"table": "Embedding runs in float"},
    "tied words": {"table": "Embedding runs in float"},
    "dictionaries": {"matrices": "ParameterDict runs in float"},
    "weight of a property": {"2": "weight and bias of FromProperty are not both parameters of its own"},
    "weight written": {"mid": "a forward pass writes its weight"},
    "scripted part": {"body.0": "RecursiveScriptModule runs in float"},
    "forward called": {"mid": NOT_CALLED},
    "called by class": {"mid": NOT_CALLED},
    "conv_forward called": {"mid": NOT_CALLED},
    "on condition": {"mid": NOT_CALLED},
    "bilinear": {"pair": "Bilinear runs in float"},
    "recurrent": {"cell": "GRU runs in float"},
    "attention": {"attention": "MultiheadAttention runs in float", "attention.out_proj": NOT_CALLED},
    "transposed, 1 and 3 axes": {"signal": "ConvTranspose1d runs in float", "volume": "ConvTranspose3d runs in float"},
}
"""Layers that stay float, and part of the reason; of all other networks none does."""

CHANCE = "The network gives other outputs for the same batch"
DRIFT = "Each run of the network changes its buffers"
KEPT_NORM = "Norms that were not folded and stay float (1)"
NOTES: dict[str, str] = {
    "chance": CHANCE,
    "drifts": DRIFT,
    "buffers change": DRIFT,
    "norm in training": "Told eval(), 1 modules stay in training mode; they are quantized as at inference: body.3.",
    "hook before the norm": KEPT_NORM,
    "norm of tokens": KEPT_NORM,
    "norm of as many tokens": KEPT_NORM,
    "norm without statistics": KEPT_NORM,
    "instance norm": KEPT_NORM,
}
"""A note that has to be there."""

OTHER_FUNCTION = ("norm in training",)
"""What is quantized computes something else than the network given, and a note says so."""

CANNOT_BE_TRACED: dict[str, str] = {
    "generator": "returns no tensor",
    "complex inside": "complex",
    "complex output": "fft_rfft2",
    "complex weight": "fft_rfft2",
    "answers all": "expected torch.nn.Module",
    "scripted part": "cannot be traced",
    "autocast": "not valid ONNX",
    "bilinear": "bilinear",
    "attention": "multi_head_attention",
    "double": "double precision, where runtimes have no integers",
}
"""What ONNX or its exporter cannot say; part of the error."""


def settled(strange: Strange, data: list[object]) -> nn.Module:
    """Return a network whose norms know their inputs."""
    model, run = strange.make(), strange.forward or call_model
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    for norm in norms:
        norm.train()
    with torch.no_grad():
        for batch in data if norms else []:
            run(model, own_batch(batch))
    return model.eval()


def outputs(strange: Strange, model: nn.Module, batch: object) -> list[Tensor]:
    """Run a copy: some networks change themselves."""
    torch.manual_seed(0)
    own = (
        model if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()) else copy.deepcopy(model)
    )
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors_of((strange.forward or call_model)(own, own_batch(batch)))]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def decibels(wanted: Tensor, got: Tensor) -> float:
    noise = (wanted - got).abs().double().square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(wanted.abs().double().square().sum() / noise))


@pytest.mark.parametrize(("preset", "steps"), [("w8a8", 0), ("w4a4", 5)])
@pytest.mark.parametrize("name", [name for name in STRANGE if name != "generator as it is"])
def test_a_strange_network_is_quantized_as_what_it_is(name: str, preset: str, steps: int, tmp_path: Path) -> None:
    strange = STRANGE[name]
    data = [strange.batch(4) for _ in range(4)]
    model = settled(strange, data)
    kinds, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    before, flagged, hooks = numbers(model), flags(model), hooks_of(model)
    given = [tensor.clone() for batch in data for tensor in tensors_of(batch)]

    result = quantize_model(model, data, RepAPQConfig.from_preset(preset, steps=steps), forward_fn=strange.forward)

    assert equal_numbers(numbers(model), before) and flags(model) == flagged and hooks_of(model) == hooks
    assert ([type(m) for m in model.modules()], [m.training for m in model.modules()]) == (kinds, modes)
    assert same([tensor for batch in data for tensor in tensors_of(batch)], given)

    expected = STAYS_FLOAT.get(name, {})
    assert result.float_layers.keys() == expected.keys()
    assert all(text in result.float_layers[layer] for layer, text in expected.items())
    if name in NOTES:
        assert any(note.startswith(NOTES[name]) for note in result.notes)
    else:
        assert not [note for note in result.notes if note.startswith((CHANCE, DRIFT, KEPT_NORM, "Told eval()"))]

    images = strange.batch(4)
    got, wanted = outputs(strange, result.model, images), outputs(strange, model, images)
    assert [(tensor.shape, tensor.dtype) for tensor in got] == [(tensor.shape, tensor.dtype) for tensor in wanted]
    if preset == "w8a8" and name not in OTHER_FUNCTION:
        numbered = [pair for pair in zip(wanted, got, strict=True) if pair[0].dtype != torch.int64 and pair[0].numel()]
        assert min(decibels(*pair) for pair in numbered) >= LEAST
    loaded = CalibrationResult.load(result.save(tmp_path / "result.safetensors"), model)
    assert same(outputs(strange, loaded.model, images), got)
    assert same(outputs(strange, deployable(result.model), images), got)
    check_onnx(name, result, tmp_path / "network.onnx")


def check_onnx(name: str, result: CalibrationResult, path: Path) -> None:
    """A file computes what the simulation does on one of three examples: roundings that tie go either way."""
    examples = [STRANGE[name].batch(4) for _ in range(3)]
    if name in CANNOT_BE_TRACED:
        with pytest.raises(ExportError, match=CANNOT_BE_TRACED[name]):
            export_onnx(result, own_batch(examples[0]), path)
        return
    written = (export_onnx(result, own_batch(example), path) for example in examples)
    if NOTES.get(name) in (CHANCE, DRIFT) and name != "buffers change":
        assert "returns something else in each run" in next(written).notes[-1]
        return
    differences = (summary.max_rel_difference for summary in written)
    assert any(difference is not None and difference < 1e-4 for difference in differences)


def test_what_a_generator_would_give_has_to_be_taken_from_it() -> None:
    strange = STRANGE["generator as it is"]
    with pytest.raises(CalibrationError, match="returns an iterator.*forward_fn"):
        quantize_model(strange.make(), [strange.batch(4)], RepAPQConfig(steps=0))


def test_buffers_that_a_network_changes_are_delivered_as_they_were() -> None:
    strange = STRANGE["buffers change"]
    model, data = strange.make().eval(), [strange.batch(4) for _ in range(3)]
    for batch in data[:2]:
        model(batch)
    for steps in (0, 4):
        result = quantize_model(model, data, RepAPQConfig(steps=steps))
        assert int(result.model.calls) == 2 and torch.equal(result.model.mean, model.mean)


def test_what_lies_in_one_memory_learns_by_itself() -> None:
    strange = STRANGE["transposed layer"]
    model = strange.make().eval()
    assert model.up.weight.data_ptr() == model.down.weight.data_ptr()
    learned = quantize_model(
        model, [strange.batch(4) for _ in range(4)], RepAPQConfig.from_preset("w4a4", steps=5)
    ).model
    assert learned.up.weight.data_ptr() != learned.down.weight.data_ptr()
    for layer in (learned.up, learned.down):
        assert torch.equal(layer.weight_fake_quant(layer.weight), layer.weight)
