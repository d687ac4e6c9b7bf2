"""Clear errors for what cannot work, and the user's model unharmed by all of them."""

from __future__ import annotations

import copy
from typing import Any

import nncf
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import RepAPQConfig
from repapq_plugin.errors import CalibrationError, ConfigError, HostError
from repapq_plugin.hosts.nncf import quantize

FAST = RepAPQConfig(steps=1)


def images(count: int = 2, *shape: int) -> nncf.Dataset:
    return nncf.Dataset([torch.randn(1, *(shape or (3, 16, 16))) for _ in range(count)])


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "empty": ({"calibration_dataset": nncf.Dataset([])}, CalibrationError, "holds no item"),
    "no dataset": ({"calibration_dataset": [1]}, ConfigError, r"list is not allowed; choose nncf\.Dataset"),
    "channels": (
        {"calibration_dataset": images(2, 4, 16, 16)},
        CalibrationError,
        r"Item 0 .*float32 \(1, 4, 16, 16\).*transform_func",
    ),
    "a label beside the image": (
        {"calibration_dataset": nncf.Dataset([(torch.randn(1, 3, 16, 16), torch.tensor([1]))])},
        CalibrationError,
        r"Item 0 .*\(float32 \(1, 3, 16, 16\), int64 \(1,\)\).*transform_func",
    ),
    "a later item": (
        {"calibration_dataset": nncf.Dataset([torch.randn(1, 3, 16, 16), torch.randn(1, 5, 16, 16)])},
        CalibrationError,
        "Item 1 .*5, 16, 16",
    ),
    "not finite": (
        {"calibration_dataset": nncf.Dataset([torch.full((1, 3, 16, 16), float("nan"))] * 2)},
        CalibrationError,
        "NaN or Inf",
    ),
    "target": ({"repapq": FAST.replace(target="tensorrt")}, ConfigError, r"target='tensorrt'.*NNCF.*'openvino'"),
    "subset": ({"subset_size": 0}, ConfigError, "subset_size=0"),
    "scope": (
        {"ignored_scope": nncf.IgnoredScope(names=["nowhere/conv2d/0"])},
        ConfigError,
        "nowhere/conv2d/0.*merged model, such as stem/conv/conv2d/0",
    ),
    "pattern": ({"ignored_scope": nncf.IgnoredScope(patterns=["nowhere.*"])}, ConfigError, "nowhere"),
    "everything ignored": (
        {"ignored_scope": nncf.IgnoredScope(patterns=[".*"])},
        CalibrationError,
        "no convolution or linear layer",
    ),
    "device": ({"target_device": nncf.TargetDevice.CPU_SPR}, ConfigError, "CPU_SPR.*choose ANY, CPU, GPU, NPU"),
    "bias correction": ({"fast_bias_correction": False}, ConfigError, "fast_bias_correction=False"),
    "config": ({"repapq": {"steps": 1}}, ConfigError, "RepAPQConfig"),
    "dropping": ({"repapq": RepAPQConfig(steps=1, drop_probability=0.5)}, ConfigError, "drop_probability=0.5"),
    "keep_float": ({"repapq": RepAPQConfig(steps=1, keep_float=("nowhere",))}, ConfigError, "nowhere"),
    "bits": ({"repapq": RepAPQConfig(steps=1, layer_bits={"nowhere": (4, 4)})}, ConfigError, "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_refused_by_name(name: str, chain: nn.Module) -> None:
    arguments, kind, words = BAD[name]
    model = copy.deepcopy(chain)
    before = copy.deepcopy(model.state_dict())
    given = {"calibration_dataset": images(), "repapq": FAST, **arguments}
    with pytest.raises(kind, match=f"(?s){words}"):
        quantize(model, given.pop("calibration_dataset"), **given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "forward" not in vars(model) and not hasattr(model, "__nncf_hooks")


class Untraceable(nn.Module):
    """Runs its layer under a transformation that NNCF's kernels do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda image: self.conv(image[None])[0])(x)


def test_a_network_that_nncf_cannot_trace_is_named() -> None:
    with pytest.raises(HostError, match="(?s)cannot quantize Untraceable.*quantize_model"):
        quantize(Untraceable(), images(), repapq=FAST)


class Unseen(Untraceable):
    """Hides its layer from whoever watches functions."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return self.conv(x)


def test_a_network_of_which_nncf_sees_nothing_is_not_called_quantized() -> None:
    with pytest.raises(CalibrationError, match="NNCF quantized no convolution or linear layer"):
        quantize(Unseen(), images(), repapq=FAST)


def test_scripted_and_traced_networks_are_refused(chain: nn.Module) -> None:
    scripted = torch.jit.trace(chain, torch.zeros(1, 3, 16, 16))
    with pytest.raises(HostError, match="'the model'.*torch.nn.Module it was made from"):
        quantize(scripted, images(), repapq=FAST)
    inside = nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(nn.ReLU()))
    with pytest.raises(HostError, match="cannot trace '1'"):
        quantize(inside, images(), repapq=FAST)


def test_a_model_with_hooks_of_nncf_is_refused(chain: nn.Module) -> None:
    from nncf.torch.function_hook import wrap_model

    with pytest.raises(HostError, match="carries NNCF's hooks already"):
        quantize(wrap_model(copy.deepcopy(chain)), images(), repapq=FAST)


def test_nothing_to_quantize_is_said() -> None:
    with pytest.raises(CalibrationError, match="nothing to quantize"):
        quantize(nn.Sequential(nn.ReLU(), nn.Flatten()), images(), repapq=FAST)


def test_the_seed_of_the_caller_is_left_alone(chain: nn.Module) -> None:
    good, bad = images(), images(2, 4, 16, 16)
    torch.manual_seed(5)
    wanted = torch.rand(2)
    torch.manual_seed(5)
    quantize(chain, good, repapq=FAST)
    with pytest.raises(CalibrationError):
        quantize(chain, bad, repapq=FAST)
    assert torch.equal(torch.rand(2), wanted)
