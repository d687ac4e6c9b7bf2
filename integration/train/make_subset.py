"""Make the shipped subset of Fashion-MNIST: ``python -m integration.train.make_subset``.

Takes the first items of every class of every split, keeps the order of the original files, and writes
``integration/assets/fashion_items.npz`` and ``fashion_items.json`` (counts and SHA-256 of each split).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from integration.fashion.items import CLASSES, SPLITS, SUBSET_FILE, Items, load_items

PER_CLASS = {"train": 160, "val": 40, "test": 200}


def pick(items: Items, per_class: int) -> Items:
    """The first ``per_class`` items of each class, in the order of the original file."""
    chosen = np.sort(
        np.concatenate([np.flatnonzero(items.labels == label)[:per_class] for label in range(len(CLASSES))])
    )
    return Items(items.split, "subset", items.images[chosen], items.labels[chosen], items.indices[chosen])


def main() -> None:
    """Write the subset and its description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of the full Fashion-MNIST; found by itself if left out")
    parser.add_argument("--out", type=Path, default=SUBSET_FILE, help="file to write")
    args = parser.parse_args()
    arrays: dict[str, np.ndarray] = {}
    description: dict[str, dict[str, object]] = {}
    for split in SPLITS:
        items = pick(load_items(split, "full", args.root), PER_CLASS[split])
        arrays[f"{split}_images"] = items.images
        arrays[f"{split}_labels"] = items.labels.astype(np.uint8)
        arrays[f"{split}_indices"] = items.indices.astype(np.uint16)
        description[split] = {"count": len(items), "sha256": items.digest()}
    np.savez_compressed(args.out, **arrays)
    args.out.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n")


if __name__ == "__main__":
    main()
