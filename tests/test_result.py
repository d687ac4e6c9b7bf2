import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.errors import ResultError
from tests.support.networks import Chain, Fragile, Pyramid, batches, settle


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model = settle(Pyramid())
    return model, quantize_model(model, batches(), RepAPQConfig.from_preset("w4a4", steps=5))


def test_a_saved_result_comes_back_equal(pair, tmp_path):
    model, result = pair
    loaded = CalibrationResult.load(result.save(tmp_path / "a" / "result.safetensors"), model)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        for a, b in zip(floating_tensors(loaded.model(x)), floating_tensors(result.model(x)), strict=True):
            assert torch.equal(a, b)
    assert loaded.summary() == result.summary()
    assert loaded.config == result.config
    assert loaded.units == result.units
    assert loaded.merges == result.merges
    layers = dict(loaded.model.named_modules())
    assert layers["classes"].input_fake_quant is layers["boxes"].input_fake_quant
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result.safetensors"]


def test_the_networks_own_parameters_require_no_gradients_in_a_loaded_result(pair, tmp_path):
    model, result = pair
    loaded = CalibrationResult.load(result.save(tmp_path / "result.safetensors"), model)
    assert any(parameter.requires_grad for parameter in model.parameters())
    for network in (result.model, loaded.model):
        own = {name: value for name, value in network.named_parameters() if "fake_quant." not in name}
        assert own and not any(parameter.requires_grad for parameter in own.values())


def test_buffers_that_share_memory_are_saved(tmp_path):
    torch.manual_seed(0)
    model = settle(Chain())
    model.register_buffer("table", torch.arange(4.0))
    model.register_buffer("head", model.table[:2])
    result = quantize_model(model, batches(), RepAPQConfig(steps=0))
    result.model.head = result.model.table[:2]  # a copy of a network may share or not
    loaded = CalibrationResult.load(result.save(tmp_path / "result.safetensors"), model)
    assert loaded.model.head.tolist() == [0.0, 1.0] and loaded.model.table.tolist() == [0.0, 1.0, 2.0, 3.0]


class TiedToFragile(torch.nn.Module):
    """Two layers of one weight, of which one runs inside its network only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 1), Fragile()
        self.other.blocks = torch.nn.Conv2d(8, 8, 1)
        self.other.blocks.weight = self.one.weight
        self.head = torch.nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.other.allowed = True
        try:
            return self.head(self.other(self.one(self.stem(x).sigmoid()).sigmoid()).sigmoid())
        finally:
            self.other.allowed = False


def test_tied_weights_of_which_one_stayed_float_come_back_apart(tmp_path):
    model = TiedToFragile().eval()
    result = quantize_model(model, batches(), RepAPQConfig.from_preset("w4a4", steps=2))
    assert set(result.float_layers) == {"other.blocks"}
    assert not torch.equal(result.model.one.weight, result.model.other.blocks.weight)
    loaded = CalibrationResult.load(result.save(tmp_path / "result.safetensors"), model)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.model(x), result.model(x))


def test_the_summary_is_plain_json(pair):
    _, result = pair
    assert json.loads(json.dumps(result.summary(), allow_nan=False))["scheme"] == result.config.scheme


def test_another_model_is_refused(pair, tmp_path):
    _, result = pair
    path = result.save(tmp_path / "result.safetensors")
    with pytest.raises(ResultError, match="does not fit this model"):
        CalibrationResult.load(path, settle(Chain()))


def test_a_missing_a_cut_and_a_foreign_file_are_refused(pair, tmp_path):
    model, result = pair
    with pytest.raises(ResultError, match="nowhere"):
        CalibrationResult.load(tmp_path / "nowhere.safetensors", model)
    path = result.save(tmp_path / "result.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ResultError, match="Cannot read"):
        CalibrationResult.load(path, model)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ResultError, match="not a result of this plugin"):
        CalibrationResult.load(path, model)


def test_a_folder_that_cannot_be_written_is_an_error(pair, tmp_path):
    _, result = pair
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResultError, match="Cannot write"):
        result.save(tmp_path / "file" / "result.safetensors")


@pytest.mark.slow
def test_a_full_disk_leaves_the_older_file_and_nothing_else(tmp_path):
    script = """
        import resource, signal, sys, torch
        from pathlib import Path
        from tests.support.networks import Chain, batches, settle
        from repapq_plugin import RepAPQConfig, quantize_model
        from repapq_plugin.errors import ResultError
        result = quantize_model(settle(Chain()), batches(1), RepAPQConfig.from_preset("w8a8", steps=0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            result.save(Path(sys.argv[1]))
        except ResultError as error:
            print("refused:", error)
    """
    target = tmp_path / "result.safetensors"
    target.write_text("older")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(target)], capture_output=True, text=True, check=False
    )
    assert "refused: Cannot write" in done.stdout, done.stderr
    assert target.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["result.safetensors"]


# Made by version 0.1.0, before the rooms of the package were laid out anew:
#   torch.manual_seed(0)
#   keys = {"steps": 6, "schedule": "unit", "network_steps": 2, "keep_float": ("up",), "layer_bits": {"tower*": (6, 5)}}
#   quantize_model(settle(Pyramid(width=4)), batches(2), RepAPQConfig.from_preset("w4a4", **keys)).save(EARLIER)
# OUTPUTS holds what its model returned for `some_input()`.
EARLIER = Path(__file__).parent / "data" / "pyramid_result_1.safetensors"
OUTPUTS = EARLIER.with_name("pyramid_result_1_outputs.safetensors")


def some_input() -> torch.Tensor:
    return torch.linspace(-2, 2, 3 * 16 * 16).sin().reshape(1, 3, 16, 16)


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    return load_file(path), {**header, "result": json.loads(header["result"])}


def own_keys(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of format 1 by the keys of format 2, in which a layer is no longer one level below its name."""
    return {key.replace(".layer.", "."): value for key, value in tensors.items()}


def test_a_result_of_the_version_before_loads_bit_for_bit():
    loaded = CalibrationResult.load(EARLIER, Pyramid(width=4))
    stored, header = contents(EARLIER)
    assert header["format"] == "repapq-result-1"
    tensors = own_keys(stored)
    assert len(tensors) == len(stored) > sum(key in tensors for key in stored)
    state = loaded.model.state_dict()
    assert tensors.keys() <= state.keys()
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in tensors.items())
    assert json.loads(json.dumps(loaded.summary())) == as_saved_today(header["result"])
    assert loaded.float_layers == {"up": "kept float by the configuration"}
    assert loaded.layers["tower.0"] == (6, 5)
    assert sum(unit.kept for unit in loaded.units) == 6
    layers = dict(loaded.model.named_modules())
    assert layers["classes"].input_fake_quant is layers["boxes"].input_fake_quant


def as_saved_today(saved: dict[str, object]) -> dict[str, object]:
    """The record of format 1 with what format 2 adds to it."""
    return {**saved, "plan": {**saved["plan"], "baked": []}, "config": {**saved["config"], "solve": False, "views": 1}}


def test_a_result_of_the_version_before_computes_what_it_did_and_is_saved_as_version_2(tmp_path):
    loaded = CalibrationResult.load(EARLIER, Pyramid(width=4))
    with torch.no_grad():
        outputs = floating_tensors(loaded.model(some_input()))
    wanted = [value for _, value in sorted(load_file(OUTPUTS).items())]
    for output, value in zip(outputs, wanted, strict=True):
        # Convolutions add up in another order on another processor.
        torch.testing.assert_close(output, value, rtol=1e-5, atol=1e-6)
    (stored, header), (again, header_again) = contents(EARLIER), contents(loaded.save(tmp_path / "again.safetensors"))
    assert len(header_again.pop("digest")) == 64
    assert header_again == {"format": "repapq-result-2", "result": as_saved_today(header["result"])}
    tensors = own_keys(stored)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_what_was_saved_as_version_2_loads_as_what_it_was_loaded_from(tmp_path):
    earlier = CalibrationResult.load(EARLIER, Pyramid(width=4))
    again = CalibrationResult.load(earlier.save(tmp_path / "again.safetensors"), Pyramid(width=4))
    assert again.summary() == earlier.summary()
    state, wanted = again.model.state_dict(), earlier.model.state_dict()
    # What an observer remembers is not saved.
    kept = [key for key in wanted if "activation_post_process" not in key]
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in kept)


class NamedLayer(torch.nn.Module):
    """A network with a part of its own called ``layer``, and quantized layers beside and inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3, 2, 1)
        self.layer = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.ReLU())
        self.head = torch.nn.Module()
        self.head.layer = torch.nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head.layer(self.layer(self.stem(x).relu()))


def test_a_part_of_the_network_may_be_called_layer(tmp_path):
    model = NamedLayer().eval()
    result = quantize_model(model, batches(2), RepAPQConfig(steps=0))
    path = result.save(tmp_path / "result.safetensors")
    loaded = CalibrationResult.load(path, model)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.model(x), result.model(x))
    tensors, header = contents(path)
    older = {}
    for key, value in tensors.items():
        owner, _, name = key.rpartition(".")
        older[f"{owner}.layer.{name}" if owner in result.layers and name in ("weight", "bias") else key] = value
    header = {"format": "repapq-result-1", "result": json.dumps(header["result"])}
    save_file(older, tmp_path / "older.safetensors", metadata=header)
    assert torch.equal(CalibrationResult.load(tmp_path / "older.safetensors", model).model(x), result.model(x))


@pytest.mark.parametrize("size", ["width", "kind"])
def test_a_result_of_the_version_before_is_still_refused_by_other_models(size):
    other = Pyramid(width=6) if size == "width" else Chain()
    with pytest.raises(ResultError, match="does not fit this model"):
        CalibrationResult.load(EARLIER, other)


HEADERS = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "null": "null",
    "nothing": "{}",
    "a plan of text": {"plan": "x"},
    "folded as text": {"plan": {"folded": "ab", "layers": {}, "float_layers": {}}},
    "bits beyond all bounds": {
        "plan": {
            "folded": [],
            "layers": {"0": {"weight_bits": 10**9, "activation_bits": 8, "input_group": 0}},
            "float_layers": {},
        }
    },
    "an unknown key": {"config": {"bits": 3}},
    "a bad value": {"config": {"weight_bits": 99}},
    "units of text": {"units": ["x"]},
    "notes of numbers": {"notes": 3},
    "seconds of text": {"seconds": "soon"},
    "merges of null": {"merges": [None]},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = settle(Chain())
    path = tmp_path_factory.mktemp("saved") / "honest.safetensors"
    return model, quantize_model(model, batches(1), RepAPQConfig(steps=0)).save(path)


def test_an_honest_header_loads(saved: tuple[torch.nn.Module, Path]) -> None:
    model, honest = saved
    assert CalibrationResult.load(honest, model).layers


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", HEADERS)
def test_whatever_a_header_says_only_a_result_error_comes_of_it(
    name: str, version: int, saved: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    model, honest_path = saved
    with safe_open(honest_path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        honest = json.loads(file.metadata()["result"])
    path = tmp_path / "a.safetensors"
    odd = HEADERS[name]
    text = odd if isinstance(odd, str) else json.dumps({**honest, **odd})
    save_file(tensors, path, metadata={"format": f"repapq-result-{version}", "result": text})
    with pytest.raises(ResultError):
        CalibrationResult.load(path, model)


@pytest.mark.parametrize("steps", [0, 2])
def test_what_is_loaded_requires_gradients_where_what_was_saved_does(tmp_path, steps):
    model = settle(Chain())
    result = quantize_model(model, batches(2), RepAPQConfig.from_preset("w4a4", steps=steps))
    loaded = CalibrationResult.load(result.save(tmp_path / "result.safetensors"), model)
    required = {name: parameter.requires_grad for name, parameter in result.model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.model.named_parameters()} == required
    assert not any(required.values()) and any(name.endswith("log_scale") for name in required)
