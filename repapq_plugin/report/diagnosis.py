"""The page of a diagnosis: what to do, the weakest units, and the channels and samples that stand out."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from repapq_plugin.core.origin import own_versions
from repapq_plugin.diagnosis.differences import ALIKE, LayerDifference, first_difference
from repapq_plugin.diagnosis.judge import ENOUGH, OUTLYING
from repapq_plugin.diagnosis.table import MOMENTS, Diagnosis, Outlier, UnitDiagnosis
from repapq_plugin.report.html import require_report, write_page
from repapq_plugin.report.page import Figure, Headline, Line, Page, Section, Table
from repapq_plugin.report.parts import facts_section, named_table
from repapq_plugin.report.table import ABSENT

MOST_MAPS, MOST_PROFILES = 3, 3
"""Units whose outliers are drawn, and whose channels are told one by one."""

CALLED = {
    "fold_constants": "fold constant channels",
    "equalize": "equalize channels",
    "bits": "more bits",
    "keep_float": "keep float",
}
"""Remedies as people call them."""

FIGURES = {
    "maximum": ("Largest value", "{:.4g}"),
    "kurtosis": ("Kurtosis", "{:.3g}"),
    "top_share": ("Share of the range that the top 0.1 % use", "{:.0%}"),
    "snr": ("Signal over noise, in dB", "{:.1f}"),
}
"""Of a tensor, with their headings."""


def write_diagnosis(
    diagnosis: Diagnosis,
    path: str | Path,
    *,
    title: str = "Diagnosis",
    samples: Sequence[str] = (),
    pictures: Sequence[Figure] = (),
    facts: Mapping[str, Mapping[str, object]] | None = None,
    difference: Section | None = None,
) -> Path:
    """Write a diagnosis as one HTML page.

    Args:
        diagnosis: What `diagnose` returned.
        path: File to write.
        title: Name of the network or its config.
        samples: Names of the samples.
        pictures: The samples that cause outliers.
        facts: Tables of names and values by their title; default: versions.
        difference: Where a runtime differs from the simulation, if one was compared.

    Raises:
        ConfigError: A package is missing; the message names the extra.
        ExportError: The file cannot be written.
    """
    require_report()
    said = {"Versions": own_versions()} if facts is None else facts
    return write_page(diagnosis_page(diagnosis, title, samples, pictures, said, difference), path)


def diagnosis_page(
    diagnosis: Diagnosis,
    title: str,
    samples: Sequence[str] = (),
    pictures: Sequence[Figure] = (),
    facts: Mapping[str, Mapping[str, object]] | None = None,
    difference: Section | None = None,
) -> Page:
    """Return the page of a diagnosis; arguments: see `write_diagnosis`."""
    return Page(
        "Diagnosis",
        title,
        diagnosis.result.config.scheme,
        list(_headlines(diagnosis)),
        (
            _remedies(diagnosis),
            *([difference] if difference is not None else []),
            Section("Notes", text=diagnosis.result.notes),
            _strength(diagnosis),
            _outliers(diagnosis, samples),
            Section("Samples that cause outliers", _PICTURES if pictures else (), figures=pictures),
            _channels(diagnosis),
            Section("Scheme", tables=[named_table(diagnosis.result.config.to_dict())], folded=True),
            facts_section(facts or {}),
        ),
    )


_PICTURES = ("Images that make a channel stand out: look whether they are what the network is meant for.",)


def _headlines(diagnosis: Diagnosis) -> Iterator[Headline]:
    units = diagnosis.weakest
    if units and math.isfinite(units[0].snr):
        low = [unit for unit in units if unit.snr < ENOUGH]
        typical = statistics.median(unit.snr for unit in units if not math.isnan(unit.snr))
        note = f"{units[0].name}; the typical unit has {typical:.1f} dB"
        yield Headline("Weakest unit", f"{_form('{:.1f}', units[0].snr)} dB", note, True if not low else None)
    outliers = [outlier for unit in units for outlier in unit.outliers]
    in_units = sum(bool(unit.outliers) for unit in units)
    rare = sum(not outlier.everywhere for outlier in outliers)
    note = f"in {in_units} of {len(units)} units; {rare} in a few samples only" if outliers else ""
    yield Headline("Outlier channels", str(len(outliers)), note)
    todo = Counter(CALLED[remedy.name] for unit in units for remedy in unit.remedies if remedy.how)
    said = ", ".join(f"{name} in {count}" for name, count in todo.most_common())
    yield Headline("Units to treat", str(sum(any(r.how for r in unit.remedies) for unit in units)), said)


def _remedies(diagnosis: Diagnosis) -> Section:
    rows = [
        Line(
            (unit.name, CALLED[remedy.name], remedy.how or "set already", remedy.reason, _gain(remedy.gain)),
        )
        for unit in diagnosis.weakest
        for remedy in unit.remedies
    ]
    if not rows:
        return Section("What to do", [_NOTHING])
    text = (
        "By unit, the weakest first. What is set already stays as it is; the rest is what to write into a "
        "configuration. Signal over noise is that of a unit's products: what varies in them, and what rounding adds. "
        f"More bits are proposed where a unit has less than {ENOUGH:.0f} dB and is behind the typical one by a bit."
    )
    columns = ("Unit", "Remedy", "Key", "Because", "Gain")
    return Section("What to do", [text], [Table(columns, rows, text_columns=4)])


_NOTHING = (
    f"Nothing stands out: no unit has less than {ENOUGH:.0f} dB of signal over noise and is behind the typical one by "
    "a bit."
)


def _gain(gain: float) -> str:
    return f"{gain:.1f} dB" if math.isfinite(gain) else ABSENT


def _strength(diagnosis: Diagnosis) -> Section:
    if not diagnosis.units:
        return Section("Every unit at each moment")
    from repapq_plugin.report import figures

    text = (
        "What each unit reads, at four moments. Before calibration its range goes from the smallest to the largest "
        "value; afterwards it is the learned one. A kurtosis of 3 is that of a normal distribution; more means "
        "outliers. Before the merge, weights are those of the branches."
    )
    tables = [
        Table(
            ("Unit", *MOMENTS.values()),
            [Line((unit.name, *_over_time(unit, key, form, side))) for unit in diagnosis.units],
            title=f"{heading}: {what}",
        )
        for side, what in (("inputs", "inputs"), ("weights", "weights"))
        for key, (heading, form) in FIGURES.items()
    ]
    return Section("Every unit at each moment", [text], tables, [figures.moments(diagnosis.units)], True)


def _over_time(unit: UnitDiagnosis, key: str, form: str, side: str) -> Iterator[str]:
    for name in MOMENTS:
        moment = unit.moments.get(name)
        found = None if moment is None else getattr(moment, side)
        yield ABSENT if found is None else _form(form, float(getattr(found.together, key)[0]))


def _form(form: str, value: float) -> str:
    return form.format(value).replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else ABSENT


def _outliers(diagnosis: Diagnosis, samples: Sequence[str]) -> Section:
    title = "Outlier channels and the samples that cause them"
    outlying = sorted((unit for unit in diagnosis.units if unit.outliers), key=lambda unit: -unit.outliers[0].times)
    if not outlying:
        return Section(title, [f"No channel is {OUTLYING:g} times as large as the typical one of its tensor."])
    from repapq_plugin.report import figures

    rows = [
        Line(
            (
                unit.name,
                _who(outlier, samples),
                str(outlier.channel),
                f"{outlier.peak:.4g}",
                f"{outlier.times:.3g}",
                f"{outlier.share:.1%}",
            ),
            "" if outlier.everywhere else "in a few samples",
        )
        for unit in outlying
        for outlier in unit.outliers
    ]
    text = (
        f"Channels whose largest value is at least {OUTLYING:g} times that of the typical channel of the same tensor, "
        "after the merge. One that stands out in most samples can be equalized. One that does in a few samples "
        "stretches the range for all others; look at these samples."
    )
    columns = ("Unit", "Largest in", "Channel", "Peak", "Times the typical", "Samples above half the peak")
    maps = [figures.outlier_map(unit.name, unit.peaks, samples) for unit in outlying[:MOST_MAPS]]
    return Section(title, [text], [Table(columns, rows, text_columns=2)], maps)


def _who(outlier: Outlier, samples: Sequence[str]) -> str:
    return ", ".join(samples[number] if number < len(samples) else f"sample {number}" for number in outlier.samples)


def _channels(diagnosis: Diagnosis) -> Section:
    """Tell the outlying channels of the weakest units one by one."""
    units = [unit for unit in diagnosis.weakest if unit.outliers][:MOST_PROFILES]
    if not units:
        return Section("Channels of the weakest units")
    from repapq_plugin.report import figures

    tables = [
        Table(
            ("Channel", "Moment", *(heading for heading, _ in FIGURES.values())),
            list(_channel_rows(unit)),
            title=unit.name,
            text_columns=2,
        )
        for unit in units
    ]
    text = "The largest value of each channel, in order of size: the flatter, the better one range serves all."
    drawn = [figures.channel_profile(unit) for unit in units]
    return Section("Channels of the weakest units", [text], tables, drawn, True)


def _channel_rows(unit: UnitDiagnosis) -> Iterable[Line]:
    for outlier in unit.outliers:
        for name, called in MOMENTS.items():
            moment = unit.moments.get(name)
            if moment is None:
                continue
            found = moment.inputs.by_channel
            cells = (_form(form, float(getattr(found, key)[outlier.channel])) for key, (_, form) in FIGURES.items())
            yield Line((str(outlier.channel), called, *cells))


def difference_section(differences: Sequence[LayerDifference], file: str, runtime: str = "onnxruntime") -> Section:
    """Return where an exported file and the simulation part.

    Args:
        differences: Of every call of a layer.
        file: Name of the file.
        runtime: What ran it.
    """
    first = first_difference(differences)
    if first is None:
        said = f"No layer of {file} computes anything else in {runtime} than in the simulation, given the same input."
        apart = next((each for each in differences if each.arriving > ALIKE), None)
        if apart is not None:
            said += (
                f" What {apart.layer} is given differs all the same, by {apart.arriving:.2g} of its largest value: "
                "codes were rounded the other way before it, or something that is no quantized layer differs."
            )
    else:
        said = (
            f"{first.layer} is the first layer of {file} that computes something else in {runtime}: its output differs "
            f"by {first.own:.2g} of its largest value from what the simulation makes of the very same input."
        )
    rows = [
        Line((_called(each), f"{each.own:.2g}", f"{each.arriving:.2g}"), "differs here" if each.own > ALIKE else "")
        for each in differences
    ]
    columns = ("Layer", "Made in it", "Arriving at it")
    caption = (
        "Errors relative to the largest value. Made in it: the layer's output, given the input that the runtime gave "
        "it. Arriving at it: its input, against the simulation's."
    )
    return Section("First layer that differs", [said], [Table(columns, rows, caption)])


def _called(difference: LayerDifference) -> str:
    return difference.layer + (f", call {difference.call + 1}" if difference.call else "")
