"""Tables of trainings with and without MimicNorm."""

from __future__ import annotations

import statistics

from integration.bench.table_parts import NOTHING, PRESETS, Row, markdown, mean_of, rows_of
from repapq_plugin.mimicnorm import RECIPES, Recipe


def way_of(row: Row) -> str:
    """Return how a network was trained, with the recipe of the weight mean where that is not the default."""
    method: str = row["method"]
    recipe = Recipe(**row["recipe"]) if method == "MimicNorm" else Recipe()
    if recipe == RECIPES["authors"]:
        return f"{method}, authors' recipe"
    return method if recipe == Recipe() else f"{method}, fan-in above {recipe.min_fan_in}"


def training_table() -> str:
    """Return what networks score that were trained with batch norm, with MimicNorm and with no norm."""
    rows = rows_of("mimicnorm", "accuracy")
    found = {way_of(row) for row in rows}
    of_ours = sorted(way for way in found if way.startswith("MimicNorm"))
    ways = ["batch norm", *of_ours, *({"no norm"} & found)]
    body = []
    order = list(dict.fromkeys(row["network"] for row in rows))
    for network, epochs in sorted(
        {(row["network"], row["epochs"]) for row in rows}, key=lambda key: (order.index(key[0]), key[1])
    ):
        here = [row for row in rows if (row["network"], row["epochs"]) == (network, epochs)]
        scores = {way: [row["accuracy"] for row in here if way_of(row) == way] for way in ways}
        normed = scores["batch norm"]
        if normed and any(scores[way] for way in of_ours):
            ours = scores.get("MimicNorm")
            gap = f"{statistics.mean(ours) - statistics.mean(normed):+.2f}" if ours else NOTHING
            body.append([network, str(epochs), *(mean_of(scores[way]) for way in ways), gap])
    return markdown(["top-1 %", "epochs", *ways, "MimicNorm less batch norm"], body)


def outlier_table() -> str:
    """Return how differently trained networks quantize, and how far their weights and activations reach."""
    rows = rows_of("mimicnorm", "quantization")
    body = []
    for network, way in dict.fromkeys((row["network"], way_of(row)) for row in rows):
        found = [row for row in rows if (row["network"], way_of(row)) == (network, way)]
        cells = [mean_of(row["float"] for row in found)]
        for preset in PRESETS[:3]:
            pairs = (mean_of(row[how][preset] for row in found) for how in ("plain PTQ", "RepAPQ"))
            cells.append(" / ".join(pairs))
        for part in ("weights", "activations"):
            means = (statistics.mean(row[part][key] for row in found) for key in ("kurtosis", "peak"))
            cells.append(" / ".join(f"{mean:.1f}" for mean in means))
        body.append([f"{network}, {way}", *cells])
    bits = [f"{preset.upper()}: plain / RepAPQ" for preset in PRESETS[:3]]
    return markdown(["top-1 %", "float", *bits, "weights: kurtosis / peak", "activations: kurtosis / peak"], body)
