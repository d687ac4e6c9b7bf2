"""Which of a toolbox's many metrics a table shows, and how they are called there."""

from __future__ import annotations

from collections.abc import Mapping

HEADLINES = (
    ("bbox_mAP", "mAP"),
    ("bbox_mAP_50", "mAP50"),
    ("segm_mAP", "mask mAP"),
    ("accuracy/top1", "top-1 %"),
    ("accuracy/top5", "top-5 %"),
    ("mIoU", "mIoU %"),
    ("aAcc", "pixel acc. %"),
)
"""Endings of the toolboxes' metric names, and short names for them."""


def headlines(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """Return short names of the metrics worth a column, by the toolbox's names.

    What is not known keeps its own name; of those the first three are shown.
    """
    known = {key: label for ending, label in HEADLINES for key in metrics if key.endswith(ending)}
    return known or {key: key for key in list(metrics)[:3]}
