"""What was planted in a network is named: a channel, a sample, a dead filter, too few bits."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import RepAPQConfig
from repapq_plugin.diagnosis import Diagnosis, UnitDiagnosis, diagnose
from repapq_plugin.diagnosis.judge import BIT, ENOUGH, Noise, bit_remedy, outliers_of, wanted_snr
from repapq_plugin.diagnosis.table import MOMENTS, Outlier, combined
from tests.support.networks import Chain, settle

QUICK = RepAPQConfig(weight_bits=4, activation_bits=4, first_last_bits=None, steps=0)
CHANNEL, SAMPLE = 1, 6


def images(planted: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    batches = [torch.rand(4, 3, 16, 16) for _ in range(3)]
    batches[SAMPLE // 4][SAMPLE % 4, CHANNEL] *= planted
    return batches


def unit(found: Diagnosis, name: str) -> UnitDiagnosis:
    return next(each for each in found.units if each.name == name)


class Two(nn.Sequential):
    """Two convolutions; what the first writes, the second reads."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))


def two() -> Two:
    torch.manual_seed(1)
    return Two().eval()


def test_a_planted_sample_is_named_with_its_channel() -> None:
    found = diagnose(two(), images(planted=50.0), QUICK)
    first = found.units[0]
    assert [outlier.channel for outlier in first.outliers] == [CHANNEL]
    outlier = first.outliers[0]
    assert outlier.samples == (SAMPLE,) and not outlier.everywhere
    assert outlier.share == pytest.approx(1 / 12)
    assert outlier.peaks[0] == pytest.approx(outlier.peak) == float(first.peaks.max())


def test_a_planted_channel_is_named_and_equalizing_is_said_to_help() -> None:
    model = two()
    with torch.no_grad():
        model[0].weight[5] *= 40
        model[0].bias[5] = 1.0  # type: ignore[index]
        model[2].weight[:, 5] /= 40
    found = diagnose(model, images(), QUICK.replace(equalize=False))
    second = found.units[1]
    assert [outlier.channel for outlier in second.outliers] == [5] and second.outliers[0].everywhere
    remedy = second.remedies[0]
    assert (remedy.name, remedy.how) == ("equalize", "equalize=True")
    assert remedy.gain > 8
    done = diagnose(model, images(), QUICK).units[1]
    assert done.remedies[0].how == ""  # the configuration does it already
    assert done.snr > second.snr + 5


def test_a_dead_filter_read_with_huge_weights_is_said_to_be_folded() -> None:
    model = two()
    with torch.no_grad():
        model[0].weight[7] = 0
        model[0].bias[7] = 0.01  # type: ignore[index]
        model[2].weight[:, 7] = 60.0
    config = QUICK.replace(fold_constants=False, equalize=False)
    remedy = diagnose(model, images(), config).units[1].remedies[0]
    assert (remedy.name, remedy.how) == ("fold_constants", "fold_constants=True")
    assert remedy.gain > 5
    unit = diagnose(model, images(), config.replace(weight_bits=8, activation_bits=8)).units[1]
    assert unit.snr < 20  # bits are not proposed for what folding cures
    assert {each.name for each in unit.remedies} <= {"fold_constants", "equalize"}


def test_a_unit_that_is_behind_the_others_gets_more_bits() -> None:
    behind = QUICK.replace(weight_bits=8, activation_bits=8, layer_bits={"2": (3, 3)})
    first, second = diagnose(two(), images(), behind).units
    assert first.remedies == ()
    (remedy,) = (each for each in second.remedies if each.name == "bits")
    ((layer, wanted),) = ast.literal_eval(remedy.how.removeprefix("layer_bits=")).items()
    assert layer == second.layer and min(wanted) > 3
    better = diagnose(two(), images(), behind.replace(layer_bits={layer: wanted})).units[1]
    assert better.snr == pytest.approx(second.snr + remedy.gain, abs=BIT / 2)
    assert not any(each.name == "bits" for each in better.remedies)


def test_what_eight_bits_do_not_reach_stays_float() -> None:
    (remedy,) = bit_remedy("a", (8, 8), Noise(5.0, 3.0), 20.0, ())
    assert (remedy.name, remedy.how) == ("keep_float", "keep_float=['a']")
    (remedy,) = bit_remedy("a", (4, 4), Noise(22.0, 4.0), 18.0, ())
    assert remedy.how == "layer_bits={'a': (4, 7)}"
    assert bit_remedy("a", (4, 4), Noise(18.0, 18.0), 18.0, ()) == ()  # less than a bit behind
    assert bit_remedy("a", (4, 4), Noise(40.0, 21.0), 90.0, ()) == ()


def test_samples_of_their_own_are_told_before_bits() -> None:
    rare = Outlier(2, 9.0, 9.0, (6,), (9.0,), 0.01)
    (remedy,) = bit_remedy("a", (4, 4), Noise(21.0, 4.0), 18.0, (rare,))
    assert "samples 6 hold outliers that others do not" in remedy.reason
    everywhere = Outlier(2, 9.0, 9.0, (6,), (9.0,), 0.9)
    (remedy,) = bit_remedy("a", (4, 4), Noise(21.0, 4.0), 18.0, (everywhere,))
    assert "samples" not in remedy.reason


def test_what_is_wanted_is_the_typical_and_not_too_much() -> None:
    assert wanted_snr([5.0, 11.0, 12.0, float("nan")]) == 11.0
    assert wanted_snr([30.0, 40.0]) == wanted_snr([]) == ENOUGH


def test_every_unit_is_seen_at_every_moment_and_merging_changes_no_input(tmp_path: Path) -> None:
    found = diagnose(settle(Chain()), images(), QUICK)
    assert {each.name for each in found.units} == {unit.name for unit in found.units} and len(found.units) > 4
    blocks = 0
    for each in found.units:
        assert each.moments.keys() == MOMENTS.keys()
        branched, merged = each.moments["branched"].inputs.by_channel, each.moments["merged"].inputs.by_channel
        torch.testing.assert_close(branched.maximum, merged.maximum, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(branched.kurtosis, merged.kurtosis, rtol=1e-2, atol=1e-2, equal_nan=True)
        weights = each.moments["merged"].weights
        assert weights is not None and weights.by_channel.maximum.shape == merged.maximum.shape
        blocks += each.moments["branched"].weights is not None
    assert blocks == len(found.result.merges)
    said = json.loads(found.save(tmp_path / "diagnosis.json").read_text())
    assert [each["name"] for each in said["units"]] == [each.name for each in found.units]
    assert set(said["units"][0]["moments"]["merged"]["inputs"]) == {
        *("maximum", "kurtosis", "top_share", "snr", "by_channel")
    }


def test_a_diagnosis_leaves_the_network_as_it_was() -> None:
    model = settle(Chain())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    diagnose(model, images(), QUICK)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_memory_does_not_grow_with_the_batches() -> None:
    few, many = (diagnose(two(), images() * times, QUICK) for times in (1, 3))
    for one, three in zip(few.units, many.units, strict=True):
        assert three.peaks.shape == (one.peaks.shape[0], 3 * one.peaks.shape[1])
        assert one.moments["merged"].inputs.by_channel.kurtosis == pytest.approx(
            three.moments["merged"].inputs.by_channel.kurtosis, rel=1e-9, nan_ok=True
        )


def test_nothing_stands_out_of_equal_channels() -> None:
    assert outliers_of(torch.ones(5, 7)) == outliers_of(torch.zeros(5, 7)) == outliers_of(torch.zeros(0, 0)) == ()


def test_noise_of_two_factors_adds() -> None:
    assert combined((20.0, 20.0)) == pytest.approx(17, abs=0.02)
    assert combined((20.0, float("nan"))) == pytest.approx(20)
    assert combined((float("inf"), 30.0)) == pytest.approx(30)
