"""Imports go one way only, and importing the package loads no host."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import repapq_plugin

PACKAGE = Path(repapq_plugin.__file__).parent
NAME = PACKAGE.name

# A module may import what stands above it. Modules of one line do not import each other.
ORDER = [
    ("errors",),
    ("config",),
    ("core",),
    ("observers",),
    ("policy",),
    ("reparam",),
    ("mimicnorm",),
    ("conditioning",),
    ("quantizers",),
    ("method",),
    ("result",),
    ("backend",),
    ("job",),
    ("export", "evaluation", "report"),
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
    "matplotlib", "mmcv", "mmdet", "mmengine", "mmpretrain", "mmseg", "mmyolo", "nncf", "onnx", "onnxruntime",
    "onnxscript", "openvino", "timm", "torchao", "torchvision",
}  # fmt: skip


def module_of(path: Path) -> tuple[str, ...]:
    """Path of a module below the package: ``("core", "losses")``; ``()`` is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every module name that a file imports, however deep in a function, with its line."""
    package = [NAME, *module_of(path)]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # A name taken from a package may be a module of it.
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def place(dotted: str) -> tuple[str, str]:
    """Top-level part of a module of the package, and for hosts which of them."""
    parts = dotted.split(".")[1:]
    top = parts[0] if parts and parts[0] in RANK else ""
    host = parts[1] if top == "hosts" and len(parts) > 1 else ""
    return top, "" if host in SHARED_BY_HOSTS else host


def violations(path: Path, source: str) -> list[str]:
    importer = ".".join([NAME, *module_of(path)])
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


FILES = sorted(PACKAGE.rglob("*.py"))


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
