"""The test loop and the command line under a launcher: real processes, and environments that are half set."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.openmmlab.ranked import by_command, by_loop, record_in, small_config
from integration.openmmlab.scenes import ROOT, random_checkpoint
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab.launching import NEEDED, check_environment, launcher_in
from tests.support import ranked
from tests.support.comparing import difference
from tests.support.killing import same

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("small")
    config = small_config(folder)
    ranked.PRELOADED.append("integration.openmmlab.ranked")
    yield str(config), str(random_checkpoint(config, folder / "float.pth"))


def test_the_loop_calibrates_and_tests_on_each_ranks_share(small: tuple[str, str], tmp_path: Path) -> None:
    [alone] = ranked.values(1, by_loop, *small, str(tmp_path / "one"), 16)
    found = ranked.values(2, by_loop, *small, str(tmp_path / "two"), 16)
    assert [each["batches"] for each in found] == [[4, 4], [4, 4]] and alone["batches"] == [8, 8]
    assert same(found[0]["numbers"], found[1]["numbers"])
    assert difference(found[0]["numbers"], alone["numbers"]) <= 1e-4
    assert found[0]["metrics"] == found[1]["metrics"] == alone["metrics"]
    written = sorted(path.name for path in (tmp_path / "two").iterdir() if path.suffix in (".json", ".safetensors"))
    assert written == ["repapq.safetensors", "result.json"]
    assert record_in(tmp_path / "two")["scores"]["repapq"] == found[0]["metrics"]
    assert not (tmp_path / "two" / "checkpoint").exists()


def test_a_rank_without_samples_is_told(small: tuple[str, str], tmp_path: Path) -> None:
    found = ranked.values(2, by_loop, *small, str(tmp_path / "few"), 1)
    assert [each["batches"] for each in found] == [[1], []]
    assert "Rank 1 of 2 had no calibration data." in found[0]["notes"]
    assert same(found[0]["numbers"], found[1]["numbers"])


def test_the_command_writes_once(small: tuple[str, str], tmp_path: Path) -> None:
    assert ranked.values(2, by_command, *small, str(tmp_path / "work")) == [0, 0]
    names = {path.name for path in (tmp_path / "work").iterdir()}
    assert names == {"repapq.log", "repapq.onnx", "repapq.safetensors", "report.html", "result.json", "toolbox"}
    assert record_in(tmp_path / "work")["scores"]["repapq"]["accuracy/top1"] >= 0


@pytest.mark.parametrize("launcher", NEEDED)
def test_half_an_environment_is_refused_by_the_name_of_what_is_missing(launcher: str) -> None:
    whole = {name: "1" for name in NEEDED[launcher]} | {NEEDED[launcher][1]: "2"}
    check_environment(launcher, whole)
    for name in whole:
        with pytest.raises(HostError, match=rf"--launcher {launcher} needs {name} in the environment"):
            check_environment(launcher, {key: value for key, value in whole.items() if key != name})
    with pytest.raises(HostError, match=rf"{NEEDED[launcher][0]}=2 is not allowed with"):
        check_environment(launcher, whole | {NEEDED[launcher][0]: "2"})
    with pytest.raises(HostError, match=rf"{NEEDED[launcher][1]}='two' is not allowed"):
        check_environment(launcher, whole | {NEEDED[launcher][1]: "two"})


def test_one_of_several_processes_has_to_be_told_so() -> None:
    with pytest.raises(HostError, match="WORLD_SIZE='2' and RANK='1' say .* give --launcher pytorch"):
        check_environment("none", TORCHRUN)
    check_environment("none", {**TORCHRUN, "WORLD_SIZE": "1"})
    with pytest.raises(HostError, match="--launcher 'ray' is not known"):
        check_environment("ray", TORCHRUN)
    assert launcher_in(["config.py", "--launcher", "slurm"]) == launcher_in(["--launcher=slurm"]) == "slurm"
    assert launcher_in(["config.py", "--launcher"]) == "none"


def test_a_toolbox_tool_with_half_an_environment_does_not_begin(tmp_path: Path) -> None:
    tool = tmp_path / "tool.py"
    tool.write_text("print('begun')\n")
    words = [sys.executable, "-m", "repapq_plugin.hosts.openmmlab", str(tool), "--launcher", "pytorch"]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert "needs MASTER_ADDR, MASTER_PORT in the environment, which torchrun sets" in done.stderr
