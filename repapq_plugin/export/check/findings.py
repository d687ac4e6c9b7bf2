"""`check_onnx`: the findings of all rules of a target on one file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from repapq_plugin.errors import ExportError
from repapq_plugin.export.check.graph import QuantizedGraph
from repapq_plugin.export.check.rules import CHECKS, REMEDIES
from repapq_plugin.export.qdq_onnx import require_onnx
from repapq_plugin.targets import Target, find_target

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Finding:
    """A node that breaks a rule.

    Args:
        rule: Key of the rule, one of `repapq_plugin.targets.target.RULES`.
        node: Name of the node, or of what it makes; empty for the whole file.
        operator: Its operator.
        broken: How it breaks the rule, in half a sentence.
        demand: What the rule demands.
        effect: What the target does about it.
        source: Where the rule is published.
        remedy: What to do.
    """

    rule: str
    node: str
    operator: str
    broken: str
    demand: str
    effect: str
    source: str
    remedy: str

    def __str__(self) -> str:
        """Say all of it in a few lines."""
        where = f"{self.operator} {self.node!r}" if self.node else "The file"
        return (
            f"{where}: {self.broken}.\n  Rule {self.rule}: {self.demand}; else {self.effect}. {self.remedy}\n"
            f"  {self.source}"
        )


def check_onnx(file: str | os.PathLike[str] | onnx.ModelProto, target: str | Target) -> list[Finding]:
    """Test every rule of a target on an ONNX file, whoever made it; the file is read and not run.

    Nodes inside subgraphs (``If``, ``Loop``) are not looked at.

    Args:
        file: Its path, or the loaded model.
        target: A target or its name.

    Returns:
        What breaks a rule, by rule and then in the order of the graph; empty if nothing does.

    Raises:
        ExportError: onnx is not installed, or the file cannot be read or is no valid ONNX.
        ConfigError: There is no such target.
    """
    require_onnx()
    wanted = find_target(target) if isinstance(target, str) else target
    model = _loaded(file) if isinstance(file, str | os.PathLike) else file
    try:
        return _findings(model, wanted)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise ExportError(
            f"The graph is no valid ONNX: it cannot be judged ({type(error).__name__}: {error}). Write the file again; "
            "onnx.checker.check_model says what is wrong with it."
        ) from error


def _findings(model: onnx.ModelProto, wanted: Target) -> list[Finding]:
    graph = QuantizedGraph(model)
    return [
        Finding(
            rule.key,
            "" if node is None else node.name or next(iter(node.output), ""),
            "" if node is None else node.op_type,
            broken,
            rule.demand,
            rule.effect,
            rule.source,
            REMEDIES[rule.key],
        )
        for rule in wanted.tested
        for node, broken in CHECKS[rule.key](graph, wanted)
    ]


def _loaded(file: str | os.PathLike[str]) -> onnx.ModelProto:
    import onnx

    path = Path(file)
    if not path.is_file():
        raise ExportError(f"There is no file {path}; give an ONNX file.")
    try:
        model = onnx.load(path)
    except Exception as error:  # whatever protobuf, or a missing file of weights beside it, raises
        raise ExportError(f"{path.name} cannot be read as ONNX ({type(error).__name__}: {error}).") from error
    if not model.graph.node:
        raise ExportError(f"{path.name} holds no graph; give an ONNX file.")
    return model
