"""What `repapq doctor` says of packages that fit and of packages that do not, without importing any of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from repapq_plugin.cli import doctor
from repapq_plugin.cli.doctor import FEATURES, KNOWN, Diagnosis, diagnose
from repapq_plugin.cli.installed import Package, accepted_versions, installed_packages, own_requirements

GOOD = {
    name: Package(name, version, (distribution,))
    for name, version, distribution in [
        ("torch", "2.12.1+cpu", "torch"),
        ("torchvision", "0.27.1", "torchvision"),
        ("mmengine", "0.10.4", "mmengine"),
        ("mmcv", "2.1.0", "mmcv"),
        ("mmdet", "3.3.0", "mmdet"),
        ("mmseg", "1.4.2", "onedl-mmsegmentation"),
        ("onnx", "1.18.0", "onnx"),
    ]
}


def judged(*changed: Package, without: str = "", own: tuple[str, ...] = ()) -> Diagnosis:
    packages = {**GOOD, **{package.name: package for package in changed}}
    return diagnose({name: package for name, package in packages.items() if name != without}, own)


def test_what_fits_works_and_what_is_absent_is_no_fault() -> None:
    diagnosis = judged()
    assert diagnosis.healthy
    assert {"any PyTorch model", "MMDetection configs", "MMSegmentation configs"} <= set(diagnosis.works)
    assert diagnosis.missing["MMYOLO configs"] == ("mmyolo",)
    assert diagnosis.missing["export to OpenVINO, scores and latency on it"] == ("openvino",)
    assert set(diagnosis.works) | set(diagnosis.missing) == set(FEATURES)


def test_what_sensitivity_needs_is_listed() -> None:
    assert judged().missing["bits by sensitivity"] == ("scipy",)
    there = judged(Package("scipy", "1.17.0", ("scipy",)), Package("matplotlib", "3.10.0", ("matplotlib",)))
    assert {"bits by sensitivity", "plots of sensitivity"} <= set(there.works)


def test_nothing_but_torch_is_enough_for_plain_models() -> None:
    diagnosis = diagnose({"torch": GOOD["torch"]})
    assert diagnosis.healthy
    assert diagnosis.works == ("any PyTorch model",)


@pytest.mark.parametrize(
    ("package", "text", "remedy"),
    [
        (
            Package("mmdet", "3.3.0", ("mmdet",), accepts={"mmcv": ("2.0.0rc4", "2.1.0")}),
            "mmdet 3.3.0 refuses mmcv 2.1.0 at import: it takes >=2.0.0rc4 and <2.1.0.",
            "install a mmcv that is >=2.0.0rc4 and <2.1.0",
        ),
        (
            Package("mmyolo", "0.6.0", ("mmyolo",), accepts={"mmdet": ("3.4.0", "4.0.0")}),
            "mmyolo 0.6.0 refuses mmdet 3.3.0",
            "install a mmdet",
        ),
        (
            Package("torchvision", "0.26.0", ("torchvision",), requires=("torch (==2.11.0)", "numpy")),
            "torchvision needs torch ==2.11.0, but 2.12.1+cpu is installed.",
            'pip install "torch==2.11.0", or another torchvision',
        ),
        (
            Package("mmdet", "3.5.1", ("mmdet", "onedl-mmdetection")),
            "mmdet and onedl-mmdetection both install mmdet",
            "pip uninstall mmdet onedl-mmdetection",
        ),
        (
            Package("mmcv", "2.1.0", ("mmcv-lite",), operators="it was installed without its compiled operators"),
            "mmcv 2.1.0: it was installed without its compiled operators. mmdet, mmseg cannot be imported",
            "pip uninstall mmcv-lite, then install mmcv itself",
        ),
        (
            Package("mmcv", "2.1.0", ("mmcv",), operators="its compiled operators cannot be loaded (undefined symbol)"),
            "mmcv 2.1.0: its compiled operators cannot be loaded (undefined symbol)",
            "build mmcv beside this torch",
        ),
    ],
)
def test_each_mismatch_is_said_with_a_remedy(package: Package, text: str, remedy: str) -> None:
    diagnosis = judged(package)
    assert not diagnosis.healthy
    problem = diagnosis.problems[0]
    assert problem.package == package.name
    assert text in problem.text
    assert remedy in problem.remedy
    needing = [feature for feature, names in FEATURES.items() if package.name in names]
    assert needing and not set(needing) & set(diagnosis.works)


def test_a_package_that_a_toolbox_needs_and_lacks_is_a_problem() -> None:
    diagnosis = judged(Package("mmdet", "3.3.0", ("mmdet",), accepts={"mmcv": ("2.0.0", "2.2.0")}), without="mmcv")
    assert [problem.text for problem in diagnosis.problems] == [
        "mmdet 3.3.0 needs mmcv >=2.0.0 and <2.2.0, which is not installed."
    ]


def test_our_own_needs_count_and_exact_pins_of_the_tested_stack_do_not() -> None:
    diagnosis = judged(own=("onnx>=1.19",))
    assert [(problem.package, problem.remedy) for problem in diagnosis.problems] == [
        ("onnx", 'pip install "onnx>=1.19"')
    ]
    own = own_requirements()
    assert any(requirement.startswith("torch") for requirement in own)
    assert not any("==" in requirement for requirement in own)


@pytest.mark.parametrize(
    ("version", "operator", "wanted", "met"),
    [
        ("2.12.1+cpu", "==", "2.12.1", True),
        ("2.12", "==", "2.12.0", True),
        ("2.9.0", "<", "2.12", True),
        ("2.12.1", "<", "2.12", False),
        ("2.12.1", "~=", "2.6", True),
        ("3.0", "~=", "2.6", False),
        ("2.6.3", "~=", "2.6.1", True),
        ("2.7", "~=", "2.6.1", False),
        ("1.18.2", "==", "1.18.*", True),
        ("1.19", "!=", "1.18.*", True),
        ("1.18", "!=", "1.18", False),
        ("2.0.0rc4", ">=", "2.0.0", True),
        ("2.0", ">", "2.0.0", False),
        ("2.7.0.dev20250101+cu126", "==", "2.7.0.dev20250101", True),
        ("2.12.1+cpu", "==", "2.12.1+cpu", True),
        ("a branch of mine", ">=", "2", True),
        ("2.0", ">=", "1.3.*", True),
    ],
)
def test_versions_are_compared_as_releases(version: str, operator: str, wanted: str, met: bool) -> None:
    assert doctor.meets(version, operator + wanted) is met


def test_a_requirement_that_nobody_can_read_asks_for_nothing() -> None:
    unreadable = Package("mmdet", "3.3.0", ("mmdet",), requires=("torch>=1.3.*",))
    assert doctor.parsed("torch>=1.3.*") is None
    assert judged(unreadable).healthy
    readable = doctor.parsed("torch (>=2.6,<3)")
    assert readable is not None and readable.name == "torch"


def _install(site: Path, distribution: str, version: str, module: str, source: str = "", *requires: str) -> None:
    """Lay out a package as pip leaves it."""
    information = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
    (information / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {text}" for text in requires)]) + "\n")
    (information / "RECORD").write_text(f"{module}/__init__.py,,\n{information.name}/METADATA,,\n")
    (site / module).mkdir(exist_ok=True)
    (site / module / "__init__.py").write_text(source)


def test_packages_are_read_under_either_distribution_name_without_importing_them(tmp_path: Path) -> None:
    explosive = "raise SystemExit('was imported')\n"
    limits = "mmcv_minimum_version = '2.0.0rc4'\nmmcv_maximum_version = '2.2.0'\nmmengine_minimum_version = '0.7.1'\n"
    _install(tmp_path, "mmengine-lite", "0.10.4", "mmengine", explosive)
    _install(tmp_path, "onedl-mmcv", "2.3.6", "mmcv", explosive, "numpy", "torch>=2.0; extra == 'all'", "mmengine>=0.8")
    _install(tmp_path, "mmdet", "3.3.0", "mmdet", limits + explosive)
    _install(tmp_path, "mmsegmentation", "1.2.2", "mmseg", "MMCV_MIN = '2.0.0'\nMMCV_MAX = '2.2.0'\n" + explosive)
    _install(tmp_path, "onedl-mmsegmentation", "1.4.2", "mmseg", "")
    found = installed_packages(KNOWN, [str(tmp_path)])
    assert found.keys() == {"mmengine", "mmcv", "mmdet", "mmseg"}
    assert (found["mmengine"].version, found["mmengine"].distributions) == ("0.10.4", ("mmengine-lite",))
    assert found["mmcv"].requires == ("numpy", "mmengine>=0.8")
    assert found["mmcv"].operators == "it was installed without its compiled operators"
    assert found["mmdet"].accepts == {"mmcv": ("2.0.0rc4", "2.2.0"), "mmengine": ("0.7.1", "")}
    assert set(found["mmseg"].distributions) == {"mmsegmentation", "onedl-mmsegmentation"}
    faulty = {problem.package for problem in diagnose(found).problems}
    assert faulty == {"mmcv", "mmdet", "mmseg"}


def test_the_upper_case_limits_of_another_toolbox_are_read(tmp_path: Path) -> None:
    source = tmp_path / "__init__.py"
    source.write_text("MMCV_MIN = '2.0.0rc4'\nMMCV_MAX = '2.2.0'\nother_min = '1'\n")
    assert accepted_versions(source, KNOWN) == {"mmcv": ("2.0.0rc4", "2.2.0")}
    assert accepted_versions(tmp_path / "nowhere.py", KNOWN) == {}


def test_operators_built_for_something_else_are_named(tmp_path: Path) -> None:
    (tmp_path / "mmcv").mkdir()
    _install(tmp_path, "mmcv", "2.1.0", "mmcv")
    (tmp_path / "mmcv" / "_ext.cpython-311-x86_64-linux-gnu.so").write_bytes(b"not a library")
    assert "cannot be loaded" in installed_packages(KNOWN, [str(tmp_path)])["mmcv"].operators


@pytest.mark.parametrize("healthy", [True, False])
def test_the_command_says_it_and_ends_in_0_or_1(
    healthy: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from repapq_plugin.cli import main

    lite = Package("mmcv", "2.1.0", ("mmcv-lite",), operators="it was installed without its compiled operators")
    diagnosis = judged() if healthy else judged(lite)
    monkeypatch.setattr(doctor, "examine", lambda: diagnosis)
    assert main(["doctor"]) == (0 if healthy else 1)
    out = capsys.readouterr().out
    assert all(name in out for name in KNOWN)
    assert "works: any PyTorch model" in out
    assert "not available: MMYOLO configs: " in out
    assert ("remedy: pip uninstall mmcv-lite" in out) != healthy
    assert out.count("problem:") == (0 if healthy else 1)


BLOCKED = """
import sys
from importlib.machinery import PathFinder

found = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    # As if not installed: torch asks whether onnx is there, and an error in place of an answer ends its import.
    if name.partition(".")[0] in {"mmengine", "mmcv", "mmdet", "mmyolo", "mmseg", "mmpretrain", "nncf", "torchao",
                                  "openvino", "onnx", "onnxruntime", "onnxscript", "timm"}:
        return None
    return found(name, path, target)

PathFinder.find_spec = find_spec
import torch
from torch import nn
import repapq_plugin
from repapq_plugin.cli import main

torch.set_num_threads(1)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
data = [torch.randn(4, 3, 12, 12) for _ in range(2)]
result = repapq_plugin.quantize_model(model, data, repapq_plugin.RepAPQConfig.from_preset("w8a8", steps=4))
path = result.save(sys.argv[1])
again = repapq_plugin.CalibrationResult.load(path, model).model(data[0])
print("same", torch.equal(again, result.model(data[0])))
print("near", bool((again - model(data[0])).abs().mean() < 0.05))
try:
    repapq_plugin.export_onnx(result.model, data[0], sys.argv[1] + ".onnx")
except repapq_plugin.RepAPQError as error:
    print("export", error)
open(sys.argv[1] + ".py", "w").write("model = dict()")
print("code", main(["quantize", sys.argv[1] + ".py"]))
"""


@pytest.mark.slow
def test_plain_pytorch_works_where_no_host_can_be_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "result.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["same True", "near True"]
    assert lines[2].startswith("export Export needs the onnx package: pip install")
    # The command needs onnx first, and says so; nothing ends in a traceback.
    assert lines[3] == "code 1"
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
