"""The networks that MimicNorm is compared on, and the measures of outliers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from integration.bench.mimicnorm import PHOTOGRAPH_RUNS, RUNS, kurtosis, outliers, peak
from integration.bench.mimicnorm_cost import saved_bytes
from integration.bench.mimicnorm_networks import NETWORKS, PHOTOGRAPH_NETWORKS, build, repvgg
from integration.bench.mimicnorm_training import photographs, train
from repapq_plugin.mimicnorm import LastBatchNorm, WeightMean


@pytest.mark.parametrize(("network", "method"), RUNS)
def test_every_network_learns_every_way(network: str, method: str) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(256, 1, 28, 28), torch.randint(0, 10, (256,))
    model = build(network, method, images[:128])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses = train(model, images, labels, epochs=1, rate=1e-3, seed=0)
    assert len(losses) == 1
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert not all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    norms = [type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    means = [layer.weight.detach().flatten(1).mean(1).abs().max() for layer in WeightMean(model).layers]
    if method == "MimicNorm":
        assert norms == [LastBatchNorm] and float(max(means)) <= 1e-6
    else:
        assert bool(norms) == (method == "batch norm") and float(max(means)) > 1e-4


def test_measures_of_outliers_are_those_of_known_variables() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, 200_000, generator=generator, dtype=torch.float64)
    uniform = torch.rand(3, 200_000, generator=generator, dtype=torch.float64)
    assert kurtosis(normal).tolist() == pytest.approx([3] * 3, abs=0.1)
    assert kurtosis(uniform).tolist() == pytest.approx([1.8] * 3, abs=0.02)
    assert float(peak(torch.tensor([[-10.0] + [1.0, -1.0] * 5000]))) == pytest.approx(10, abs=0.1)


def test_outliers_are_those_of_the_merged_network() -> None:
    torch.manual_seed(0)
    model = repvgg(width=8).eval()
    batches = [torch.randn(4, 1, 28, 28) for _ in range(2)]
    found = outliers(model, batches)
    with torch.no_grad():
        model[4].conv_kxk.conv.weight[:, 0, 0, 0] += 5
    assert outliers(model, batches)["weights"]["peak"] > found["weights"]["peak"]


def test_fewer_activations_are_kept_without_norms() -> None:
    images, labels = torch.randn(4, 1, 28, 28), torch.arange(4)
    kept = {
        method: saved_bytes(build("ResNet-18", method, images).train(), images, labels)
        for method in ("batch norm", "MimicNorm", "no norm")
    }
    assert kept["no norm"] <= kept["MimicNorm"] < 0.85 * kept["batch norm"]
    assert set(NETWORKS) == {network for network, _ in RUNS}


def test_photographs_are_read_from_folders_and_learned(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0)
    for split, count in (("train", 130), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                image = pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{index}.png")
    whole, chosen = photographs(tmp_path, "test"), photographs(tmp_path, "val", held_out=10)
    assert (len(whole.images), len(whole.scored[0]), whole.classes) == (260, 6, 2)
    assert (len(chosen.images), len(chosen.scored[0])) == (250, 10)
    assert not any(torch.equal(image, other) for image in chosen.scored[0] for other in chosen.images)
    model = build("ShuffleNetV2", "MimicNorm", whole.images[:16], "authors", PHOTOGRAPH_NETWORKS)
    losses = train(model, whole.images, whole.labels, 1, 0.01, 0, "authors", moved=True)
    assert len(losses) == 1 and np.isfinite(losses[0])


@pytest.mark.parametrize("network", PHOTOGRAPH_NETWORKS)
def test_networks_for_photographs_have_one_norm_and_score_every_class(network: str) -> None:
    torch.manual_seed(0)
    model = build(network, "MimicNorm", torch.randn(4, 3, 32, 32), networks=PHOTOGRAPH_NETWORKS).eval()
    norms = [type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms == [LastBatchNorm] and (network, "MimicNorm") in PHOTOGRAPH_RUNS
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
