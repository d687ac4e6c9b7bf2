"""Other people's tools on the same network, data and metric: each in an environment of its own, with its own defaults.

A peer gets the merged float network as an ONNX file and the calibration samples as arrays. It says what it took, and
then computes what it is given, so that one metric judges all. Sources: each peer's own documentation, and what was seen
of the versions below.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from repapq_plugin.comparison.environments import default_folder, environment_with
from repapq_plugin.comparison.served import ServedNetwork
from repapq_plugin.comparison.subject import Subject
from repapq_plugin.comparison.table import Row
from repapq_plugin.comparison.tasks import Task, common_scheme, on_runtime, own_folder
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ConfigError
from repapq_plugin.targets.target import GENERIC


@dataclass(frozen=True)
class Peer:
    """One tool.

    Args:
        title: What a table calls it, with its version.
        requirements: What its environment holds, as pip takes it.
        program: Module in ``programs/`` that quantizes with it.
        methods: What its ways are called in a table, by short name; the first is taken where none is named.
        bits: Widths of weights and activations that it can do; empty: any.
        ends: Whether the first and the last layer can have bits of their own.
        learns: Which of the methods depend on the seed.
        python: Version of its interpreter.
    """

    title: str
    requirements: tuple[str, ...]
    program: str
    methods: Mapping[str, str]
    bits: tuple[int, ...] = ()
    ends: bool = False
    learns: tuple[str, ...] = ()
    python: str = "3.11"

    def refuses(self, config: RepAPQConfig) -> str:
        """Say why it cannot do a scheme; empty if it can."""
        asked = {config.weight_bits, config.activation_bits, config.first_last_bits or config.weight_bits}
        if self.bits and not asked <= set(self.bits):
            others = ", ".join(str(bits) for bits in sorted(asked - set(self.bits)))
            return f"{self.title} quantizes to {', '.join(map(str, self.bits))} bits, not to {others}"
        if config.first_last_bits is not None and not self.ends and len(asked) > 1:
            return f"{self.title} gives the first and the last layer no bits of their own"
        if config.target != GENERIC:
            return f"{self.title} is not told of target={config.runs_on.name!r} here"
        for key in ("layer_bits", "keep_float", "reduce_range"):
            if getattr(config, key):
                return f"{self.title} is not told of {key} here"
        return ""


PEERS: dict[str, Peer] = {
    "onnxruntime": Peer(
        "onnxruntime 1.31.1, quantize_static",
        ("onnxruntime==1.31.1", "onnx==1.23.2"),
        "peer_onnxruntime",
        {"min-max": "min-max", "entropy": "entropy", "percentile": "percentile"},
        bits=(8,),
    ),
    "nncf": Peer(
        "NNCF 3.4.0, quantize",
        ("nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.31.1"),
        "peer_nncf",
        {"default": "its defaults", "bias-correction": "accurate bias correction"},
        bits=(8,),
    ),
    "esp-ppq": Peer(
        "esp-ppq 1.3.12",
        ("esp-ppq==1.3.12", "torch==2.12.1", "onnx==1.19.1", "onnxruntime==1.31.1"),
        "peer_esp_ppq",
        {"lsq": "LSQ by blocks", "rounding": "learned rounding by blocks", "mse": "MSE ranges", "min-max": "min-max"},
        ends=True,
        learns=("lsq", "rounding"),
    ),
}
"""By the names that a user gives."""


@dataclass(frozen=True)
class PeerOptions:
    """How peers are run.

    Args:
        names: ``peer`` or ``peer:method``.
        env_dir: Where their environments are kept; ``None``: in the user's cache folder.
        steps: Steps of those that learn; ``None``: their own default.
        pythons: Interpreters to take in place of an environment, by peer.
    """

    names: Sequence[str] = ()
    env_dir: Path | None = None
    steps: int | None = None
    pythons: Mapping[str, Path] = field(default_factory=dict)

    def chosen(self) -> list[tuple[str, str]]:
        """Return peers and methods.

        Raises:
            ConfigError: There is no such peer or method.
        """
        found = []
        for name in self.names:
            peer, _, method = name.partition(":")
            if peer not in PEERS:
                near = difflib.get_close_matches(peer, PEERS, 1, 0.0)[0]
                raise ConfigError(f"peer={name!r} is not allowed; choose from {', '.join(PEERS)} (nearest: {near}).")
            methods = PEERS[peer].methods
            if method and method not in methods:
                allowed = ", ".join(f"{peer}:{key}" for key in methods)
                raise ConfigError(f"peer={name!r} is not allowed; choose from {allowed}.")
            found.append((peer, method or next(iter(methods))))
        return list(dict.fromkeys(found))


def peer_tasks(subject: Subject, options: PeerOptions, seeds: Sequence[int]) -> list[Task]:
    """Return a task for each peer's method and seed; a single one where nothing depends on the seed.

    Raises:
        ConfigError: See `PeerOptions.chosen`.
    """
    tasks = []
    for name, method in options.chosen():
        title = f"{PEERS[name].title}, {PEERS[name].methods[method]}"
        for seed in seeds if method in PEERS[name].learns else (None,):
            make = partial(peer_row, subject, name, method, seed, options)
            tasks.append(Task(f"{name}:{method}", title, seed, make))
    return tasks


def peer_row(subject: Subject, name: str, method: str, seed: int | None, options: PeerOptions) -> Row:
    """Let a peer quantize the merged float network, and score what it makes of it.

    Raises:
        HostError: Its environment cannot be made, or it failed.
        ExportError: The float network cannot be written for it.
    """
    peer, config = PEERS[name], subject.scheme
    key = f"{name}:{method}"
    row = Row(key, f"{peer.title}, {peer.methods[method]}", peer.requirements[0], common_scheme(config), seed)
    refused = peer.refuses(config)
    if refused:
        return replace(row, failed=refused, impossible=True)
    python = options.pythons.get(name) or environment_with(
        name, peer.requirements, options.env_dir or default_folder(), peer.python
    )
    folder = own_folder(subject, key, seed).resolve()
    told = {
        "method": method,
        "weight_bits": config.weight_bits,
        "activation_bits": config.activation_bits,
        "first_last_bits": config.first_last_bits,
        "seed": seed or 0,
        "steps": options.steps if method in peer.learns else None,
        "threads": subject.threads,
    }
    calibration = folder / "calibration.npz"
    np.savez(calibration, *(array(batch) for batch in subject.batches))
    job = {**told, "onnx": str(subject.float_onnx.resolve()), "calibration": str(calibration)}
    try:
        with ServedNetwork(python, peer.program, job, folder) as network:
            facts = network.facts
            row = replace(
                row,
                settings={key: value for key, value in told.items() if value is not None and key != "threads"},
                simulated=subject.score(network),
                weight_bits=float(config.weight_bits),
                activation_bits=float(config.activation_bits),
                cpu_seconds=cast("float | None", facts.get("cpu_seconds")),
                peak_bytes=cast("int | None", facts.get("peak_bytes")),
            ).with_notes(str(facts.get("note", "")))
    finally:
        calibration.unlink(missing_ok=True)
    if "file" not in facts:
        return row
    return on_runtime(row, subject, lambda: subject.judge_file(Path(str(facts["file"]))))


def array(batch: Tensor) -> npt.NDArray[np.float32]:
    """Return a batch as a peer gets it, float32."""
    found: npt.NDArray[np.float32] = batch.detach().cpu().float().contiguous().numpy()
    return found
