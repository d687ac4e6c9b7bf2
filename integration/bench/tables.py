"""The documents' tables of measurements, made from the committed results.

    python -m integration.bench.tables            # print them
    python -m integration.bench.tables --write    # put them into README.md and integration/bench/README.md

A table stands in a document between ``<!-- table: NAME -->`` and ``<!-- end -->``; a test compares the two.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable

import click

from integration.bench.comparison_tables import comparison_table, depth_table, imports_table, observers_table
from integration.bench.mimicnorm_tables import outlier_table, training_table
from integration.bench.ranks_tables import ranks_equal_table, ranks_table, ring_table
from integration.bench.reference import RESULTS, ROOT
from integration.bench.table_parts import CLASSIFIERS, NOTHING, PRESETS, Row, markdown, mean_of, rows_of
from integration.fuzz.reasons import fuzz_table

DOCUMENTS = (ROOT / "README.md", ROOT / "integration" / "bench" / "README.md")
"""The first shows a summary, the second everything else."""

MASKS = "coco/segm_mAP"
"""A metric that the summary leaves out: masks lose what their boxes lose."""

SCENES = {
    ("yolov6-n", "coco/bbox_mAP"): ("YOLOv6-n, box mAP", 100),
    ("rtmdet-ins", "coco/bbox_mAP"): ("RTMDet-Ins, box mAP", 100),
    ("rtmdet-ins", MASKS): ("RTMDet-Ins, mask mAP", 100),
    ("repvgg-fcn", "mIoU"): ("RepVGG-FCN, mIoU %", 1),
}
"""What is shown of which network, and what the toolbox's figure is multiplied by to be in percent."""

NNCF_MODELS = {
    "repvgg": ("RepVGG, top-1 %", 1, 2),
    "mobileone": ("MobileOne, top-1 %", 1, 2),
    "yolov6-n": ("YOLOv6-n, box mAP", 100, 1),
    "rtmdet-ins": ("RTMDet-Ins, box mAP", 100, 1),
    "repvgg-fcn": ("RepVGG-FCN, mIoU %", 1, 2),
}


def scores(rows: list[Row], value: Callable[[Row], float], name: str, methods: tuple[str, str]) -> list[list[str]]:
    """Return two lines: plain PTQ beside RepAPQ, one column for each number of bits."""
    lines = []
    for i, method in enumerate(methods):
        cells = [mean_of(value(row) for row in rows if (row["method"], row["preset"]) == (method, p)) for p in PRESETS]
        line = [method, *cells]
        if i:  # ours
            line = [f"**{cell}**" if cell != NOTHING else cell for cell in line]
        lines.append(["" if i else name, *line])
    return lines


def summary_table() -> str:
    """Return float, plain PTQ and RepAPQ of every reference network."""
    methods = ("plain PTQ", "RepAPQ")
    body: list[list[str]] = []
    for (model, metric), (title, factor) in SCENES.items():
        rows = [row for row in rows_of("scenes") if row["model"] == model and metric != MASKS]
        if rows:
            name = f"{title}, float {factor * rows[0]['float'][metric]:.1f}"
            body += scores(rows, lambda row, m=metric, f=factor: f * row["simulated"][m], name, methods)  # type: ignore[misc]
    for model, title in CLASSIFIERS.items():
        rows = [row for row in rows_of("classifiers") if row["model"] == model]
        if rows:
            body += scores(rows, lambda row: row["accuracy"], f"{title}, float {rows[0]['float']:.2f}", methods)
    return markdown(["", "", "W8A8", "W6A6", "W4A4", "W3A3"], body)


def runtime_table() -> str:
    """Return what runtimes score with exported networks, beside the simulation."""
    body = []
    for (model, metric), (title, factor) in SCENES.items():
        for row in sorted(rows_of("scenes"), key=lambda row: PRESETS.index(row["preset"])):
            if row["model"] == model and "openvino" in row:
                figures = [row[key][metric] * factor for key in ("simulated", "onnxruntime", "openvino")]
                body.append([title, bits_of(row), *(f"{figure:.1f}" for figure in figures), integers(row)])
    for model, title in CLASSIFIERS.items():
        for row in rows_of("classifiers"):
            if row["model"] == model and "openvino" in row:
                figures = [row[key] for key in ("accuracy", "onnxruntime", "openvino")]
                body.append([title, bits_of(row), *(f"{figure:.2f}" for figure in figures), integers(row)])
    return markdown(["seed 0", "bits", "simulated", "onnxruntime", "OpenVINO", "INT8 layers"], body)


def bits_of(row: Row) -> str:
    """Return the preset, and whether weights kept clear of saturation."""
    return row["preset"].upper() + (", reduced range" if (row.get("config") or {}).get("reduce_range") else "")


def targets_table() -> str:
    """Return what symmetric activations cost against affine ones, and how the file does in integers."""
    body = []
    rows = rows_of("targets")
    keys = ("model", "preset", "method", "steps", "images")
    found = {(*(row[key] for key in keys), row["target"]): row for row in rows}
    for model, preset, method, steps, images in dict.fromkeys(key[:5] for key in found):
        pair = [found.get((model, preset, method, steps, images, target)) for target in ("executorch", "tensorrt")]
        if None in pair:
            continue
        affine, symmetric = (row for row in pair if row is not None)
        how = f"{method}, {steps} steps" if steps else method
        figures = [affine["accuracy"], symmetric["accuracy"], symmetric["onnxruntime_integer"]]
        gap = f"{symmetric['accuracy'] - affine['accuracy']:+.2f}"
        label = CLASSIFIERS.get(model) or next(told for (name, _), (told, _) in SCENES.items() if name == model)
        shown = [label, preset.upper(), how, f"{images:,}" if images else "all scenes"]
        body.append([*shown, *(f"{figure:.2f}" for figure in figures), gap])
    head = ["seed 0", "bits", "by", "images", "affine", "symmetric", "symmetric, in integers", "symmetric less affine"]
    return markdown(head, body)


def devices_table() -> str:
    """Return what each runtime scores beside the simulation of what it computes, and how alike the outputs are."""
    body = []
    for row in rows_of("runtimes"):
        figures = [f"{row[key]:.2f}" for key in ("calibrated", "simulated", "accuracy", "same_class", "equal")]
        name = {"onnxruntime": "onnxruntime", "openvino": "OpenVINO", "executorch": "ExecuTorch", "litert": "LiteRT"}
        shown = [CLASSIFIERS[row["model"]], row["preset"].upper(), name[row["runtime"]], row["form"]]
        body.append([*shown, *figures, f"{row['integer']} of {row['layers']}"])
    head = [
        "",
        "bits",
        "runtime",
        "form",
        "calibrated",
        "simulated",
        "runtime's",
        "same class, %",
        "equal, %",
        "INT8 layers",
    ]
    return markdown(head, body)


def integers(row: Row) -> str:
    """Return how many of the layers with weights run in integers."""
    return f"{row['int8_layers']} of {row['layers']}"


def ablation_table(model: str) -> str:
    """Return each method's accuracy at few bits."""
    rows = rows_of(f"ablation-{model}")
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [
            mean_of(row["accuracy"] for row in rows if (row["method"], row["preset"]) == (method, p)) for p in presets
        ]
        body.append([method, *cells])
    title = f"{CLASSIFIERS[model]}, float {rows[0]['float']:.2f}" if rows else CLASSIFIERS[model]
    return markdown([title, *(preset.upper() for preset in presets)], body)


def photographs_table() -> str:
    """Return what full-size classifiers score on photographs, by settings."""
    rows = rows_of("photographs")
    body = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        title = f"{model}, top-1 %, float {of_model[0]['float']:.2f}"
        for method, settings in dict.fromkeys((row["method"], row["settings"]) for row in of_model):
            if method == "plain PTQ" and any("plain PTQ" in line[1] for line in body if line[0] == title):
                continue  # the same for all settings
            chosen = [row for row in of_model if (row["method"], row["settings"]) == (method, settings)]
            cells = [mean_of(row["accuracy"] for row in chosen if row["preset"] == preset) for preset in PRESETS]
            named = method if method == "plain PTQ" or not settings else f"{method}, {settings}"
            body.append([title, named, *cells])
    return markdown(["", "", *(preset.upper() for preset in PRESETS)], body)


def nncf_table() -> str:
    """Return `nncf.quantize` beside ours: score, kernels and operators of the converted networks."""
    body = []
    order = list(NNCF_MODELS)
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows_of("nncf"):
        groups.setdefault((row["model"], row["preset"], row["method"]), []).append(row)
    for key in sorted(groups, key=lambda key: (order.index(key[0]), PRESETS.index(key[1]), key[2])):
        rows = groups[key]
        title, factor, digits = NNCF_MODELS[key[0]]
        means = (factor * statistics.mean(row[form] for row in rows) for form in ("float", "torch", "openvino"))
        figures = [f"{mean:.{digits}f}" for mean in means]
        seeds = ", ".join(str(seed) for seed in sorted(row["seed"] for row in rows))
        shown = [title, bits_of(rows[0]), key[2], seeds, *figures, integers(rows[0]), str(rows[0]["operators"])]
        body.append(shown)
    return markdown(["mean", "bits", "by", "seeds", "float", "torch", "OpenVINO", "INT8 layers", "operators"], body)


def overhead_table() -> str:
    """Return how long each check of a calibration took, and which share of it."""
    body = []
    for row in rows_of("overhead"):
        for kind, seconds in row["checks"].items():
            body.append([kind, f"{seconds:.2f}", f"{100 * seconds / row['seconds']:.2f} %"])
        checks = sum(row["checks"].values())
        body.append(["all checks", f"{checks:.2f}", f"**{100 * row['share']:.2f} %**"])
        body.append([f"the calibration, {row['steps']} steps a stage", f"{row['seconds']:.1f}", ""])
    return markdown(["check", "seconds", "share"], body)


def kills_table() -> str:
    """Return how many killed calibrations ended as if nothing had happened."""
    entries = json.loads((RESULTS / "kills.json").read_text())["entries"]
    schedules = list(next(iter(entries.values())))
    body = [
        [name, *(f"{found[schedule]['survived']} of {found[schedule]['kills']}" for schedule in schedules)]
        for name, found in entries.items()
    ]
    return markdown(["same bits, nothing left", *schedules], body)


def latency_table() -> str:
    """Return how long one image takes in each form on each runtime, and what that form computes in."""
    body = []
    for network, runtimes in json.loads((RESULTS / "latency.json").read_text())["rows"].items():
        for runtime, row in runtimes.items():
            for name, median in row["median_ms"].items():
                ratio = next((r for pair, r in row["ours_by_theirs"].items() if pair.startswith(f"{name} by ")), None)
                shown = NOTHING if ratio is None else f"{ratio:.3f}"
                body.append(
                    [f"{network}, {row['size']}", runtime, name, row["precision"][name], f"{median:.2f}", shown]
                )
    return markdown(["network, pixels", "runtime", "form", "precision", "ms", "ours by theirs"], body)


def mixed_table() -> str:
    """Return what assignments of 5 bits in the mean score: uniform, chosen, and the best of those drawn at random."""
    rows, body = rows_of("mixed_precision"), []
    labels = {"yolov6-n": ("YOLOv6-n, box mAP", 100), "mobileone": ("MobileOne, top-1 %", 1)}
    for model, steps in dict.fromkeys((row["model"], row["steps"]) for row in rows):
        label, times = labels[model]
        found = {r["assignment"]: times * r["score"] for r in rows if (r["model"], r["steps"]) == (model, steps)}
        drawn = [f"{score:.2f}" for name, score in found.items() if name.startswith("random")]
        told = [f"{found[name]:.2f}" for name in ("uniform", "chosen", "chosen, operations too") if name in found]
        body.append([label, str(steps), *(told if len(told) == 3 else [NOTHING] * 3), ", ".join(drawn)])
    return markdown(["mean of 5 bits", "steps", "uniform", "chosen", "operations too", "drawn at random"], body)


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary_table,
    "comparison": comparison_table,
    "observers": observers_table,
    "depth": depth_table,
    "imports": imports_table,
    "photographs": photographs_table,
    "runtimes": runtime_table,
    "latency": latency_table,
    "overhead": overhead_table,
    "targets": targets_table,
    "devices": devices_table,
    "nncf": nncf_table,
    "kills": kills_table,
    "fuzz": lambda: fuzz_table(RESULTS / "fuzz.json"),
    "ranks": ranks_table,
    "ranks-model": ring_table,
    "ranks-equal": ranks_equal_table,
    "mixed-precision": mixed_table,
    "mimicnorm": training_table,
    "mimicnorm-quantization": outlier_table,
    "ablation-repvgg": lambda: ablation_table("repvgg"),
    "ablation-mobileone": lambda: ablation_table("mobileone"),
}


def tables_in(text: str) -> dict[str, str]:
    """Return the tables that a text holds, by name."""
    return {found["name"]: found["table"].strip() for found in PLACE.finditer(text)}


def with_tables(text: str) -> str:
    """Return the text with every table made anew."""
    return PLACE.sub(lambda found: f"{found['begin']}{TABLES[found['name']]()}\n{found['end']}", text)


PLACE = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n)(?P<table>.*?)(?P<end><!-- end -->)", re.DOTALL)


@click.command()
@click.option("--write", is_flag=True, help="Put the tables into the documents that show them.")
def main(write: bool) -> None:
    """Print the tables, or write them."""
    if write:
        for document in DOCUMENTS:
            document.write_text(with_tables(document.read_text()))
        return
    for name, make in TABLES.items():
        click.echo(f"{name}\n\n{make()}\n")


if __name__ == "__main__":
    main()
