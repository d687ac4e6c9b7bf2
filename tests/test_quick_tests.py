"""What is left of the tests without those marked `slow` still has something to say of every part."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(HERE.rglob("test_*.py"))
FOLDERS = sorted({path.parent.relative_to(HERE) for path in FILES})

NEVER_LEFT_OUT = (
    "contracts/test_own_backend.py",
    "core/test_losses.py",
    "core/test_quant_primitives.py",
    "method/test_qpr.py",
    "observers/test_observer_laws.py",
    "quantizers/test_fake_quantize.py",
    "reparam/test_reparam_timm.py",
    "test_config.py",
    "test_job.py",
    "test_structure.py",
)
"""Files that have a quick test whatever happens to their folder."""


def is_slow(mark: ast.expr) -> bool:
    return ast.unparse(mark) in ("slow", "pytest.mark.slow")


def marks_of(tree: ast.Module) -> Iterator[ast.expr]:
    """Marks that a module gives all its tests."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            yield from node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]


def quick_tests(source: str) -> list[str]:
    """Test functions and classes of a module that are not marked as slow as a whole."""
    tree = ast.parse(source)
    if any(map(is_slow, marks_of(tree))):
        return []
    tests = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))
        or (isinstance(node, ast.ClassDef) and node.name.startswith("Test"))
    ]
    return [node.name for node in tests if not any(map(is_slow, node.decorator_list))]


def test_there_are_folders_and_slow_tests() -> None:
    names = {str(folder) for folder in FOLDERS}
    assert {"core", "contracts", "export", "method", "observers", "reparam/by_algebra"} <= names
    assert any(not quick_tests(path.read_text()) for path in FILES)


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_each_folder_has_a_quick_test(folder: Path) -> None:
    assert any(quick_tests(path.read_text()) for path in (HERE / folder).glob("test_*.py"))


@pytest.mark.parametrize("name", NEVER_LEFT_OUT)
def test_the_main_laws_have_a_quick_test(name: str) -> None:
    assert quick_tests((HERE / name).read_text())


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("def test_a(): ...\ndef other(): ...\nclass TestB: ...", ["test_a", "TestB"]),
        ("@pytest.mark.slow\ndef test_a(): ...\n@x\ndef test_b(): ...", ["test_b"]),
        ("@slow\n@x('y')\ndef test_a(): ...\n@pytest.mark.slow\nclass TestB: ...", []),
        ("pytestmark = pytest.mark.slow\ndef test_a(): ...", []),
        ("pytestmark = [pytest.mark.filterwarnings('x'), pytest.mark.slow]\ndef test_a(): ...", []),
        ("pytestmark = pytest.mark.filterwarnings('slow')\ndef test_a(): ...", ["test_a"]),
    ],
)
def test_quick_tests_are_told_from_slow_ones(source: str, wanted: list[str]) -> None:
    assert quick_tests(source) == wanted
