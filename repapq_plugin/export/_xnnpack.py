"""What the export uses of ExecuTorch that is undocumented (seen with executorch 1.3.1), and what XNNPACK was handed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

FLATC = "FLATC_EXECUTABLE"
"""Environment variable by which ExecuTorch finds the compiler that ships with it, if that is not on the path."""

LAYERS = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected")
"""XNNPACK's operators that have weights, by their names in what it is handed."""

INTEGERS = ("xnn_datatype_qint8", "xnn_datatype_qcint8")
"""Types of int8 tensors, with one scale and with one for each channel."""


@dataclass(frozen=True)
class XnnpackLayer:
    """An operator with weights as XNNPACK was handed it.

    Args:
        operator: Its name there.
        types: XNNPACK's types of input, weight and output.
    """

    operator: str
    types: tuple[str, str, str]

    @property
    def computes_integers(self) -> bool:
        """Whether input, weight and output are int8."""
        return all(kind in INTEGERS for kind in self.types)


def _flatc() -> Path:
    return Path(str(files("executorch.data.bin") / "flatc"))


@contextmanager
def flatc_found() -> Iterator[None]:
    """Let ExecuTorch find its compiler for the time of the block, also where its environment is not activated."""
    before = os.environ.get(FLATC)
    if before is None and shutil.which("flatc") is None and _flatc().is_file():
        os.environ[FLATC] = str(_flatc())
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(FLATC, None)


def xnnpack_layers(graph: GraphModule) -> tuple[list[XnnpackLayer], int]:
    """Return the operators with weights that a lowered graph hands to XNNPACK, and in how many partitions."""
    payloads = [getattr(module, "processed_bytes", None) for _, module in graph.named_children()]
    handed = [payload for payload in payloads if isinstance(payload, bytes)]
    return [layer for payload in handed for layer in _layers_of(payload)], len(handed)


def _layers_of(payload: bytes) -> Iterator[XnnpackLayer]:
    described = _read(payload)
    types = {}
    for value in described["xvalues"]:
        tensor = value["xvalue_union"]
        tensor = tensor.get("tensor_value", tensor)
        types[tensor["id_out"]] = tensor["datatype"]
    for node in described["xnodes"]:
        if node["xnode_union_type"].lstrip("_") in LAYERS:
            own = node["xnode_union"]
            source, weight, result = (types[own[key]] for key in ("input1_id", "filter_id", "output_id"))
            yield XnnpackLayer(node["xnode_union_type"], (source, weight, result))


def _read(payload: bytes) -> Mapping[str, Any]:
    """Return the graph that one partition holds, as the schema that ships with ExecuTorch describes it."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    schema = (files("executorch.backends.xnnpack.serialization") / "schema.fbs").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "schema.fbs").write_bytes(schema)
        (Path(folder) / "graph.bin").write_bytes(payload[start : start + header.flatbuffer_size])
        names = ["-o", folder, f"{folder}/schema.fbs", "--", f"{folder}/graph.bin"]
        options = ["--json", "--raw-binary", "--defaults-json", "--strict-json"]
        subprocess.run([str(_flatc()), *options, *names], check=True, capture_output=True)
        text = re.sub(r": (-?)inf\b", r": \1Infinity", (Path(folder) / "graph.json").read_text())
        read: Mapping[str, Any] = json.loads(text)
        return read
