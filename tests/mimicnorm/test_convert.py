import copy

import pytest
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import nn

from repapq_plugin import RepAPQConfig, mimicnorm, quantize_model
from repapq_plugin.errors import ConfigError
from repapq_plugin.mimicnorm import LastBatchNorm, MimicNorm2d, WeightMean, convert, parametrize_weight_mean
from repapq_plugin.reparam import QARepVGGBlock
from repapq_plugin.reparam.fold import fold_conv_norm_pairs


def images(count: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


NETWORKS = {
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "shufflenet": torchvision.models.shufflenet_v2_x0_5,
    "vgg": torchvision.models.vgg11_bn,
}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["resnet18", pytest.param("resnet50", marks=slow), "shufflenet", pytest.param("vgg", marks=slow)]
)
def test_one_norm_is_left_and_activations_neither_vanish_nor_explode(name):
    model = NETWORKS[name](num_classes=10)
    before = copy.deepcopy(model.state_dict())
    converted = convert(model, images())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(norm) for norm in norms(converted.model)] == [LastBatchNorm]
    assert len(converted.replaced) == len(norms(model))
    spreads = []
    for layer in converted.model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda *seen: spreads.append(float(seen[2].std())))
    with torch.no_grad():
        converted.model.eval()(images())
    assert 0.1 < min(spreads) <= max(spreads) < 10


def test_residual_branches_end_in_a_scalar_that_falls_with_depth():
    converted = convert(NETWORKS["resnet18"](num_classes=10), images())
    assert list(converted.residual) == [f"layer{stage}.{block}.bn2" for stage in (1, 2, 3, 4) for block in (0, 1)]
    starts = list(converted.residual.values())
    # Two layers lie on a branch, one of them on the shortcut too where that has a convolution.
    assert starts[0] == pytest.approx(1.44) and starts[1] == pytest.approx(0.72)
    assert starts[2] == pytest.approx(1.2 / 3) and starts[-1] == pytest.approx(1.44 / 8)
    scaled = [m for m in converted.model.modules() if isinstance(m, MimicNorm2d) and m.scale is not None]
    assert len(scaled) == 8
    assert converted.last == ("fc",)


def test_every_block_of_a_stream_without_activations_has_its_scalar():
    model = torchvision.models.mobilenet_v2(num_classes=10)
    converted = convert(model, images())
    blocks = [name for name, module in model.named_modules() if getattr(module, "use_res_connect", False)]
    assert list(converted.residual) == [f"{name}.conv.3" for name in blocks]
    assert list(converted.residual.values()) == pytest.approx([1.2**3 / k for k in range(1, 11)])


def test_parameters_that_are_added_are_no_branches():
    blocks = [QARepVGGBlock(8, 16, stride=2), QARepVGGBlock(16, 16), QARepVGGBlock(16, 16)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    converted = convert(model, images())
    assert converted.residual == pytest.approx({"1.norm3x3": 1.0, "2.norm3x3": 1.2, "3.norm3x3": 0.6})


class Shuffled(nn.Module):
    """A residual branch whose tensor is copied on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.last = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((x + self.norm(self.two(self.one(x).contiguous().clone()))).mean((2, 3)))


def test_a_copied_tensor_is_as_deep_as_before():
    x = images().permute(0, 1, 3, 2)
    assert convert(Shuffled(), x).residual == pytest.approx({"norm": 1.44})


def test_a_norm_with_its_own_activation_keeps_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.Flatten(), nn.Linear(8 * 900, 10))
    converted = convert(model, images())
    assert [type(module) for module in converted.model[1]] == [MimicNorm2d, nn.ReLU]
    assert converted.replaced == ("1",)


class WithAuxiliaryHead(nn.Module):
    """A norm that runs in training only, and one without affine parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)
        self.auxiliary = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.body(x))
        if self.training:
            self.auxiliary(y)
        return self.last(y.mean((2, 3)))


def test_norms_that_do_not_run_are_kept_and_named():
    converted = convert(WithAuxiliaryHead(), images())
    assert converted.replaced == ("norm",) and converted.kept == ("auxiliary",)
    assert converted.model.norm.bias is not None


@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=slow), "shufflenet"])
def test_it_trains_and_merges_away_whole(name):
    torch.manual_seed(0)
    model = convert(NETWORKS[name](num_classes=4), images()).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    WeightMean(model).attach(optimizer)
    x, truth = images(8), torch.arange(8) % 4
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), truth)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    merged = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(x)
        fold_conv_norm_pairs(merged, lambda net: net(x))
        assert not [m for m in merged.modules() if isinstance(m, MimicNorm2d | LastBatchNorm)]
        assert (merged(x) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@slow
def test_parametrized_weights_are_baked_before_quantizing():
    model = convert(NETWORKS["resnet18"](num_classes=4), images()).model.eval()
    parametrize_weight_mean(model)
    result = quantize_model(model, [images()], RepAPQConfig.from_preset("w8a8", steps=2))
    assert all(unit.kept or unit.note for unit in result.units)
    assert not result.float_layers
    assert "layer1.0.conv1" in result.layers
    with torch.no_grad():
        wanted = model(images())
        assert (result.model(images()) - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def test_weight_mean_keeps_samples_apart():
    """Without it, what two images look like to the last layers is nearly the same."""

    def likeness(centred: bool) -> float:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
        for _ in range(15):
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers)
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        if centred:
            WeightMean(model).apply()
        with torch.no_grad():
            features = model(images(8, 16)).flatten(1)
        return float(torch.corrcoef(features).fill_diagonal_(0).sum() / 56)

    assert likeness(True) < 0.5 < 0.9 < likeness(False)


def test_frozen_layers_keep_their_norms():
    model = NETWORKS["resnet18"](num_classes=4)
    model.conv1.requires_grad_(False)
    converted = convert(model, images())
    assert converted.kept == ("bn1",)
    assert torch.equal(converted.model.conv1.weight, model.conv1.weight)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.bn(self.body(x)).relu()
        return self.a(x), self.b(x)


def test_a_last_layer_that_cannot_be_found_has_to_be_named():
    with pytest.raises(ConfigError, match="returns 2 values"):
        convert(TwoHeads(), images())
    with pytest.raises(ConfigError, match="last='c'"):
        convert(TwoHeads(), images(), last="c")
    assert isinstance(convert(TwoHeads(), images(), last="a").model.a[1], LastBatchNorm)


def test_lazy_modules_are_an_error():
    with pytest.raises(ConfigError, match="run the model once"):
        convert(nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), images())


def test_training_needs_less_memory_for_backward():
    def saved_bytes(model: nn.Module) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(images(4, 64)).square().mean()
        loss.backward()
        return sum(size for pointer, size in kept.items() if pointer not in weights)

    model = NETWORKS["resnet18"](num_classes=10).train()
    assert saved_bytes(convert(model, images()).model.train()) < 0.85 * saved_bytes(model)


def test_the_former_name_of_finish_stays() -> None:
    assert mimicnorm.prepare is mimicnorm.finish
