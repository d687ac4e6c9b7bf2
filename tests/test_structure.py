"""Imports go one way only, each step stands in one place, and nothing grows too large."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import repapq_plugin
from tests.support.source import (
    FILES,
    NAME,
    PACKAGE,
    calls_of,
    circles,
    dotted,
    graph_of,
    imported,
    module_of,
    own_names,
    private_parts,
)

# A module may import what stands above it. Modules of one line do not import each other.
ORDER = [
    ("errors",),
    ("targets",),
    ("config",),
    ("core",),
    ("observers",),
    ("policy",),
    ("reparam",),
    ("mimicnorm",),
    ("conditioning",),
    ("quantizers",),
    ("merging",),
    ("method",),
    ("result",),
    ("backend",),
    ("job",),
    ("sensitivity", "diagnosis"),
    ("export", "evaluation", "report"),
    ("comparison",),
    ("_moved",),
    ("",),  # the package itself: its public names
    ("hosts", "configs"),
    ("cli",),
    ("__main__",),
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

SHARED_BY_HOSTS = {"hosted"}
"""Modules of `hosts` itself, which every host may import."""

# What belongs to one host, or to one runtime, and is loaded only by who uses it.
FOREIGN = {
    "ai_edge_litert", "executorch", "jinja2", "litert_torch", "matplotlib", "mmcv", "mmdet", "mmengine", "mmpretrain",
    "mmseg", "mmyolo", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "timm", "torchao", "torchvision",
}  # fmt: skip


def place(module: str) -> tuple[str, str]:
    """Top-level part of a module of the package, and for hosts which of them."""
    parts = module.split(".")[1:]
    top = parts[0] if parts and parts[0] in RANK else ""
    host = parts[1] if top == "hosts" and len(parts) > 1 else ""
    return top, "" if host in SHARED_BY_HOSTS else host


def violations(path: Path, source: str) -> list[str]:
    importer = dotted(path)
    top, host = place(importer)
    found = []
    for line, target in imported(path, ast.parse(source)):
        if target.split(".")[0] != NAME:
            continue
        other, other_host = place(target)
        inside = other == top and (top != "hosts" or not host or not other_host or host == other_host)
        if not inside and RANK[other] >= RANK[top]:
            found.append(f"{importer}, line {line}: {target}")
    return found


def test_every_part_of_the_package_has_its_place() -> None:
    parts = {module[0] for module in map(module_of, FILES) if module}
    assert parts <= set(RANK), "say in ORDER where it stands"
    assert {"core", "observers", "method"} <= parts


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(module_of(path)))
def test_imports_go_one_way_only(path: Path) -> None:
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("core/losses.py", "from repapq_plugin.errors import ConfigError", True),
        ("core/losses.py", "from repapq_plugin.observers.base import OBSERVERS", False),
        ("core/losses.py", "def f():\n    import repapq_plugin.quantizers.layers", False),
        ("core/losses.py", "from ..observers import base", False),
        ("core/losses.py", "from . import quant_primitives", True),
        ("core/losses.py", "from repapq_plugin import quantize_model", False),
        ("export/x.py", "from repapq_plugin.evaluation import runtimes", False),
        ("reparam/__init__.py", "from .branches import Branch", True),
        ("reparam/__init__.py", "from ..quantizers.layers import QuantizedLayer", False),
        ("hosts/openmmlab/loops.py", "from repapq_plugin.hosts.openmmlab import hooks", True),
        ("hosts/openmmlab/loops.py", "from repapq_plugin.hosts.torch_ao import backend", False),
        ("hosts/openmmlab/loops.py", "from repapq_plugin import quantize_model", True),
        ("hosts/openmmlab/loops.py", "from repapq_plugin.cli import main", False),
        ("cli/x.py", "from repapq_plugin.hosts import openmmlab", True),
        ("__init__.py", "from repapq_plugin.hosts import openmmlab", False),
        ("__init__.py", "from repapq_plugin.job import quantize_model", True),
    ],
)
def test_the_check_tells_right_from_wrong(module: str, line: str, allowed: bool) -> None:
    assert (violations(PACKAGE / module, line) == []) == allowed


def test_only_hosts_and_the_command_line_load_foreign_packages_at_import() -> None:
    found = []
    for path in FILES:
        if module_of(path)[:1] in (("hosts",), ("cli",)):
            continue
        statements = ast.Module([node for node in ast.parse(path.read_text()).body], [])
        for node in statements.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                found += [f"{path}: {name}" for _, name in imported(path, node) if name.split(".")[0] in FOREIGN]
    assert found == []


def test_importing_the_package_loads_no_host() -> None:
    code = f"import sys, {NAME}; print(*sorted({{name.partition('.')[0] for name in sys.modules}} & {FOREIGN!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_exists() -> None:
    assert all(hasattr(repapq_plugin, name) for name in repapq_plugin.__all__)
    assert sorted(repapq_plugin.__all__) == sorted(set(repapq_plugin.__all__))


TREES = {path: ast.parse(path.read_text()) for path in FILES}
OWN_NAMES = own_names(list(TREES.values()))
ROOT = PACKAGE.parent
TESTS = sorted(path for folder in ("tests", "integration") for path in (ROOT / folder).rglob("*.py"))


# -- no circle ----------------------------------------------------------------------------------------------------


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = graph_of({dotted(path): (path, tree) for path, tree in TREES.items()})
    assert len(graph) == len(FILES) and sum(map(len, graph.values())) > len(FILES)
    assert circles(graph) == []


SOURCES = {
    "a/__init__.py": "from repapq_plugin.a.one import f",
    "a/one.py": "f = 1",
    "a/two.py": "from repapq_plugin.a import f",
    "b.py": "def g():\n    import repapq_plugin.c",
    "c.py": "from . import b, a",
    "d.py": "from repapq_plugin.a.one import f",
}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, [["b", "c"]]),
        ({"b.py": ""}, []),
        ({"b.py": "", "a/one.py": "from repapq_plugin.a.two import h"}, [["a.one", "a.two"]]),
        ({"b.py": "", "a/two.py": "from repapq_plugin.a.one import f"}, []),
        ({"a/one.py": "import repapq_plugin.d"}, [["a.one", "d"], ["b", "c"]]),
    ],
    ids=["function", "none", "handed on", "direct", "two"],
)
def test_the_search_for_circles_finds_them(change: dict[str, str], wanted: list[list[str]]) -> None:
    files = {PACKAGE / name: ast.parse(source) for name, source in {**SOURCES, **change}.items()}
    graph = graph_of({dotted(path): (path, tree) for path, tree in files.items()})
    assert circles(graph) == [[f"{NAME}.{name}" for name in group] for group in wanted]


# -- one place for each step --------------------------------------------------------------------------------------

ONCE = (
    "AcrossBlockCalibrator",
    "equalize_channels",
    "find_stages",
    "find_units",
    "fold_constant_channels",
    "fold_norms",
    "plan_layers",
    "set_starting_ranges",
    "trace_network",
    ".attach_affine",
    ".run_alone",
)


@pytest.mark.parametrize("step", ONCE)
def test_each_step_of_the_pipeline_is_called_from_the_job_or_the_method_alone(step: str) -> None:
    found = {dotted(path): lines for path, tree in TREES.items() if (lines := list(calls_of(step, tree)))}
    if step == ".run_alone":  # a job hands it to the method, which runs stages with it
        assert {path.rpartition(".")[0] for path in found} <= {f"{NAME}.method"}
    else:
        where = "merging" if step == "fold_norms" else "job"
        outside = {name: len(lines) for name, lines in found.items() if not name.startswith(f"{NAME}.reparam.")}
        assert outside == {f"{NAME}.{where}": 1}


def test_a_job_merges_in_one_place_and_backends_alone_fold_affine_layers() -> None:
    assert len(list(calls_of("merge_for_inference", TREES[PACKAGE / "job.py"]))) == 1
    assert len(list(calls_of("merge_branches", TREES[PACKAGE / "merging.py"]))) == 1
    for step in ("attach_affine", "fold_affine"):
        found = [dotted(path) for path, tree in TREES.items() for _ in calls_of(step, tree)]
        assert f"{NAME}.backend" in found and len(set(found)) == len(found)
        assert all(name == f"{NAME}.backend" or name.endswith(".backend") for name in found)
    folds = [module_of(path) for path, tree in TREES.items() for _ in calls_of(".fold", tree)]
    assert folds.count(("job",)) == 1
    assert {module[0] for module in folds} <= {"job", "reparam"}  # whose maps fold by another name


@pytest.mark.parametrize(
    ("source", "name", "lines"),
    [
        ("f(1)\n\nx = [f(2) for _ in y]", "f", [1, 3]),
        ("a.f(1)\nf", "f", []),
        ("a.b.f(1)\nf(2)", ".f", [1]),
        ("F[int](1)", "F", [1]),
    ],
)
def test_calls_are_found(source: str, name: str, lines: list[int]) -> None:
    assert list(calls_of(name, ast.parse(source))) == lines


# -- sizes --------------------------------------------------------------------------------------------------------

LONGEST_MODULE, LONGEST_CLASS = 350, 200
"""Lines."""

MOST_LINES_WITH_ANY = 150


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_no_module_and_no_class_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE
    classes = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.ClassDef)]
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in classes}
    assert {name: size for name, size in sizes.items() if size > LONGEST_CLASS} == {}


def test_few_lines_leave_a_type_open() -> None:
    lines = [line for path in FILES for line in path.read_text().splitlines() if re.search(r"\bAny\b", line)]
    assert len(lines) <= MOST_LINES_WITH_ANY


# -- hosts and tests ----------------------------------------------------------------------------------------------

HOST_PACKAGES = ("nncf", "mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "mmyolo", "torchao", "torch.ao")

INTERNALS = (
    "mmengine.config.utils",
    "nncf.common.graph",
    "nncf.common.tensor_statistics",
    "nncf.quantization.algorithms",
    "nncf.torch.function_hook",
    "nncf.torch.layer_utils",
    "nncf.torch.quantization",
)
"""Modules of hosts that their documentation does not name."""


def private_uses(path: Path, tree: ast.AST, own: set[str]) -> list[str]:
    found = [f"line {line}: {what}" for line, what in private_parts(tree, HOST_PACKAGES, own)]
    internal = [(line, name) for line, name in imported(path, tree) if name.startswith(INTERNALS)]
    return found + [f"line {line}: {name}" for line, name in internal]


@pytest.mark.parametrize("path", sorted((PACKAGE / "hosts").rglob("*.py")), ids=dotted)
def test_what_a_host_keeps_private_is_used_in_one_file_of_it(path: Path) -> None:
    if path.name != "_compat.py":
        assert private_uses(path, TREES[path], OWN_NAMES) == []


def test_outside_hosts_nothing_of_a_host_is_private() -> None:
    for path, tree in TREES.items():
        if module_of(path)[:1] != ("hosts",):
            assert list(private_parts(tree, HOST_PACKAGES, {node.attr for node in attributes(tree)})) == []


def attributes(tree: ast.AST) -> list[ast.Attribute]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


@pytest.mark.parametrize(
    ("line", "private"),
    [
        ("from torch.ao.quantization.fx._lower_to_native_backend import is_copy_node", True),
        ("import mmengine._strange", True),
        ("from nncf.torch import __version__", False),
        ("from nncf.torch.function_hook import wrap_model", True),
        ("from nncf import Dataset", False),
        ("runner._hooks = []", True),
        ("self._hooks = []", False),
        ("job._calibrated(state)", False),
        ("from ._compat import hooks_of", False),
    ],
)
def test_private_use_is_told_from_public_and_own(line: str, private: bool) -> None:
    path = PACKAGE / "hosts" / "nncf" / "x.py"
    assert bool(private_uses(path, ast.parse(line), {"_calibrated"})) == private


def test_no_test_imports_another_test() -> None:
    found = []
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            found += [f"{path}: {name}" for name in names if any(p.startswith("test_") for p in name.split("."))]
    assert found == []
