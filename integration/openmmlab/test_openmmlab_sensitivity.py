"""``repapq sensitivity``, from a config to another one with the chosen bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration.openmmlab.scenes import CLASSIFIER, FEW_ITEMS, options
from repapq_plugin.cli import main
from repapq_plugin.hosts.openmmlab.settings import settings_of
from repapq_plugin.hosts.openmmlab.workbench import open_config
from repapq_plugin.sensitivity import Sensitivity


def sensitivity(config: Path, checkpoint: Path, folder: Path, *more: str) -> int:
    words = ["sensitivity", str(config), str(checkpoint), "-w", str(folder), "--bits", "3,8", *more]
    return main([*words, "-q", "activation_observer=min_max", *options(FEW_ITEMS)])


def test_the_config_that_is_written_gives_the_chosen_bits(
    classifier_checkpoint: Path,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home)
    folder, picture = tmp_path / "work", tmp_path / "picture.svg"
    budget = ("--mean-bits", "5", "--plot", str(picture), "--evaluations", "2")
    assert sensitivity(CLASSIFIER, classifier_checkpoint, folder, *budget) == 0
    shown = capsys.readouterr().out
    assert "Least damage with mean_bits=5" in shown and "top-1 % at w3a3" in shown
    assert picture.read_text().startswith("<?xml")
    assert not (folder / "checkpoint").exists()
    found = Sensitivity.load(folder / "sensitivity.json")
    assert sum(bool(option.scores) for _, option in found.ranking()) == 1 and found.scores
    bits = {name: tuple(pair) for name, pair in json.loads((folder / "layer_bits.json").read_text()).items()}
    assert len(set(bits.values())) == 2
    said = settings_of(open_config(folder / "mixed_precision.py"))
    assert said.quantizer.layer_bits == bits
    words = ["quantize", str(folder / "mixed_precision.py"), str(classifier_checkpoint), "-w", str(tmp_path / "int")]
    assert main([*words, "-q", "steps=0", "--no-compare", "--export", "none", *options(FEW_ITEMS)]) == 0
    layers = json.loads((tmp_path / "int" / "result.json").read_text())["calibration"]["plan"]["layers"]
    assert {name: (plan["weight_bits"], plan["activation_bits"]) for name, plan in layers.items()} == bits


@pytest.mark.parametrize("where", ["repapq", "test_cfg"])
def test_the_written_config_stands_on_the_key_that_the_config_uses(
    where: str, classifier_checkpoint: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    own = tmp_path / "own.py"
    loop = "type='RepAPQTestLoop', _delete_=True, " if where == "test_cfg" else ""
    keys = (
        "calibration=dict(num_samples=7), quantizer=dict(preset='w4a4', layer_bits={'*': (4, 6)}, first_last_bits=None)"
    )
    own.write_text(f"_base_ = [{str(CLASSIFIER)!r}]\n{where} = dict({loop}{keys})\n")
    folder = tmp_path / "work"
    free = ("-q", "layer_bits={'backbone.stage_1*': (4, 6)}", "--keep-8bit", "3")
    assert sensitivity(own, classifier_checkpoint, folder, *free) == 0
    settings = settings_of(open_config(folder / "mixed_precision.py"))
    bits = settings.quantizer.layer_bits
    assert "*" not in bits and (4, 6) in bits.values() and list(bits.values()).count((8, 8)) == 3
    assert (settings.num_samples, settings.quantizer.weight_bits) == (7, 4)


def test_an_interruption_and_a_budget_out_of_reach_lose_no_measurement(
    classifier_checkpoint: Path,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home)
    folder = tmp_path / "work"
    assert sensitivity(CLASSIFIER, classifier_checkpoint, folder, "--mean-bits", "2.5") == 1
    said = capsys.readouterr().err
    assert "mean_bits=2.5 cannot be met: the nearest that the measured bit widths reach is" in said
    kept = {path: path.stat().st_mtime_ns for path in (folder / "checkpoint").glob("part-*")}
    assert len(kept) > 20
    before = (folder / "sensitivity.json").read_bytes()
    assert sensitivity(CLASSIFIER, classifier_checkpoint, folder, "--mean-bits", "5") == 1
    assert "go on with resume=True (--resume)" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sensitivity(CLASSIFIER, classifier_checkpoint, folder, "--mean-bits", "5", "--resume") == 0
    assert (folder / "sensitivity.json").read_bytes() == before
    assert not (folder / "checkpoint").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mean-bits", "0"), "mean_bits=0.0 is not allowed"),
        (("--plot", "a.jpg"), "plot='a.jpg' is not allowed; end it in .svg or .png"),
        (("--evaluations", "11"), "evaluations=11 is not allowed; choose a whole number from 0 to 10"),
        (("--bits", "3"), "give at least two bit widths"),
        (("-q", "type=NNCF"), "quantizer.type='NNCF' is not measured"),
        (("-q", "layer_bits={'nowhere*': (4, 4)}"), "layer_bits: the pattern 'nowhere*' matches no module"),
    ],
)
def test_wrong_input_ends_in_a_line(
    more: tuple[str, ...],
    message: str,
    classifier_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sensitivity(CLASSIFIER, classifier_checkpoint, tmp_path / "work", *more) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("sensitivity.json")) and not list(tmp_path.rglob("part-*"))
