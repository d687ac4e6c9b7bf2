"""The page of one calibration: what a reader wants first, then everything that was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from repapq_plugin.core.origin import own_versions
from repapq_plugin.core.running import Batch, ForwardFn, call_model
from repapq_plugin.diagnosis.seen import SeenTensor, observe_activations
from repapq_plugin.method.unit_result import UnitResult
from repapq_plugin.report.html import require_report, write_page
from repapq_plugin.report.page import Figure, Headline, Line, Page, Section, Table
from repapq_plugin.report.parts import facts_section, named_table
from repapq_plugin.report.table import ABSENT, Row, score_text, size_text
from repapq_plugin.result import Calibrated

MOST_HISTOGRAMS, MOST_MAPS = 24, 3
"""Of a page: a network of a hundred units needs no hundred pictures to be judged (our choice)."""

SMALL_DROP, LARGE_DROP = 0.01, 0.05
"""Of the float network's score: up to here a result is good, from there on it is bad (our choice)."""


@dataclass(frozen=True)
class Evidence:
    """What is known beside the result itself; all of it may be missing.

    Args:
        title: Name of the network or its config.
        rows: Networks that were scored, the float one first and the calibrated one last.
        columns: Headings of the scores, the most important first.
        caption: Below the scores: how the latency was measured.
        seen: What the quantizers of activations were given.
        samples: Names of the samples that were run for it, in order.
        calibrated_on: What the network was calibrated on: names of samples, or where they come from.
        pictures: Predictions of the float and of the quantized network.
        facts: Tables of names and values by their title: versions, machine, seconds.
        notes: Further remarks.
    """

    title: str = "Quantized network"
    rows: Sequence[Row] = ()
    columns: Sequence[str] = ()
    caption: str = ""
    seen: Sequence[SeenTensor] = ()
    samples: Sequence[str] = ()
    calibrated_on: Sequence[str] = ()
    pictures: Sequence[Figure] = ()
    facts: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def write_report(
    result: Calibrated,
    path: str | Path,
    *,
    data: Iterable[Batch] = (),
    forward_fn: ForwardFn | None = None,
    evidence: Evidence | None = None,
) -> Path:
    """Write what became of a calibration as one HTML page.

    Args:
        result: What `quantize_model` returned.
        path: File to write, ``report.html``.
        data: A few calibration batches; with them the page shows what each quantizer of activations is given, and
            which channels and samples stand out.
        forward_fn: Runs the network on a batch, as in `quantize_model`.
        evidence: Scores, names and whatever else is known; see `Evidence`.

    Returns:
        The path.

    Raises:
        ConfigError: A package is missing; the message names the extra.
        ExportError: The file cannot be written.
    """
    require_report()
    found = evidence or Evidence(facts={"Versions": own_versions()})
    batches, forward = list(data), forward_fn or call_model
    if batches and not found.seen:
        seen = observe_activations(result.model, lambda batch: forward(result.model, batch), batches)
        found = Evidence(**{**vars(found), "seen": seen})
    return write_page(calibration_page(result, found), path)


def calibration_page(result: Calibrated, evidence: Evidence) -> Page:
    """Return the page of a calibration."""
    return Page(
        "Calibration",
        evidence.title,
        result.config.scheme,
        list(_headlines(result, evidence))[:3],
        (
            scores(evidence.rows, evidence.columns, evidence.caption),
            Section("Notes", text=tuple(filter(None, (*evidence.notes, *result.notes)))),
            Section("Predictions", _PREDICTIONS if evidence.pictures else (), figures=evidence.pictures),
            _units(result.units),
            _activations(evidence.seen),
            _outliers(evidence),
            _float_layers(result),
            _layers(result),
            _merges(result),
            Section("Scheme", _SETTINGS, [named_table(result.config.to_dict())], folded=True),
            facts_section(evidence.facts),
            _calibrated_on(evidence.calibrated_on),
        ),
    )


_PREDICTIONS = (
    "Test images with what the float network predicts, on the left, and the quantized one, on the right; drawn by the "
    "toolbox's own visualizer.",
)
_SETTINGS = ("All settings, from which the same calibration can be made again.",)


def scores(rows: Sequence[Row], columns: Sequence[str], caption: str = "", title: str = "Scores") -> Section:
    """Return a section that sets networks side by side; the last one is what the page is about."""
    shown = [heading for heading in columns if any(row.scores.get(heading) is not None for row in rows)]
    sizes, times = any(row.size_bytes for row in rows), any(row.latency_ms for row in rows)
    headings = ["Network", *shown, *(["Size"] if sizes else []), *(["Latency"] if times else [])]
    lines = []
    for row in rows:
        cells = [row.name, *(score_text(row.scores.get(heading), heading) for heading in shown)]
        cells += [ABSENT if row.size_bytes is None else size_text(row.size_bytes)] if sizes else []
        cells += [ABSENT if row.latency_ms is None else f"{row.latency_ms:.2f} ms"] if times else []
        lines.append(Line(cells, strong=row is rows[-1] and len(rows) > 1))
    return Section(title, tables=[Table(headings, lines, caption)] if rows else ())


def _headlines(result: Calibrated, evidence: Evidence) -> Iterator[Headline]:
    rows, columns = evidence.rows, evidence.columns
    reference, subject = (rows[0], rows[-1]) if len(rows) > 1 else (None, rows[-1] if rows else None)
    if subject is not None and columns:
        yield from _score_headline(columns[0], reference, subject)
    sized = [row for row in rows if row.size_bytes]
    if sized:
        small, large = sized[-1], sized[0]
        part = f"{100 * (small.size_bytes or 0) / (large.size_bytes or 1):.0f} % of the float network's"
        against = f"{part} {size_text(large.size_bytes or 0)}" if small is not large else ""
        yield Headline("Size of the file", size_text(small.size_bytes or 0), against)
    timed = [row for row in rows if row.latency_ms]
    if len(timed) > 1:
        slow, fast = timed[0].latency_ms or 0.0, timed[-1].latency_ms or 0.0
        yield Headline("Latency", f"{fast:.2f} ms", f"{slow / fast:.2f} times as fast as float ({slow:.2f} ms)")
    kept, total = sum(unit.kept for unit in result.units), len(result.units)
    if total:
        yield Headline("Units improved", f"{kept} of {total}", _improvement(result.units))
    quantized, left = len(result.layers), len(result.float_layers)
    yield Headline("Layers quantized", f"{quantized} of {quantized + left}", f"{left} stay float" if left else "")
    yield Headline("Calibration", duration(result.seconds))


def _score_headline(heading: str, reference: Row | None, subject: Row) -> Iterator[Headline]:
    value = subject.scores.get(heading)
    if value is None:
        return
    wanted = None if reference is None else reference.scores.get(heading)
    if not wanted:
        yield Headline(heading, score_text(value, heading))
        return
    drop = (wanted - value) / abs(wanted)
    good = True if drop <= SMALL_DROP else False if drop >= LARGE_DROP else None
    unit = " points" if heading.endswith("%") else ""
    change = _signed(value - wanted, 2 if unit else 4)
    yield Headline(
        heading, score_text(value, heading), f"{change}{unit} from float ({score_text(wanted, heading)})", good
    )


def _improvement(units: Sequence[UnitResult]) -> str:
    ratios = [unit.loss_after / unit.loss_before for unit in units if unit.loss_before > 0]
    ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
    if not ratios:
        return ""
    change = 100 * (statistics.median(ratios) - 1)
    return f"median loss {abs(change):.0f} % {'lower' if change <= 0 else 'higher'} than before"


def _units(units: Sequence[UnitResult]) -> Section:
    if not units:
        return Section("Loss of each unit")
    from repapq_plugin.report import figures

    rows = [
        Line(
            (
                unit.name,
                unit.stage,
                _loss(unit.loss_before),
                _loss(unit.loss_after),
                _change(unit),
                duration(unit.seconds),
            ),
            "" if unit.kept else f"undone{': ' if unit.note else ''}{unit.note}",
        )
        for unit in units
    ]
    undone = sum(not unit.kept for unit in units)
    text = (
        "Relative error of each unit's output against the float network, on batches that were held out, with starting "
        "ranges and with what was kept. "
        + (f"{undone} of {len(units)} units were no better there than before, and were undone." if undone else "")
    ).strip()
    columns = ("Unit", "Learned with", "Before", "After", "Change", "Time")
    return Section("Loss of each unit", [text], [Table(columns, rows, text_columns=2)], [figures.losses(units)], True)


def _activations(seen: Sequence[SeenTensor]) -> Section:
    if not seen:
        return Section("Activations and their ranges")
    from repapq_plugin.report import figures

    shown = seen
    text = (
        "What each quantizer of activations is given, counts on a logarithmic scale. The tinted part between the two "
        "lines is the chosen range; what lies outside is clipped to it."
    )
    if len(seen) > MOST_HISTOGRAMS:
        most = sorted(seen, key=lambda it: -it.clipped)[:MOST_HISTOGRAMS]
        shown = [it for it in seen if any(it is each for each in most)]
        text += f" Shown are the {MOST_HISTOGRAMS} of {len(seen)} that clip most; the table holds all."
    rows = [
        Line(
            (
                it.name,
                str(it.num_bits),
                f"{it.low:.4g}",
                f"{it.high:.4g}",
                _bound(it, 0),
                _bound(it, 1),
                figures.share(it.clipped),
                f"{it.outlying:.3g}",
            )
        )
        for it in seen
    ]
    columns = ("Input of", "Bits", "Range from", "to", "Smallest", "Largest", "Outside", "Largest / typical peak")
    return Section(
        "Activations and their ranges", [text], [Table(columns, rows)], [figures.histogram(it) for it in shown], True
    )


def _outliers(evidence: Evidence) -> Section:
    title = "Outliers by channel and sample"
    worst = sorted(evidence.seen, key=lambda it: -it.outlying)[:MOST_MAPS]
    if not worst:
        return Section(title)
    from repapq_plugin.report import figures

    text = (
        "The largest value of each channel in each sample, of the inputs where it stands out most. A strong row is "
        "a channel that is always large, a strong column a sample. A single strong spot is both; a range that holds "
        "it leaves few steps for everything else."
    )
    return Section(title, [text], (), [figures.outlier_map(it.name, it.by_sample, evidence.samples) for it in worst])


def _float_layers(result: Calibrated) -> Section:
    left = result.float_layers
    if not left:
        return Section("Left float", ["Every convolution and linear layer is quantized."])
    rows = [Line(item) for item in left.items()]
    return Section("Left float", tables=[Table(("Layer", "Reason"), rows, text_columns=2)])


def _layers(result: Calibrated) -> Section:
    rows = [Line((name, str(weight), str(activation))) for name, (weight, activation) in result.layers.items()]
    counted: dict[tuple[int, int], int] = {}
    for bits in result.layers.values():
        counted[bits] = counted.get(bits, 0) + 1
    said = ", ".join(f"{count} with W{bits[0]}A{bits[1]}" for bits, count in sorted(counted.items()))
    table = Table(("Layer", "Weight bits", "Activation bits"), rows)
    return Section("Bits of each layer", [f"{len(rows)} layers: {said}."], [table], folded=True)


def _merges(result: Calibrated) -> Section:
    if not result.merges:
        return Section("Merged blocks")
    rows = [
        Line(
            (it.name, it.block_class, str(it.branches), _loss(it.max_rel_error or math.nan)),
            "" if it.merged else f"left as it is: {it.reason}",
        )
        for it in result.merges
    ]
    merged = sum(it.merged for it in result.merges)
    text = f"{merged} of {len(rows)} blocks of several branches became one convolution each."
    columns = ("Block", "Class", "Branches", "Largest relative error")
    return Section("Merged blocks", [text], [Table(columns, rows, text_columns=2)], folded=True)


def _calibrated_on(samples: Sequence[str]) -> Section:
    said = {str(index): name for index, name in enumerate(samples)}
    title = "Calibration samples"
    return (
        Section(title, [f"{len(said)} samples."], [named_table(said, columns=("Number", "Name"))], folded=True)
        if said
        else Section(title)
    )


def _loss(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ABSENT


def _change(unit: UnitResult) -> str:
    if not (unit.loss_before > 0 and math.isfinite(unit.loss_after)):
        return ABSENT
    return f"{_signed(100 * (unit.loss_after / unit.loss_before - 1), 0)} %"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _bound(seen: SeenTensor, which: int) -> str:
    value = (seen.histogram.min_val, seen.histogram.max_val)[which]
    return f"{float(torch.as_tensor(value)):.4g}"


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
