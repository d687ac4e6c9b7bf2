"""Which torch versions this package works with: builds an environment for each and runs the suites that fit.

    python -m integration.bench.torch_matrix --folder /var/tmp/torch_matrix

Needs uv and a package index. Environments are made one after the other in ``--folder`` (several gigabytes
each) and deleted again. Suites of a host that cannot be imported beside a torch version are not run, and the
table says why. Results go to ``results/torch_matrix.json`` after every version.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

import click

from integration.bench.reference import RESULTS, ROOT, write_result

VERSIONS = ("2.6.0", "2.10.0", "2.12.1", "2.13.0", "2.15.0")
PACKAGES = (
    *("numpy<2.3", "setuptools<81", "safetensors", "rich", "click", "packaging", "pytest", "hypothesis"),
    *("onnx", "onnxruntime", "onnxscript"),
)
TORCHAO = "torchao==0.18.0"

SUITES: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain PyTorch": (
        "import repapq_plugin",
        (
            *("tests/core", "tests/observers/test_observer_parity.py", "tests/quantizers", "tests/method"),
            *("tests/test_config.py", "tests/test_result.py", "tests/test_quantize_model.py"),
        ),
    ),
    "ONNX": ("import onnx, onnxruntime", ("tests/export/test_qdq_onnx.py", "tests/export/test_deploy.py")),
    "torch.ao": ("import repapq_plugin.hosts.torch_ao", ("integration/torch_ao",)),
    "torchao pt2e": ("import repapq_plugin.hosts.pt2e", ("integration/pt2e",)),
}
"""Per suite: what must be importable, and its paths."""


class Counts(TypedDict, total=False):
    """How one suite went, or why it was not run."""

    not_run: str
    tests: int
    failures: int
    errors: int
    skipped: int
    seconds: float
    failed: list[str]


def run(command: list[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository's root and keep what it says."""
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)


def build(folder: Path, version: str) -> tuple[Path, str]:
    """Return the interpreter of a new environment and, if it could not be built, why."""
    env = {**os.environ, "UV_LINK_MODE": "hardlink"}
    python = folder / "environment" / "bin" / "python"
    for command in (
        ["uv", "venv", "--quiet", "--python", platform.python_version(), str(folder / "environment")],
        ["uv", "pip", "install", "--quiet", "--python", str(python), f"torch=={version}", *PACKAGES],
        ["uv", "pip", "install", "--quiet", "--python", str(python), "--no-deps", TORCHAO],
    ):
        done = run(command, env)
        if done.returncode:
            return python, done.stdout.strip().splitlines()[-1]
    return python, ""


def run_suite(python: Path, folder: Path, needs: str, paths: tuple[str, ...]) -> Counts:
    """Return counts of one suite, or why it is not run."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    imported = run([str(python), "-c", needs], env)
    if imported.returncode:
        return {"not_run": imported.stdout.strip().splitlines()[-1]}
    report = folder / "report.xml"
    # timm brings torchvision, whose builds do not follow every torch of this list.
    options = [
        "--ignore=tests/method/test_partition.py",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        "-o",
        "addopts=--import-mode=importlib",
    ]
    # What integration tests share belongs to toolboxes that are not installed here.
    options += ["--noconftest"] if paths[0].startswith("integration") else []
    done = run([str(python), "-m", "pytest", *options, *paths], env)
    if not report.exists():
        return {"not_run": done.stdout.strip().splitlines()[-1]}
    suite = ElementTree.parse(report).getroot()[0]
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}: {str(found[0].get('message')).splitlines()[0][:200]}"
        for case in suite.iter("testcase")
        if (found := [*case.iter("failure"), *case.iter("error")])
    ]
    report.unlink()
    seconds = round(float(suite.get("time", 0)), 1)
    return cast(Counts, {**counts, "seconds": seconds, "failed": failed})


def cell(result: Counts) -> str:
    """Return what the table says about one suite."""
    if "not_run" in result:
        return "-"
    passed = result["tests"] - result["failures"] - result["errors"] - result["skipped"]
    return f"{passed} of {result['tests']}"


def run_suites(python: Path, folder: Path, suites: tuple[str, ...], row: dict[str, Counts | str]) -> None:
    """Run suites with one interpreter and say how each went."""
    for name in suites:
        row[name] = counts = run_suite(python, folder, *SUITES[name])
        click.echo(f"  {name}: {cell(counts)} {counts.get('not_run', '')}")
        for failed in counts.get("failed", []):
            click.echo(f"    {failed}")


def torch_version(python: Path) -> str:
    """Return the version of torch that an interpreter has."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    return run([str(python), "-c", code]).stdout.strip()


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where environments are made.")
@click.option("--torch", "versions", multiple=True, default=VERSIONS, help="Which versions.")
@click.option("--suite", "suites", multiple=True, type=click.Choice(list(SUITES)), default=list(SUITES))
@click.option("--python", type=click.Path(path_type=Path, exists=True), help="Use this interpreter, build nothing.")
def main(folder: Path, versions: tuple[str, ...], suites: tuple[str, ...], python: Path | None) -> None:
    """Run the suites on every version and print one table."""
    path = RESULTS / "torch_matrix.json"
    rows: dict[str, dict[str, Counts | str]] = json.loads(path.read_text())["rows"] if path.exists() else {}
    for version in (torch_version(python),) if python else versions:
        place = folder / version
        place.mkdir(parents=True, exist_ok=True)
        click.echo(f"torch {version}")
        row = rows.setdefault(version, {})
        try:
            interpreter, problem = (python, "") if python else build(place, version)
            row["not_built"] = problem
            if problem:
                click.echo(f"  {problem}")
            else:
                run_suites(interpreter, place, suites, row)
        finally:
            shutil.rmtree(place, ignore_errors=True)
            settings = {"python": platform.python_version(), "torchao": TORCHAO, "packages": PACKAGES}
            write_result("torch_matrix", {**settings, "rows": rows})
    click.echo("".join(f"{title:>16}" for title in ("torch", *SUITES)))
    for version, row in sorted(rows.items(), key=lambda item: [int(part) for part in item[0].split(".")]):
        cells = (cell(cast(Counts, row[name])) if name in row else "-" for name in SUITES)
        click.echo("".join(f"{text:>16}" for text in (version, *cells)))


if __name__ == "__main__":
    main()
