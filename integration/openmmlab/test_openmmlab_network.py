from __future__ import annotations

import copy

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from integration.openmmlab.scenes import CLASSIFIER, DETECTOR, random_model
from repapq_plugin.core.tensors import tensors_of, with_tensors
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab.network import TensorPath, serve_with, serving_points


def _segmentor() -> nn.Module:
    init_default_scope("mmseg")
    arch = {
        "num_blocks": [1, 1, 1, 1],
        "width_factor": [0.125] * 4,
        "group_layer_map": None,
        "se_cfg": None,
    }
    return MODELS.build(
        {
            "type": "EncoderDecoder",
            "data_preprocessor": {"type": "SegDataPreProcessor"},
            "backbone": {"type": "mmpretrain.RepVGG", "arch": arch, "out_indices": (3,)},
            "decode_head": {
                "type": "FCNHead",
                "in_channels": 64,
                "in_index": 0,
                "channels": 8,
                "num_convs": 1,
                "num_classes": 3,
                "norm_cfg": {"type": "BN"},
            },
            "test_cfg": {"mode": "whole"},
        }
    ).eval()


def _timm_classifier() -> nn.Module:
    init_default_scope("mmpretrain")
    return MODELS.build({"type": "TimmClassifier", "model_name": "mobileone_s0", "num_classes": 10}).eval()


MODELS_OF_EACH_TOOLBOX = {
    "mmyolo": (lambda: random_model(DETECTOR), (2, 3, 64, 64), 6),
    "mmpretrain": (lambda: random_model(CLASSIFIER), (2, 1, 28, 28), 1),
    "mmpretrain over timm": (_timm_classifier, (2, 3, 64, 64), 1),
    "mmseg": (_segmentor, (2, 3, 64, 64), 1),
}


class Doubled(nn.Module):
    """A stand-in runtime whose outputs can be told from the model's own."""

    def __init__(self, path: TensorPath) -> None:
        super().__init__()
        self.path, self.calls = path, 0

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        return tuple(2 * output for output in self.path(images))


@pytest.mark.parametrize("toolbox", MODELS_OF_EACH_TOOLBOX)
def test_the_tensor_path_is_served_in_place_of_the_network(toolbox: str) -> None:
    build, shape, outputs = MODELS_OF_EACH_TOOLBOX[toolbox]
    model, images = build(), torch.randn(shape)
    with torch.no_grad():
        own = tensors_of(model(images, mode="tensor"))
        path = TensorPath(copy.deepcopy(model))
        assert len(own) == outputs
        assert all(torch.equal(a, b) for a, b in zip(own, path(images), strict=True))
        runtime = Doubled(path)
        with serve_with(model, runtime, images[:1]) as serving:
            served = tensors_of(serving(images, mode="tensor"))
        after = tensors_of(model(images, mode="tensor"))
    assert runtime.calls == 1
    assert all(torch.equal(2 * a, b) for a, b in zip(own, served, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own, after, strict=True))


@pytest.mark.parametrize("toolbox", ["mmpretrain", "mmpretrain over timm"])
def test_predictions_come_from_the_runtime(toolbox: str) -> None:
    build, shape, _ = MODELS_OF_EACH_TOOLBOX[toolbox]
    model, images = build(), torch.randn(shape)
    other = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 10))
    with torch.no_grad(), serve_with(model, other, images[:1]):
        predictions = model(images, mode="predict")
    scores = torch.stack([prediction.pred_score for prediction in predictions])
    assert torch.allclose(scores, other(images).softmax(1))


def test_images_of_another_size_are_refused() -> None:
    model = random_model(CLASSIFIER)
    path = TensorPath(copy.deepcopy(model))
    with (
        serve_with(model, path, torch.zeros(1, 1, 28, 28)),
        pytest.raises(HostError, match=r"\(1, 28, 28\).*\(1, 32, 32\)"),
    ):
        model(torch.zeros(3, 1, 32, 32), mode="tensor")


def test_a_runtime_with_another_number_of_outputs_is_refused() -> None:
    model = random_model(DETECTOR)
    images = torch.zeros(1, 3, 64, 64)
    with (
        torch.no_grad(),
        serve_with(model, nn.Identity(), images),
        pytest.raises(HostError, match="1 outputs .* has 6"),
    ):
        model(images, mode="tensor")


def test_a_model_without_a_single_head_is_named() -> None:
    class TwoStage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.roi_head = nn.Identity()

    with pytest.raises(HostError, match="TwoStage has no single head"):
        serving_points(TwoStage())


def test_outputs_are_put_back_as_they_were_nested() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    nested = ([a, (b,)], {"c": c, "none": None})
    tensors = tensors_of(nested)
    assert [tensor.numel() for tensor in tensors] == [1, 2, 3]
    rebuilt = with_tensors(nested, iter([2 * tensor for tensor in tensors]))
    assert torch.equal(rebuilt[0][0], 2 * a)
    assert torch.equal(rebuilt[0][1][0], 2 * b)
    assert torch.equal(rebuilt[1]["c"], 2 * c)
    assert rebuilt[1]["none"] is None
