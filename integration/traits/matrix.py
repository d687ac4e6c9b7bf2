"""Prints the matrix of traits and hosts as a Markdown table: ``python -m integration.traits.matrix``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nncf

from integration.traits.cells import HOSTS, quantize_cell
from integration.traits.networks import NETWORKS


def rows(traits: list[str], preset: str, steps: int) -> Iterator[str]:
    """Yield the lines of one table."""
    yield f"| {preset}, {steps} steps | " + " | ".join(HOSTS) + " |"
    yield "| --- " * (len(HOSTS) + 1) + "|"
    for trait in traits:
        with silence():
            cells = [str(quantize_cell(trait, host, preset, steps)) for host in HOSTS]
        yield " | ".join([f"| {trait}", *cells]) + " |"


@contextmanager
def silence() -> Iterator[None]:
    """Keep off the output what torch prints there from C++: graphs that it cannot export."""
    sys.stdout.flush()
    before = os.dup(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(before, 1)
            os.close(before)


def main() -> None:
    """Print one table for each choice of bits and steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traits", nargs="*", default=list(NETWORKS))
    parser.add_argument("--presets", nargs="+", default=["w8a8", "w4a4"])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 20])
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    nncf.set_log_level(logging.ERROR)
    for steps in told.steps:
        for preset in told.presets:
            print(*rows(told.traits, preset, steps), sep="\n", end="\n\n", flush=True)


if __name__ == "__main__":
    main()
