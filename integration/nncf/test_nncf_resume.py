"""A calibration for NNCF that was interrupted goes on; one that NNCF was told other things about is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import nncf
import pytest
import torch
from nncf.quantization.algorithms.post_training.pipeline import create_ptq_pipeline
from nncf.torch.function_hook import wrap_model
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from torch import Tensor, nn

from repapq_plugin import RepAPQConfig
from repapq_plugin.errors import CheckpointError, ConfigError
from repapq_plugin.hosts.nncf import RepAPQAlgorithm, quantize, quantize_with_record
from repapq_plugin.hosts.nncf.backend import NNCFBackend, NNCFOptions
from repapq_plugin.merging import merge_for_inference
from tests.support.comparing import equal_numbers, numbers

CONFIG = RepAPQConfig.from_preset("w6a6", steps=2)


@pytest.fixture
def data() -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(8, 3, 16, 16) for _ in range(8)]


def test_quantize_goes_on_and_other_options_are_refused(chain: nn.Module, data: list[Tensor], tmp_path: Path) -> None:
    def run(resume: bool, mixed: bool = False) -> nn.Module:
        preset = nncf.QuantizationPreset.MIXED if mixed else None
        return quantize(chain, nncf.Dataset(data), preset=preset, repapq=CONFIG, checkpoint_dir=tmp_path, resume=resume)

    wanted = run(resume=False)
    for part in sorted(tmp_path.glob("part-*"))[2:]:
        part.unlink()
    with pytest.raises(CheckpointError, match="another calibration.*: preset was None and is mixed"):
        run(resume=True, mixed=True)
    assert equal_numbers(numbers(run(resume=True)), numbers(wanted))
    with pytest.raises(CheckpointError, match="finished parts"):
        run(resume=False)


def test_what_nncf_is_told_reads_the_same_in_every_process() -> None:
    scope = nncf.IgnoredScope(names=["one", "two"], types=["conv2d"])
    parameters = nncf.AdvancedQuantizationParameters(backend_params={"some": object()})
    told = NNCFBackend(NNCFOptions(ignored_scope=scope, advanced_parameters=parameters)).told()
    assert told["ignored_scope"].count("one") == 1
    assert "object object" in told["advanced_parameters"] and "0x" not in told["advanced_parameters"]


def test_a_step_of_a_pipeline_goes_on_and_another_quantized_model_is_refused(
    chain: nn.Module, data: list[Tensor], tmp_path: Path
) -> None:
    with torch.no_grad():
        merged = merge_for_inference(chain, lambda model: model(torch.zeros(1, 3, 16, 16))).network

    def run(resume: bool, images: list[Tensor]) -> nn.Module:
        dataset = nncf.Dataset(data)
        step = RepAPQAlgorithm(merged, dataset, CONFIG, checkpoint_dir=tmp_path, resume=resume)
        pipeline = create_ptq_pipeline(subset_size=4)
        pipeline.pipeline_steps.append([step])
        wrapped = wrap_model(copy.deepcopy(merged).eval())
        done: nn.Module = pipeline.run(GraphModelWrapper(wrapped, data[0]), nncf.Dataset(images)).model
        assert len(step.units) == 6
        return done

    wanted = run(False, data)
    for part in sorted(tmp_path.glob("part-*"))[2:]:
        part.unlink()
    with pytest.raises(CheckpointError, match="the quantized model was .* and is"):
        run(True, [3 * images for images in data])
    assert equal_numbers(numbers(run(True, data)), numbers(wanted))


def test_resuming_needs_a_folder(chain: nn.Module, data: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match="resume=True is not allowed without checkpoint_dir"):
        quantize_with_record(chain, nncf.Dataset(data), resume=True)
    with pytest.raises(ConfigError, match="resume=True is not allowed without checkpoint_dir"):
        RepAPQAlgorithm(chain, nncf.Dataset(data), resume=True)
