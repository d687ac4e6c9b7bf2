"""Random small networks, each merged, quantized, calibrated, folded, saved, loaded, exported and run by onnxruntime.

    python -m integration.bench.fuzz --count 10000 --workers 2

What a network is follows from its seed. Each has to end equal to its simulation, or refused with a reason
(`integration.fuzz.check`). One that takes longer than ``--limit`` seconds hangs; one whose process dies crashes. What
was found goes line by line into a work file, and what stands there is not run again. ``results/fuzz.json`` holds the
counts; ``--redo`` runs again what ended wrong.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

import torch

from integration.fuzz.check import Ending, put_to_the_test
from integration.fuzz.reasons import reason_of

RESULTS = Path(__file__).with_name("results") / "fuzz.json"
PACKAGES = ("torch", "onnx", "onnxruntime", "safetensors", "timm")
FORKS = multiprocessing.get_context("fork")
"""Processes that need not import everything again; this one runs nothing itself."""

AT_ONCE = 250
"""Networks of one process: torch's tracer keeps some memory of each."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was not run yet, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="networks, from the first seed on")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--limit", type=int, default=120, help="seconds for one network")
    parser.add_argument("--work", type=Path, default=Path("fuzz.jsonl"), help="file of what was run")
    parser.add_argument("--redo", action="store_true", help="run again what ended wrong")
    parser.add_argument("--only-count", action="store_true", help="run nothing, count what was run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    words = parser.parse_args(arguments)
    found = endings_in(words.work)
    seeds = range(words.first, words.first + words.count)
    todo = [seed for seed in seeds if seed not in found or (words.redo and not found[seed].good)]
    if not words.only_count:
        for ending in run(todo, words.workers, words.limit):
            found[ending.seed] = ending
            with words.work.open("a") as file:
                file.write(json.dumps(asdict(ending)) + "\n")
            if not ending.good:
                print(ending.seed, ending.end, ending.stage, ending.reason, flush=True)
    counts = counted([found[seed] for seed in seeds if seed in found])
    words.out.write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(counts, indent=1))


def endings_in(path: Path) -> dict[int, Ending]:
    """Return what a work file holds, by seed; the last line of a seed counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {ending.seed: ending for ending in (Ending(**json.loads(line)) for line in lines)}


def counted(endings: Iterable[Ending]) -> dict[str, object]:
    """Return how many networks ended how, and refusals by reason."""
    endings = list(endings)
    refusals = Counter(reason_of(ending.reason) for ending in endings if ending.end == "refused")
    return {
        "networks": len(endings),
        "first seed": min((ending.seed for ending in endings), default=0),
        "ends": dict(Counter(ending.end for ending in endings).most_common()),
        "wrong seeds": sorted(ending.seed for ending in endings if not ending.good),
        "refusals": dict(refusals.most_common()),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def run(seeds: Sequence[int], workers: int, limit: int) -> Iterable[Ending]:
    """Yield how networks end, in the order in which they do; a process that dies takes only its network with it."""
    left = [list(seeds[start::workers]) for start in range(workers)]
    running: dict[Connection, tuple[BaseProcess, list[int]]] = {}
    while running or any(left):
        for own in left:
            if own and not any(one is own for _, one in running.values()):
                receiver, sender = multiprocessing.Pipe(duplex=False)
                process = FORKS.Process(target=work, args=(own[:AT_ONCE], sender, limit), daemon=True)
                process.start()
                sender.close()
                running[receiver] = (process, own)
        for receiver in wait(list(running)):
            process, own = running[receiver]
            try:
                ending = receiver.recv()
                own.remove(ending.seed)
                yield ending
            except EOFError:
                process.join()
                del running[receiver]
                if process.exitcode and own:
                    yield Ending(own.pop(0), "dies", "", f"its process ended with code {process.exitcode}")


def work(seeds: Sequence[int], sender: Connection, limit: int) -> None:
    """Put networks to the test, in a process of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # torch prints graphs that it cannot export
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _stop)
    for seed in seeds:
        signal.alarm(limit)
        faulthandler.dump_traceback_later(2 * limit, exit=True)  # what hangs outside Python
        ending = put_to_the_test(seed)
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        sender.send(ending)
    sender.close()


def _stop(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("the time for one network is over")


if __name__ == "__main__":
    main()
