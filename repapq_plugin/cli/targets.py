"""What ``repapq targets`` and ``repapq check`` say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from repapq_plugin.targets import TARGETS, Target

if TYPE_CHECKING:
    from repapq_plugin.export.check import Finding


def target_list() -> Iterator[str]:
    """Yield a line for each target: name, activations, weights, biases and what to give it."""
    width = max(map(len, TARGETS))
    for target in TARGETS.values():
        yield (
            f"{target.name:{width}}  activations {target.activation_scheme}; weights {target.weight_scheme}; "
            f"{len(target.tested)} rules; takes {target.file}"
        )


def target_page(target: Target) -> Iterator[str]:
    """Yield all that is known of one target, line by line."""
    yield f"{target.name}: takes {target.file}"
    yield f"activations: {target.activation_scheme}; in files of others {' or '.join(target.activation_types)}"
    yield f"weights: {target.weight_scheme}; in files of others {' or '.join(target.weight_types)}"
    yield f"biases: {'float or int32' if target.bias == 'either' else target.bias}"
    for what, operators in (
        ("also quantized there", target.quantized_operators),
        ("outputs rounded of", target.rounded_outputs),
        ("one grid for all inputs", target.shared_grid_operators),
        ("stay float", target.float_operators),
    ):
        if operators:
            yield f"{what}: {', '.join(operators)}"
    yield f"operator set: {target.opset}, and {target.min_opset} to {target.max_opset} are read"
    for note in target.notes:
        yield f"note: {note}"
    for rule in target.tested:
        yield f"rule {rule.key}: {rule.demand}; else {rule.effect}"
        yield f"  {rule.source}"


def report(findings: Sequence[Finding], target: Target, shown: int) -> Iterator[str]:
    """Yield findings and their number, line by line.

    Args:
        findings: All of them.
        target: Whose rules were tested.
        shown: How many of each rule are told in full.
    """
    told: Counter[str] = Counter()
    for finding in findings:
        told[finding.rule] += 1
        if told[finding.rule] <= shown:
            yield str(finding)
    for rule, count in told.items():
        if count > shown:
            yield f"{count - shown} more findings of rule {rule}."
    rules = f"{len(target.tested)} rules of {target.name}"
    yield f"{len(findings)} findings against {rules}." if findings else f"The file keeps all {rules}."
