"""The package's own source, read as syntax: what each module imports, and where the package calls what."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import repapq_plugin

PACKAGE = Path(repapq_plugin.__file__).parent
NAME = PACKAGE.name
FILES = sorted(PACKAGE.rglob("*.py"))


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


def dotted(path: Path) -> str:
    """Full name of a module of the package."""
    return ".".join([NAME, *module_of(path)])


def graph_of(files: Mapping[str, tuple[Path, ast.AST]]) -> dict[str, set[str]]:
    """Which modules of the package each module imports.

    A name that a package hands on from a module of its own counts as an import of that module.

    Args:
        files: Path and syntax by module name.
    """
    handed_on = {
        name: {full.rpartition(".")[2]: full for _, full in imported(path, tree)}
        for name, (path, tree) in files.items()
        if path.name == "__init__.py"
    }

    def defining(target: str) -> str | None:
        if target in files:
            return target
        package, _, name = target.rpartition(".")
        if package not in files:
            return defining(package) if package else None
        further = handed_on.get(package, {}).get(name)
        return package if further is None or further == target else defining(further)

    found = {}
    for name, (path, tree) in files.items():
        targets = {defining(full) for _, full in imported(path, tree) if full.split(".")[0] == NAME}
        found[name] = {target for target in targets if target is not None and target != name}
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, found once those without a way in or out are taken away."""
    left = {name: set(targets) & set(graph) for name, targets in graph.items()}
    while True:
        imported_by = {target for targets in left.values() for target in targets}
        ends = {name for name, targets in left.items() if not targets or name not in imported_by}
        if not ends:
            return components(left)
        left = {name: targets - ends for name, targets in left.items() if name not in ends}


def components(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules of which each reaches each other one."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def calls_of(name: str, tree: ast.AST) -> Iterator[int]:
    """Lines that call the function ``name``, or with a dot in front the method: ``".fold"``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Subscript):  # a generic class with its parameter
            function = function.value
        if isinstance(function, ast.Attribute) and f".{function.attr}" == name:
            yield node.lineno
        if isinstance(function, ast.Name) and function.id == name:
            yield node.lineno


def private_parts(tree: ast.AST, hosts: tuple[str, ...], own: set[str]) -> Iterator[tuple[int, str]]:
    """Lines that import something private of ``hosts``, or read a private attribute that is none of our ``own``.

    An attribute of ``self`` belongs to a class of ours, or to one that is written to be subclassed.
    """

    def is_private(part: str) -> bool:
        return part.startswith("_") and not part.startswith("__")

    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) and not node.level else ""
            names = [f"{module}.{alias.name}" if module else alias.name for alias in node.names]
            for name in names:
                if name.startswith(hosts) and any(map(is_private, name.split("."))):
                    yield node.lineno, name
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, ast.unparse(node)


def own_names(trees: list[ast.Module]) -> set[str]:
    """Names of all classes, functions and attributes of ``self`` that the package makes."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    found.add(node.attr)
    return found
