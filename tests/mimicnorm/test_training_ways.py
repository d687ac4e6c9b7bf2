"""MimicNorm under mixed precision and with activations recomputed in the backward pass."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from repapq_plugin.mimicnorm import MimicNorm2d, WeightMean, convert


def network() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    return convert(model, torch.randn(4, 3, 32, 32)).model.train()


def largest_mean(model: nn.Module) -> float:
    return max(float(layer.weight.detach().flatten(1).mean(1).abs().max()) for layer in WeightMean(model).layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_keep_their_precision(dtype):
    norm = MimicNorm2d(4, scale=0.5)
    x = torch.randn(2, 4, 3, 3, dtype=dtype, requires_grad=True)
    y = norm(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert norm.scale.grad.dtype == norm.bias.grad.dtype == torch.float32
    assert float(norm.bias.grad[0]) == 18


def test_a_step_of_mixed_precision_keeps_filter_means_at_zero():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    WeightMean(model).attach(optimizer)
    before = copy.deepcopy(model.state_dict())
    seen = []
    model.layer4.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen == [torch.bfloat16] * 2
    assert bool(loss.isfinite()) and largest_mean(model) <= 1e-6
    assert not torch.equal(before["layer1.0.conv1.weight"], model.state_dict()["layer1.0.conv1.weight"])


def test_recomputed_activations_give_the_same_gradients():
    plain = network()
    saving = copy.deepcopy(plain)
    for stage in (saving.layer1, saving.layer2, saving.layer3, saving.layer4):
        run = stage.forward
        stage.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=False)
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    for model in (plain, saving):
        nn.functional.cross_entropy(model(x), labels).backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6), name
    assert all(torch.equal(one, other) for one, other in zip(plain.buffers(), saving.buffers(), strict=True))
