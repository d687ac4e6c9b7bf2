"""Copies to work on: what belongs to the caller, a model or its batches, is never changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.modules import has_hooks, replace_modules
from repapq_plugin.core.running import is_out_of_memory
from repapq_plugin.core.tensors import members_of, rebuilt, tensors_of
from repapq_plugin.errors import HostError

HALVES = (torch.float16, torch.bfloat16)
"""Floating dtypes that are calibrated, and run afterwards, in float32."""

GATHER = (
    "gather its state (get_model_state_dict of torch.distributed.checkpoint.state_dict, full_state_dict=True), load it "
    "into a network of one process, and give that"
)
"""What to do with a network of which this process holds a share."""

T = TypeVar("T")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of parallel training and of compilation.

    Raises:
        HostError: Its parameters are spread over processes, or not there yet.
    """
    inner = _inside(model)
    if inner is not None:
        return unwrapped(inner)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("FullyShardedDataParallel", "FSDPModule") or kind.startswith("FSDP"):
            raise HostError(f"{name or 'The model'!r} is sharded over processes ({kind}); {GATHER}.")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise HostError(f"{name!r} has no values yet (a lazy module); run the model once on a batch first.")
        if hasattr(parameter, "placements"):
            raise HostError(f"{name!r} is spread over processes ({type(parameter).__name__}); {GATHER}.")
        if parameter.is_meta:
            raise HostError(f"{name!r} is on the meta device and has no values; load the checkpoint first.")
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    """Return what a wrapper of compilation or of parallel training wraps; ``None`` for other modules."""
    compiled = dict(module.named_children()).get("_orig_mod")
    if compiled is not None:
        return compiled
    return module.module if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) else None


def _take_off_wrappers(model: nn.Module) -> None:
    """Put what wrappers inside a network wrap into their places; those that carry hooks stay."""
    while inner := {m: i for m in model.modules() if (i := _inside(m)) is not None and not has_hooks(m)}:
        replace_modules(model, inner)


def _separate_memory(model: nn.Module) -> None:
    """Give each parameter and buffer memory of its own: what one learns must not change another.

    One parameter that several layers hold stays one.
    """
    spans = []
    for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        if tensor.numel() and tensor.layout is torch.strided and tensor.data_ptr():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            length = 1 + sum((size - 1) * stride for size, stride in steps)
            spans.append((str(tensor.device), tensor.data_ptr(), length * tensor.element_size(), tensor))
    end, where = 0, ""
    for device, start, length, tensor in sorted(spans, key=lambda span: span[:3]):
        if device == where and start < end:
            tensor.data = tensor.detach().clone()
        else:
            where, end = device, start
        end = max(end, start + length)


def plain_copy(model: T) -> T:
    """Return a copy of a module; tensors that it keeps from an earlier run, with their graph, are copied without it."""
    return copy.deepcopy(model, _copies_of_bound_tensors(cast(nn.Module, model)))


def own_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model, in evaluation mode, whose floating tensors are at least float32.

    Tensors that a model keeps from an earlier run, with their graph, are copied without it. Tensors of inference mode
    become ordinary ones. Wrappers inside it are taken off, and views of one memory become tensors of their own.

    Args:
        model: Any network; not changed.

    Raises:
        HostError: See `unwrapped`; or the model cannot be copied.
    """
    model = unwrapped(model)
    with torch.inference_mode(False), torch.no_grad():
        try:
            copied = plain_copy(model)
        except Exception as error:  # whatever the user's own classes raise
            if is_out_of_memory(error):
                raise
            raise HostError(
                f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); give a network that "
                "copy.deepcopy takes."
            ) from error
        _take_off_wrappers(copied)
        _separate_memory(copied)
        copied.eval()
        copied._apply(_in_float32)  # type: ignore[no-untyped-call]
    return copied


def _copies_of_bound_tensors(model: nn.Module) -> dict[int, object]:
    """Return copies of the tensors that ``copy.deepcopy`` refuses or copies wrongly, by their ``id``."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for tensor in tensors_of([dict(vars(module)), module._buffers]):
            if tensor.grad_fn is not None or tensor.is_inference():
                memo[id(tensor)] = tensor.detach().clone()
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_inference():
                memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    return memo


def own_batch(batch: T) -> T:
    """Return a batch whose tensors are copies, half precision as float32; what holds no tensor stays what it is."""

    def copied(tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return _in_float32(tensor.detach().clone())

    return changed(batch, copied)


def smaller(batch: T) -> T | None:
    """Return the first half of a batch, if it says how many samples it holds.

    Tensors hold samples along their first axis, lists one in each member; all must agree in the number.
    """
    size = samples_in(batch)
    return None if size is None or size < 2 else _between(batch, 0, size // 2)


def samples_in(batch: object) -> int | None:
    """Return how many samples a batch holds (see `smaller`); ``None`` if it does not say."""
    sizes = _sample_counts(batch)
    return sizes.pop() if len(sizes) == 1 else None


def sample_of(batch: T, index: int) -> T:
    """Return a batch of one sample out of one that says how many it holds."""
    return _between(batch, index, index + 1)


def _sample_counts(value: object) -> set[int]:
    if isinstance(value, Tensor):
        return {value.shape[0] if value.dim() else 0}
    if isinstance(value, list):
        return {len(value)}
    members = members_of(value)
    return {count for member in members or () for count in _sample_counts(member)}


def _between(value: T, start: int, stop: int) -> T:
    if isinstance(value, Tensor | list):
        return cast(T, value[start:stop])
    return rebuilt(value, lambda member: _between(member, start, stop))


def changed(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Return nested containers like ``value`` with every tensor changed (see `rebuilt`)."""
    if isinstance(value, Tensor):
        return cast(T, change(value))
    return rebuilt(value, lambda member: changed(member, change))


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


def takes_halves(module: nn.Module) -> None:
    """Let a network that computes in float32 take batches in half precision."""
    module.register_forward_pre_hook(_widen, with_kwargs=True)


def _widen(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    return changed(args, _in_float32), changed(kwargs, _in_float32)


def is_half(model: nn.Module) -> bool:
    """Whether a model holds parameters in half precision."""
    return any(parameter.dtype in HALVES for parameter in model.parameters())
