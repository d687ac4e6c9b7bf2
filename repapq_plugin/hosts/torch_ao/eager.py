"""torch.ao's eager mode: quantizers hang on modules, and each module's output has one grid."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub, QuantWrapper, convert, fuse_modules, prepare

from repapq_plugin.core.copies import own_batch
from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.running import Batch, ForwardFn, call_model
from repapq_plugin.core.tensors import first_tensor
from repapq_plugin.core.watch import MakersWatch
from repapq_plugin.errors import CalibrationError, HostError
from repapq_plugin.export.blame import Running
from repapq_plugin.export.qdq_onnx import quantized_module
from repapq_plugin.hosts.hosted import quantized_layers
from repapq_plugin.hosts.torch_ao._compat import (
    GridModule,
    new_qconfig,
    output_quantizer_of,
    set_qconfig,
)
from repapq_plugin.hosts.torch_ao.carried import put_back, simulated_layers
from repapq_plugin.hosts.torch_ao.engines import (
    CLAMPS_CONTIGUOUS,
    INTEGER_BIAS,
    checked_engine,
    exact_engine,
    integer_engine,
    refuse_signed_inputs,
)
from repapq_plugin.hosts.torch_ao.grid import absorb_norms, grid_range, lay_bias_on_grid, lay_on_grid
from repapq_plugin.hosts.torch_ao.islands import (
    Carrier,
    Island,
    Regrid,
    attributes_of,
    give_back,
    put_carriers,
    put_regrids,
)
from repapq_plugin.hosts.torch_ao.outputs import find_ranges, output_quantizer
from repapq_plugin.hosts.torch_ao.ready import Ready
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import QuantizedLayer
from repapq_plugin.result import Calibrated


def prepare_learned_eager(
    model_or_result: nn.Module | Calibrated,
    data: Iterable[Batch],
    *,
    backend: str | None = None,
    forward_fn: ForwardFn | None = None,
) -> nn.Module:
    """Return what eager ``prepare`` makes of a calibrated network, with the calibration's result in it.

    Rectifiers are fused into the layers before them. A network without ``QuantStub`` is wrapped in
    torch.ao's ``QuantWrapper``; everything between stubs must have an integer kernel, but layers that no integer
    module can stand for run as they were calibrated, in float.

    Args:
        model_or_result: From `quantize_model`, or a module that holds its network; not changed.
        data: Batches for the ranges of outputs that no quantized layer reads directly.
        backend: Engine that it will be converted for; default: `exact_engine`.
        forward_fn: Runs one batch, as in `quantize_model`.

    Returns:
        The prepared network, in evaluation mode, with nothing left to observe.

    Raises:
        HostError: The network holds no quantized layer, or computes between the stubs what torch has no integer
            kernel for; the message names the module.
        CalibrationError: ``data`` is empty.
    """
    network, forward = quantized_module(model_or_result), forward_fn or call_model
    quantized = quantized_layers(network)
    refuse_signed_inputs(quantized)
    batches = list(data)
    if not batches:
        raise CalibrationError("The data for the ranges of outputs holds no batch; give at least one.")
    engine = checked_engine(backend or exact_engine())
    model = copy.deepcopy(network).eval()
    has_stubs = any(isinstance(module, QuantStub) for module in model.modules())
    attributes = attributes_of(model)
    layers = put_carriers(model, quantized, lambda: forward(model, own_batch(batches[0])), engine)
    give_back(model, attributes)
    _fuse_rectifiers(model, list(layers), lambda: forward(model, own_batch(batches[0])))
    give_back(model, attributes)
    if not has_stubs:
        model = QuantWrapper(model)
        layers = {f"module.{name}": layer for name, layer in layers.items()}
    _set_qconfigs(model, layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age
        prepared: nn.Module = prepare(model.eval(), inplace=True)  # type: ignore[no-untyped-call]
    learned = {prepared.get_submodule(name): layer for name, layer in layers.items()}
    _place_learned(prepared, learned, lambda: forward(prepared, own_batch(batches[0])), engine)
    find_ranges(prepared, batches, forward)
    _try_converted(prepared, engine, lambda converted: forward(converted, own_batch(batches[0])))
    return prepared


def _try_converted(prepared: nn.Module, engine: str, run: Callable[[nn.Module], object]) -> None:
    """Run what a conversion makes of a prepared network.

    Raises:
        HostError: It cannot be run: the network computes what torch has no integer kernel for.
    """
    converted = convert_eager(prepared, engine)
    running = Running(converted)
    try:
        with running, torch.no_grad(), integer_engine(engine):
            run(converted)
    except Exception as error:  # whatever torch says of an operator without a kernel
        where = repr(running.path) if running.path else "the network itself"
        raise HostError(
            f"{where} cannot run on integers in torch.ao's eager mode ({type(error).__name__}: {error}). Use "
            "prepare_learned, whose graph runs in float what has no integer kernel, or put QuantStub and DeQuantStub "
            "around the part that has."
        ) from error


def convert_eager(prepared: nn.Module, backend: str | None = None) -> nn.Module:
    """Convert a prepared network to torch's integer modules, whatever its bits.

    Args:
        prepared: From `prepare_learned_eager`, or from ``prepare`` or ``prepare_qat`` with our
            classes after calibration; not changed.
        backend: Engine to convert for; default: `exact_engine`. The result runs under it only.

    Returns:
        The integer network. Integer poolings round each mean, which the prepared network does not.

    Raises:
        ConfigError: torch has no such engine here.
    """
    engine = checked_engine(backend or exact_engine())
    carried = copy.deepcopy(prepared).eval()
    clamps: dict[str, tuple[float, float]] = {}
    absorb_norms(carried)
    for name, module in carried.named_modules():
        lay_on_grid(module)
        quantizer = output_quantizer_of(module)
        bounds = None if quantizer is None else grid_range(cast(GridModule, quantizer))
        if bounds is not None:
            clamps[name] = bounds
    attributes, simulated = attributes_of(carried), simulated_layers(carried)
    with integer_engine(engine), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted: nn.Module = convert(carried)  # type: ignore[no-untyped-call]
    put_back(converted, simulated)
    for name, bounds in clamps.items():
        clamp = QuantizedClamp(*bounds, contiguous=engine in CLAMPS_CONTIGUOUS)
        converted.set_submodule(name, nn.Sequential(converted.get_submodule(name), clamp))
    give_back(converted, attributes)
    return converted


class QuantizedClamp(nn.Module):
    """Clamps a quantized tensor to the range of a grid of fewer than 8 bits.

    Args:
        low: Lower bound, a real value on the grid.
        high: Upper bound, likewise.
        contiguous: Bring the tensor into its usual memory order first.
    """

    def __init__(self, low: float, high: float, contiguous: bool) -> None:
        super().__init__()
        self.low, self.high, self.contiguous = low, high, contiguous

    def forward(self, x: Tensor) -> Tensor:
        """Clamp ``x``, quantized, any shape."""
        return torch.clamp(x.contiguous() if self.contiguous else x, self.low, self.high)

    def extra_repr(self) -> str:
        """Say the bounds."""
        return f"{self.low:g}, {self.high:g}"


def _fuse_rectifiers(model: nn.Module, layers: list[str], run: Callable[[], object]) -> None:
    """Fuse each layer with the ReLU behind it, in place, where nothing else reads the one or is read by the other."""
    names = {model.get_submodule(name): name for name in layers}
    watch = MakersWatch()
    read: dict[str, set[nn.Module | None]] = {}

    def made(layer: nn.Module, args: object, output: object) -> None:
        watch.made(layer, output)

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            x = first_tensor(args, kwargs)
            read.setdefault(name, set()).add(watch.maker_of(x))
            watch.reading += [x] if x is not None else []

        return hook

    def after(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        if first_tensor(args, kwargs) is not None:
            watch.reading.pop()

    with Hooks() as hooks, torch.no_grad(), watch:
        for layer in names:
            hooks.after(layer, made)
        for name, module in model.named_modules():
            if type(module) is nn.ReLU:
                hooks.before(module, before(name), with_kwargs=True)
                hooks.after(module, after, with_kwargs=True)
        watch.note_use(run())
    readers: dict[nn.Module, list[str]] = {}
    for name, makers in read.items():
        for maker in makers - {None}:
            readers.setdefault(cast(nn.Module, maker), []).append(name)
    pairs = [
        [names[layer], *reading]
        for layer, reading in readers.items()
        if len(reading) == 1
        and read[reading[0]] == {layer}
        and layer not in watch.used_elsewhere
        and isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    if pairs:
        fuse_modules(model, pairs, inplace=True)  # type: ignore[no-untyped-call]


def _set_qconfigs(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
    for module in model.modules():
        is_stub = isinstance(module, QuantStub | DeQuantStub)
        set_qconfig(module, new_qconfig(output_quantizer, output_quantizer) if is_stub else None)
    for name, layer in layers.items():
        module = model.get_submodule(name)
        if not isinstance(module, Island):
            for each in (module, *module.children()):
                set_qconfig(each, new_qconfig(output_quantizer, Ready(layer.weight_fake_quant)))


def _place_learned(
    prepared: nn.Module, learned: dict[nn.Module, QuantizedLayer], run: Callable[[], object], engine: str
) -> None:
    """Give each output that quantized layers read the grid that the first of them learned for it.

    Layers that read something else, or on another grid, get theirs in front of them.
    """
    sources = _sources(prepared, learned, run)
    held = {output_quantizer_of(module) for module in prepared.modules()}
    for module, layer in learned.items():
        source = sources.get(module)
        if source is not None and source in held and source.observing and layer.input_fake_quant.quantizing:
            _fill(source, layer.input_fake_quant)
    regrids: dict[nn.Module, nn.Module] = {}
    for module, layer in learned.items():
        source, wanted = sources.get(module), layer.input_fake_quant
        if not isinstance(module, Island) and wanted.quantizing and not (source is not None and _equal(source, wanted)):
            regrids[module], source = Regrid(wanted), wanted
        if engine in INTEGER_BIAS and source is not None and not source.observing:
            lay_bias_on_grid(module, source)
    put_regrids(prepared, regrids)


def _equal(quantizer: LearnableFakeQuantize, other: LearnableFakeQuantize) -> bool:
    """Whether two quantizers, of which one may still observe, have one grid."""
    bounds = [(each.quant_min, each.quant_max) for each in (quantizer, other)]
    qparams = [torch.cat(each.calculate_qparams()) for each in (quantizer, other) if not each.observing]
    return bounds[0] == bounds[1] and len(qparams) == 2 and torch.equal(*qparams)


@torch.no_grad()
def _fill(quantizer: LearnableFakeQuantize, learned: LearnableFakeQuantize) -> None:
    """Make ``quantizer``, which hooks hold and nothing can replace, equal to the learned one."""
    quantizer.quant_min, quantizer.quant_max = learned.quant_min, learned.quant_max
    quantizer.set_qparams(learned.scale, learned.zero_point)
    quantizer.log_scale.copy_(learned.log_scale)
    quantizer.enable_observer(False)


@torch.no_grad()
def _sources(
    prepared: nn.Module, layers: Iterable[nn.Module], run: Callable[[], object]
) -> dict[nn.Module, LearnableFakeQuantize]:
    """Return by layer the quantizer whose output it reads, if it is the same at every call."""
    made: dict[int, tuple[LearnableFakeQuantize, Tensor]] = {}
    read: dict[nn.Module, list[LearnableFakeQuantize | None]] = {}

    def note_output(quantizer: nn.Module, _: object, output: Tensor) -> None:
        made[id(output)] = (cast(LearnableFakeQuantize, quantizer), output)

    def note_input(layer: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            maker = made.get(id(first_tensor(args, kwargs)))
            read.setdefault(layer, []).append(maker[0] if maker else None)

        return hook

    # Those of layers that run as they were calibrated have ended observing.
    quantizers = [m for m in prepared.modules() if isinstance(m, LearnableFakeQuantize) and m.observing]
    around = {m.layer: m for m in prepared.modules() if isinstance(m, Carrier)}
    with Hooks() as hooks, _looking_on(quantizers):
        for quantizer in quantizers:
            hooks.after(quantizer, note_output)
        for layer in layers:
            hooks.before(around.get(layer, layer), note_input(layer), with_kwargs=True)
        run()
    return {layer: made_by[0] for layer, made_by in read.items() if made_by[0] is not None and len(set(made_by)) == 1}


@contextmanager
def _looking_on(quantizers: list[LearnableFakeQuantize]) -> Iterator[None]:
    """Let quantizers run once without observing: each then returns a tensor of its own."""
    for quantizer in quantizers:
        quantizer.enable_observer(False)
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable_observer(True)
