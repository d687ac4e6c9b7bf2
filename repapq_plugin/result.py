"""What a calibration gives back, and how it is saved and loaded without pickles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from repapq_plugin.config import MAX_BITS, MIN_BITS, RepAPQConfig
from repapq_plugin.core.copies import is_half, own_copy, takes_halves
from repapq_plugin.core.files import atomically
from repapq_plugin.errors import MergeError, ResultError
from repapq_plugin.method.unit_result import UnitResult
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import QuantizedLayer, weight_of
from repapq_plugin.quantizers.outputs import insert_outputs
from repapq_plugin.quantizers.own_forward import baked_layer
from repapq_plugin.quantizers.plan import LayerPlan, OutputPlan, QuantizationPlan, SkipPlan, insert_quantizers
from repapq_plugin.quantizers.skips import insert_skips
from repapq_plugin.reparam.fold import fold_named_pairs
from repapq_plugin.reparam.merge import MergeRecord, merge_branches
from repapq_plugin.reparam.parametrized import bake_parametrizations

FORMAT = "repapq-result-2"
"""Version 2 keeps a layer's weight under the layer's own name."""

OLDER_FORMAT = "repapq-result-1"
"""Version 1 kept it one level below, under ``layer``."""


@dataclass(frozen=True)
class Calibrated:
    """A quantized network and the record of how it came about.

    Args:
        model: Runs in place of the float model.
        config: The configuration used.
        plan: What was folded, and how each layer is quantized.
        units: One entry per unit, in call order; empty where nothing was learned.
        merges: One entry per multi-branch block that was met.
        seconds: Time of the whole calibration.
        notes: Warnings worth keeping with the result.
    """

    model: nn.Module
    config: RepAPQConfig
    plan: QuantizationPlan
    units: tuple[UnitResult, ...] = ()
    merges: tuple[MergeRecord, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """``(weight_bits, activation_bits)`` of each quantized layer, by module path."""
        return {name: (plan.weight_bits, plan.activation_bits) for name, plan in self.plan.layers.items()}

    @property
    def float_layers(self) -> dict[str, str]:
        """Why each layer that stayed float did so, by module path."""
        return dict(self.plan.float_layers)

    def summary(self) -> dict[str, object]:
        """Return everything but the tensors, ready for JSON (NaN becomes ``None``)."""
        return {
            "scheme": self.config.scheme,
            "config": self.config.to_dict(),
            "plan": self.plan.to_dict(),
            "units": [_finite(dataclasses.asdict(unit)) for unit in self.units],
            "merges": [_finite(dataclasses.asdict(record)) for record in self.merges],
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class CalibrationResult(Calibrated):
    """A network with the plugin's own quantizers and the record of how it came about; can be saved and exported.

    ``model`` simulates integers exactly as exported. Arguments: see `Calibrated`.
    """

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file; an older file stays until the new one is whole.

        Raises:
            ResultError: The file cannot be written; nothing half-written is left.
        """
        target = Path(path)
        record = json.dumps(self.summary())
        state = _own_state(self.model)
        # Copies: the format refuses tensors that share their memory, as a buffer and a slice of it do.
        tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
        header = {"format": FORMAT, "result": record, "digest": _digest(record, tensors)}
        try:
            with atomically(target) as partial:
                save_file(tensors, partial, metadata=header)
        except (OSError, SafetensorError) as error:
            raise ResultError(f"Cannot write {target}: {error}. Free some space or choose another folder.") from error
        return target

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> CalibrationResult:
        """Rebuild a saved result on the float, branched ``model`` it was made from (a copy of it).

        Raises:
            ResultError: The file is missing or no such result, or belongs to another model.
        """
        tensors, record = _read(Path(path))
        try:
            quantized = rebuild(model, record.plan, record.merges, record.config)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError, MergeError) as error:
            raise ResultError(_misfit(path, str(error))) from error
        _untie(quantized, tensors)
        expected = set(_own_state(quantized))
        missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        if missing or unexpected:
            counted = f"{len(missing)} missing keys {missing[:5]}, {len(unexpected)} unexpected keys {unexpected[:5]}"
            raise ResultError(_misfit(path, counted))
        try:
            quantized.load_state_dict(tensors, strict=False)
            _check_quantizers(quantized)
        except (RuntimeError, ValueError) as error:
            raise ResultError(_misfit(path, str(error))) from error
        return cls(quantized.eval(), *record)


def rebuild(model: nn.Module, plan: QuantizationPlan, merges: Sequence[MergeRecord], config: RepAPQConfig) -> nn.Module:
    """Return a copy of ``model``, merged, folded and with quantizers as ``plan`` and ``merges`` say."""
    skip = [record.name for record in merges if not record.merged]
    copied = own_copy(model)
    if is_half(model):
        takes_halves(copied)
    copied.requires_grad_(False)  # as calibration left it; torch multiplies in another order where weights learn
    bake_parametrizations(copied)
    for name in plan.baked:
        layer = copied.get_submodule(name)
        baked_layer(layer, weight_of(layer))  # in its place: what was made is loaded later
    merged, _ = merge_branches(copied, inplace=True, verify=False, skip=skip)
    fold_named_pairs(merged, plan.folded)
    layers = insert_quantizers(merged, plan.layers, config)
    insert_skips(merged, plan.skips, plan.layers, layers, config)
    insert_outputs(merged, plan.outputs, plan.layers, layers, config)
    return merged


def _misfit(path: str | Path, why: str) -> str:
    return f"{path} does not fit this model: {why}. Load it into the model it was made from."


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without what observers remember, and shared tensors once."""
    state: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for key, value in model.state_dict().items():
        if "activation_post_process." in key:
            continue
        place = (value.data_ptr(), value.shape)
        if value.numel() and place in seen:
            continue
        seen.add(place)
        state[key] = value
    return state


def _untie(model: nn.Module, names: Collection[str]) -> None:
    """Give each parameter that is saved by itself memory of its own: of two tied layers one may have stayed float."""
    for name in set(names) - set(_own_state(model)):
        path, _, key = name.rpartition(".")
        with suppress(AttributeError):
            owner = model.get_submodule(path)
            if isinstance(tied := owner._parameters.get(key), nn.Parameter):
                owner._parameters[key] = nn.Parameter(tied.detach().clone(), tied.requires_grad)


def _check_quantizers(model: nn.Module) -> None:
    """Make sure that scales and zero points are some.

    Raises:
        ValueError: A scale is no number, or its shape or a zero point is not one of its grid.
    """
    wanted = {
        layer.weight_fake_quant: weight_of(layer).shape
        for layer in model.modules()
        if isinstance(layer, QuantizedLayer)
    }
    for name, quantizer in model.named_modules():
        if not isinstance(quantizer, LearnableFakeQuantize):
            continue
        count = wanted[quantizer][quantizer.ch_axis] if quantizer.per_channel and quantizer in wanted else 1
        for what, values in (("log_scale", quantizer.log_scale), ("zero_point", quantizer.zero_point)):
            if values.shape != (count,):
                raise ValueError(f"{name}.{what} has the shape {tuple(values.shape)} and not {(count,)}")
        if not quantizer.log_scale.isfinite().all():
            raise ValueError(f"{name}.log_scale holds what is no number")
        low, high = quantizer.quant_min, quantizer.quant_max
        if not ((quantizer.zero_point >= low) & (quantizer.zero_point <= high)).all():
            raise ValueError(f"{name}.zero_point is not from {low} to {high}")


def _digest(record: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of all that a result says, by which a damaged file is told."""
    found = hashlib.sha256(record.encode())
    for key, tensor in sorted(tensors.items()):
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class _Record(NamedTuple):
    """What the header of a saved result says; the fields of `Calibrated` but the model."""

    config: RepAPQConfig
    plan: QuantizationPlan
    units: tuple[UnitResult, ...]
    merges: tuple[MergeRecord, ...]
    seconds: float
    notes: tuple[str, ...]


def _read(path: Path) -> tuple[dict[str, Tensor], _Record]:
    """Read a saved result; whatever stands in its header, nothing but a `ResultError` comes of it."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ResultError(f"Cannot read {path}: {error}.") from error
    if header.get("format") not in (FORMAT, OLDER_FORMAT):
        raise ResultError(f"{path} is not a result of this plugin: format {header.get('format')!r}, not {FORMAT!r}.")
    try:
        if header.get("digest", digest := _digest(header["result"], tensors)) != digest:
            raise ValueError("it is not what was written")
        saved = json.loads(header["result"])
        record = _Record(
            RepAPQConfig.from_dict(saved["config"]),
            _plan(saved["plan"]),
            tuple(UnitResult(**_nan(unit)) for unit in saved["units"]),
            tuple(_record(merge) for merge in saved["merges"]),
            float(saved["seconds"]),
            tuple(str(note) for note in saved["notes"]),
        )
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ResultError(
            f"{path} is damaged: its record cannot be read ({type(error).__name__}: {error}). Quantize again."
        ) from error
    if header["format"] == OLDER_FORMAT:
        tensors = {_own_key(key, record.plan.layers): value for key, value in tensors.items()}
    return tensors, record


def _own_key(key: str, layers: Collection[str]) -> str:
    """Return the key of version 2 for one of version 1."""
    owner, below, name = key.rpartition(".layer.")
    return f"{owner}.{name}" if below and owner in layers else key


def _plan(saved: dict[str, Any]) -> QuantizationPlan:
    return QuantizationPlan(
        folded=tuple((layer, norm) for layer, norm in saved["folded"]),
        layers={name: _layer_plan(values) for name, values in saved["layers"].items()},
        float_layers=dict(saved["float_layers"]),
        baked=tuple(saved.get("baked", ())),
        skips={name: _skip_plan(values) for name, values in saved.get("skips", {}).items()},
        outputs={name: _output_plan(values) for name, values in saved.get("outputs", {}).items()},
    )


def _layer_plan(saved: dict[str, Any]) -> LayerPlan:
    plan = LayerPlan(**saved)
    _check_bits(*plan.bits)
    return plan


def _skip_plan(saved: dict[str, Any]) -> SkipPlan:
    plan = SkipPlan(**saved)
    _check_bits(plan.bits)
    return plan


def _output_plan(saved: dict[str, Any]) -> OutputPlan:
    plan = OutputPlan(**{**saved, "layers": tuple(saved["layers"])})
    _check_bits(plan.bits)
    return plan


def _check_bits(*numbers: object) -> None:
    for bits in numbers:
        if not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"{bits!r} is no number of bits from {MIN_BITS} to {MAX_BITS}")


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _record(saved: dict[str, Any]) -> MergeRecord:
    size = saved["kernel_size"]
    return MergeRecord(**{**_nan(saved), "kernel_size": tuple(size) if size else None})


def _nan(values: dict[str, Any]) -> dict[str, Any]:
    floats = ("loss_before", "loss_after", "max_rel_error")
    return {k: float("nan") if v is None and k in floats else v for k, v in values.items()}
