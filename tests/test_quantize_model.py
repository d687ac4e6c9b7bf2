import copy
import logging

import pytest
import torch
from torch import nn

from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.core.losses import mae_loss
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.errors import CalibrationError, ConfigError
from repapq_plugin.quantizers.layers import QuantizedLayer
from tests.support.networks import Chain, Fragile, Pyramid, TwoBranchBlock, batches, settle

slow = pytest.mark.slow

# Of the schedules, the quick tests run one.
schedules = pytest.mark.parametrize(
    "schedule", [pytest.param("unit", marks=slow), "stage", pytest.param("network", marks=slow)]
)


def config(preset: str = "w4a4", **overrides) -> RepAPQConfig:
    return RepAPQConfig.from_preset(preset, **{"steps": 30, **overrides})


def error(result: CalibrationResult, model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        pairs = zip(floating_tensors(result.model(x)), floating_tensors(model(x)), strict=True)
        return sum(float(mae_loss(a, b)) for a, b in pairs)


@slow
@pytest.mark.parametrize("network", [Chain, Pyramid])
@pytest.mark.parametrize("schedule", ["unit", "stage", "network"])
def test_learning_comes_nearer_to_the_float_network_than_plain_ranges(network, schedule):
    model, data, unseen = settle(network()), batches(8), torch.randn(64, 3, 16, 16)
    ranges = quantize_model(model, data, config().plain())
    # The network learns all at once, so the same work is more steps.
    steps = 300 if schedule == "network" else 60
    learned = quantize_model(model, data, config(schedule=schedule, steps=steps))
    assert error(learned, model, unseen) < 0.8 * error(ranges, model, unseen)


@schedules
def test_what_is_returned_is_folded_and_lies_on_its_grid(schedule):
    result = quantize_model(settle(Pyramid()), batches(), config(schedule=schedule))
    layers = [module for module in result.model.modules() if isinstance(module, QuantizedLayer)]
    assert len(layers) == len(result.layers) == 9
    for layer in layers:
        assert layer.affine is None
        assert torch.equal(layer.weight_fake_quant(layer.weight), layer.weight)
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert layer.input_fake_quant.quantizing
        assert not layer.input_fake_quant.observing


def test_eight_bits_are_close_to_float():
    model, unseen = settle(Chain()), torch.randn(64, 3, 16, 16)
    result = quantize_model(model, batches(), config("w8a8"))
    assert error(result, model, unseen) < 0.03 * float(model(unseen).abs().mean())


@slow
def test_the_user_s_model_is_not_touched():
    model = settle(Chain()).train()
    model.fc.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    quantize_model(model, batches(), config())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.training
    assert any(isinstance(module, TwoBranchBlock) for module in model.modules())


@slow
def test_the_same_seed_gives_the_same_result_and_leaves_torch_s_own_alone():
    model, data = settle(Chain()), batches()
    state = torch.random.get_rng_state()
    first = quantize_model(model, data, config(seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    second = quantize_model(model, data, config(seed=3))
    other = quantize_model(model, data, config(seed=4))
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(first.model(x), second.model(x))
    assert not torch.equal(first.model(x), other.model(x))


def test_a_result_that_is_not_better_on_held_out_batches_is_undone():
    model, data, x = settle(Chain()), batches(), torch.randn(4, 3, 16, 16)
    rates = {"weight": 1.0, "scale": 1.0, "affine": 1.0}
    spoiled = quantize_model(model, data, config("w8a8", learning_rates=rates, steps=5))
    ranges = quantize_model(model, data, config("w8a8", steps=0))
    assert not any(unit.kept for unit in spoiled.units)
    assert all("the starting point stays" in unit.note for unit in spoiled.units)
    torch.testing.assert_close(spoiled.model(x), ranges.model(x), rtol=1e-5, atol=1e-6)


@schedules
def test_work_is_linear_in_the_number_of_units(monkeypatch, schedule):
    def forwards(stages: int) -> float:
        counted = [0]
        convolve = nn.Conv2d._conv_forward

        def counting(self, x, weight, bias):
            counted[0] += 1
            return convolve(self, x, weight, bias)

        model = settle(Chain(widths=(8,) * stages, depth=2))
        with monkeypatch.context() as patch:
            # Float layers and quantized ones alike come through here, whoever calls them.
            patch.setattr(nn.Conv2d, "_conv_forward", counting)
            result = quantize_model(model, batches(2), config(schedule=schedule, steps=4))
        return counted[0] / len(result.units)

    assert forwards(8) <= 1.1 * forwards(4)


def test_layers_that_read_the_same_tensor_share_its_quantizer():
    result = quantize_model(settle(Pyramid()), batches(), config(steps=0))
    layers = dict(result.model.named_modules())
    assert layers["classes"].input_fake_quant is layers["boxes"].input_fake_quant
    assert layers["up"].input_fake_quant is not layers["lateral.0"].input_fake_quant


def test_first_and_last_layers_and_named_layers_have_bits_of_their_own():
    special = {"stages.1.*": (3, 5)}
    result = quantize_model(settle(Chain()), batches(), config(steps=0, layer_bits=special))
    assert result.layers["stem.conv"] == (8, 8)
    assert result.layers["fc"] == (8, 8)
    assert result.layers["stages.0.0.conv"] == (4, 4)
    assert result.layers["stages.1.1.conv"] == (3, 5)


def test_a_reduced_range_takes_a_bit_from_weights_of_eight_only():
    for preset, bits in (("w8a8", (7, 8)), ("w4a8", (4, 8))):
        result = quantize_model(
            settle(Chain()), batches(), config(preset, steps=0, reduce_range=True, first_last_bits=None)
        )
        assert set(result.layers.values()) == {bits}


def test_what_is_kept_float_is_listed_with_its_reason():
    result = quantize_model(settle(Chain()), batches(), config(steps=0, keep_float=("fc", "stages.2")))
    assert result.float_layers["fc"] == "kept float by the configuration"
    assert set(result.float_layers) == {"fc", "stages.2.0.conv", "stages.2.1.conv"}
    assert isinstance(result.model.fc, nn.Linear)


@slow
def test_progress_counts_to_the_end():
    seen = []
    quantize_model(settle(Chain()), batches(), config(steps=3), progress=seen.append)
    last = {report.phase: report for report in seen}
    assert (last["ranges"].done, last["ranges"].total) == (4, 4)
    assert last["calibration"].done == last["calibration"].total == 3 * 5


def test_an_empty_loader_is_an_error():
    with pytest.raises(CalibrationError, match="holds no batch"):
        quantize_model(settle(Chain()), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(value):
    model, data = settle(Chain()), batches()
    data[2][0, 0, 0, 0] = value
    with pytest.raises(CalibrationError, match=r"input of 'stem.conv' is not finite: 1 of"):
        quantize_model(model, data)


def test_weights_that_are_not_finite_name_the_layer_behind_them():
    model = settle(Chain())
    model.stages[1][0].large[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"stages\.1\.0"):
        quantize_model(model, batches())


def test_a_network_with_nothing_to_quantize_is_an_error():
    with pytest.raises(CalibrationError, match="nothing to quantize"):
        quantize_model(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), batches())
    with pytest.raises(CalibrationError, match="fc"):
        quantize_model(settle(Chain()), batches(), config(keep_float=("*",)))


class Closes(nn.Module):
    """Runs through a function that keeps the network itself, which no copy changes."""

    def __init__(self):
        super().__init__()
        self.body = Chain()
        self.run = lambda x: self.body(x)

    def forward(self, x):
        return self.run(x)


def test_networks_that_hide_their_layers_are_refused_with_what_to_do():
    model, data = settle(Chain()), batches()
    with pytest.raises(CalibrationError, match="keeps the model in a variable"):
        quantize_model(settle(Closes()), data)
    with pytest.raises(CalibrationError, match="A script hides its layers"):
        quantize_model(torch.jit.trace(model, data[0]), data)
    with pytest.raises(CalibrationError, match="A graph holds operations"):
        quantize_model(torch.export.export(model, (data[0],)).module(), data)


@pytest.mark.parametrize("key", ["keep_float", "units", "stages"])
def test_patterns_that_match_nothing_are_errors(key):
    with pytest.raises(ConfigError, match=rf"{key}: the pattern 'neck\.\*'"):
        quantize_model(settle(Chain()), batches(), config(**{key: ("neck.*",)}))


def test_dead_channels_and_constant_activations_are_handled():
    model = settle(Chain())
    with torch.no_grad():
        for part in (model.stages[0][1].large[1], model.stages[0][1].small[1], model.stages[0][1].identity):
            part.weight[:4], part.bias[:4], part.running_var[:4] = 0.0, 0.0, 0.0
        for part in (model.stages[1][0].large[1], model.stages[1][0].small[1]):
            part.weight.zero_()
            part.bias.zero_()  # every output of this block is zero
    result = quantize_model(model, batches(), config())
    x = torch.randn(4, 3, 16, 16)
    assert torch.isfinite(result.model(x)).all()


class FragileNetwork(Chain):
    def __init__(self) -> None:
        super().__init__(widths=(8, 8))
        self.stages[1] = Fragile()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stages[1].allowed = True
        try:
            return super().forward(x)
        finally:
            self.stages[1].allowed = False


@slow
def test_a_stage_that_cannot_be_run_alone_stays_float_and_the_rest_goes_on(caplog):
    model, x = settle(FragileNetwork()), torch.randn(4, 3, 16, 16)
    with caplog.at_level(logging.WARNING):
        result = quantize_model(model, batches(), config(stages=("stages.0", "stages.1")))
    assert set(result.float_layers) == {"stages.1.blocks.0.conv", "stages.1.blocks.1.conv"}
    assert "could not be run alone (KeyError" in result.float_layers["stages.1.blocks.0.conv"]
    assert "stages.1" in caplog.text
    assert any(unit.kept for unit in result.units if unit.name.startswith("stages.0"))
    assert set(result.layers) == {"stem.conv", "stages.0.0.conv", "stages.0.1.conv", "fc"}
    assert torch.isfinite(result.model(x)).all()


class OneInputForTwo(nn.Module):
    """Two layers read one tensor; one of them can run only inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), Fragile()
        self.other.blocks = nn.Conv2d(8, 8, 3)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        self.other.allowed = True
        try:
            return self.head(self.one(x).relu() + self.other(x).relu())
        finally:
            self.other.allowed = False


def test_a_stage_that_stays_float_leaves_the_input_that_it_shares_quantized():
    torch.manual_seed(0)
    result = quantize_model(OneInputForTwo(), batches(), config(stages=("stem", "one", "other", "head")))
    assert set(result.float_layers) == {"other.blocks"}
    for name in result.layers:
        layer = result.model.get_submodule(name)
        assert layer.input_fake_quant.quantizing and layer.weight_fake_quant.quantizing, name


class Stranger(nn.Module):
    """Two branches of a class that nobody taught."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.b = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.a(x) + self.b(x))


class FickleStranger(Stranger):
    """The same, but what it does depends on what it sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.a(x) + self.b(x)
        return torch.relu(total) if float(total.detach().mean()) < 1e6 else total


def test_an_unknown_block_whose_branches_are_one_convolution_is_merged_all_the_same():
    model = Chain(widths=(8, 8))
    model.stages[1] = Stranger()
    result = quantize_model(settle(model), batches(), config(steps=0))
    assert {"stages.1.a.0", "stages.1.b.0"}.isdisjoint(result.layers)
    assert [record.found_by for record in result.merges if record.name == "stages.1"] == ["algebra"]


def test_an_unknown_block_with_branches_is_warned_of_and_left_as_plain_convolutions(caplog):
    model = Chain(widths=(8, 8))
    model.stages[1] = FickleStranger()
    with caplog.at_level(logging.WARNING):
        result = quantize_model(settle(model), batches(), config(steps=0))
    assert "stages.1 (FickleStranger)" in caplog.text
    assert "register_branches" in result.notes[0]
    assert {"stages.1.a.0", "stages.1.b.0"} <= set(result.layers)
