"""Scoring files: a saved result, or a network that was exported."""

from __future__ import annotations

from pathlib import Path

from repapq_plugin.core.origin import Origin
from repapq_plugin.evaluation.processor import saturation_note
from repapq_plugin.hosts.openmmlab.settings import RUNTIME_FORMATS
from repapq_plugin.hosts.openmmlab.steps import EXPORTED, Step, load_quantized
from repapq_plugin.hosts.openmmlab.work import SUFFIXES, open_network
from repapq_plugin.hosts.openmmlab.workbench import Workbench


def score_result(
    bench: Workbench, path: Path, backend: str, step: Step, folder: Path, origin: Origin | None = None
) -> tuple[dict[str, float], list[str]]:
    """Score a saved or exported network with the toolbox's own loop, data and metric.

    Args:
        bench: Holds the model of the config; its weights do not matter.
        path: A ``.safetensors``, ``.pth``, ``.onnx`` or ``.xml`` file.
        backend: One of `BACKENDS`.
        step: Told about each step.
        folder: Takes what has to be exported first.
        origin: What the file says of how it was made.

    Returns:
        All metrics, and what a reader of them should know.

    Raises:
        ResultError, ExportError, HostError: The file cannot be read, exported or run.
    """
    kind, notes = RUNTIME_FORMATS.get(backend), list[str]()
    config = None if origin is None else origin.quantizer
    model, network = bench.model, None
    if path.suffix in SUFFIXES.values():
        network = open_network(path, backend)
    else:
        loaded = load_quantized(path, bench.model, lambda: bench.example)
        model, network = loaded.model, loaded.network
        config = config if loaded.result is None else loaded.result.config
        if kind is not None:
            with step("export", f"Exporting for {backend}"):
                exported = loaded.export(kind, bench.example, folder / EXPORTED)
            network = open_network(exported.path, backend)
        elif network is not None and loaded.result is not None:
            notes.append(f"{path.name} was calibrated for another host; here its integers are simulated.")
    if backend == "openvino" and config is not None:
        notes.append(saturation_note(config.reduce_range))
    with step("score", f"Scoring {path.name} ({backend})") as report:
        decoding = None if origin is None else origin.decoding
        return bench.score(model, network, report, decoding), [note for note in notes if note]
