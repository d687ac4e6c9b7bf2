"""Files that hold a whole detector: the integer network, and behind it its head's decoding and suppression in float."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.files import write_atomically
from repapq_plugin.core.origin import Origin
from repapq_plugin.core.tensors import tensors_of, with_tensors
from repapq_plugin.errors import ExportError, HostError
from repapq_plugin.export.blame import brief
from repapq_plugin.export.calls import Call
from repapq_plugin.export.onnx_join import joined
from repapq_plugin.export.onnx_names import GraphNames
from repapq_plugin.export.onnx_trace import trace
from repapq_plugin.export.onnx_verify import RuntimeCheck, count_pairs, has_onnxruntime, operators
from repapq_plugin.export.openvino import export_openvino
from repapq_plugin.export.origins import set_properties
from repapq_plugin.export.qdq_onnx import OnnxSummary
from repapq_plugin.hosts.openmmlab.decoding import OUTPUTS, DecodedHead
from repapq_plugin.hosts.openmmlab.network import serving_points
from repapq_plugin.hosts.openmmlab.steps import LoadedModel
from repapq_plugin.hosts.openmmlab.work import SUFFIXES, Exported

if TYPE_CHECKING:
    import onnx

PREFIX = "decoding/"
"""Before the names of all nodes behind the network."""

SAME = 0.99
"""Share of the detections of the toolbox's own decoding that a graph has to find again; the rest may be close calls of
the suppression, which rounding decides."""

NEAR = 1e-3
"""How far scores may be off, and boxes in proportion to the largest coordinate."""

NOISE = 2.0
"""Standard deviation of the raw outputs of a check, drawn at random: there is much to find, and no scores are equal."""


def export_detector(
    loaded: LoadedModel, example: Tensor, image_shape: tuple[int, int], path: Path, kind: str, origin: Origin
) -> Exported:
    """Write a quantized one-stage detector with its decoding: one image in, boxes, scores and labels out.

    What the decoding finds is compared with what the toolbox finds in the same raw outputs.

    Args:
        loaded: The quantized detector.
        example: Preprocessed image, float ``(1, C, H, W)``.
        image_shape: Height and width of what is image in it.
        path: File to write, without suffix.
        kind: ``'onnx'`` or ``'openvino'``.
        origin: How the network was made, to stand in the file.

    Raises:
        HostError: The head's decoding cannot be written; see `decoding.refuse`.
        ExportError: A graph cannot be written, or finds something else than the toolbox.
    """
    import onnx

    head = one_stage_head(loaded.model)
    with torch.no_grad():
        template = loaded.model(example, mode="tensor")
    decoded = DecodedHead(head, template, (int(example.shape[2]), int(example.shape[3])), image_shape).eval()
    with tempfile.TemporaryDirectory() as folder:
        network = loaded.export("onnx", example, Path(folder) / "network")
        proto = onnx.load(network.path)
        opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
        tail = decoding_graph(decoded, tensors_of(template), opset)
        whole = joined(proto, tail, PREFIX)
        origin = dataclasses.replace(origin, decoding=decoded.decoding)
        set_properties(whole, origin.to_text())
        data = whole.SerializeToString()
        target = path.with_name(path.name + SUFFIXES[kind])
        if kind == "openvino":
            source = Path(folder) / "detector.onnx"
            source.write_bytes(data)
            return Exported.of(export_openvino(source, example, target))
    write_atomically(target, data)
    pairs, weights = count_pairs(whole.graph)
    summary = cast(OnnxSummary, network.summary)
    return Exported.of(
        dataclasses.replace(
            summary,
            path=target,
            q_dq_pairs=pairs,
            weight_dq=weights,
            operators=dict(operators(whole.graph)),
            size_bytes=len(data),
            dynamic_batch=False,
        )
    )


def one_stage_head(model: nn.Module) -> nn.Module:
    """Return the head of a one-stage detector.

    Raises:
        HostError: The model has another form.
    """
    kind = type(model).__name__
    if isinstance(getattr(model, "roi_head", None), nn.Module):
        raise HostError(
            f"{kind} has two stages: what its second one looks at depends on what the first one finds. --with-decoding "
            "writes one-stage detectors only."
        )
    if any(hasattr(model, name) for name in ("mask_head", "panoptic_head", "query_head", "encoder")):
        raise HostError(
            f"{kind} gives masks or reads its features with a transformer; --with-decoding writes one-stage detectors "
            "that give boxes only."
        )
    head, _ = serving_points(model)
    return head


@torch.no_grad()
def decoding_graph(decoded: DecodedHead, raw: Sequence[Tensor], opset: int) -> onnx.ModelProto:
    """Return a head's decoding as an ONNX model, after comparing it with the toolbox's own.

    Args:
        decoded: The head.
        raw: Its raw outputs for one image.
        opset: ONNX operator set.

    Raises:
        ExportError: It cannot be traced, or finds something else.
    """
    kind = type(decoded.head).__name__
    try:
        found = toolbox_detections(decoded, raw)  # lets a head keep its priors, which are the same for each image
        names = GraphNames(raw, found, [f"raw_{index}" for index in range(len(raw))], list(OUTPUTS))
        proto = trace(decoded, Call(tuple(raw), {}), names, {name: {0: "detections"} for name in OUTPUTS}, opset)
        if has_onnxruntime():
            values = _drawn(decoded, raw)
            given = dict(zip(names.inputs, values, strict=True))
            results = RuntimeCheck(proto.SerializeToString(), decoded).run(given)
            _compare(results, toolbox_detections(decoded, values))
    except (ExportError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ExportError(
            f"The decoding of {kind} cannot be written: {type(error).__name__}: {brief(error).rstrip('.')}. Leave "
            "--with-decoding out: the toolbox decodes what the network part gives."
        ) from error
    return proto


def _drawn(decoded: DecodedHead, raw: Sequence[Tensor]) -> list[Tensor]:
    """Return raw outputs drawn at random, of which some hundredths of the scores are above the head's threshold."""
    generator = torch.Generator().manual_seed(0)
    threshold = min(max(decoded.threshold, 1e-3), 0.5)
    low = math.log(threshold / (1 - threshold)) - 2 * NOISE
    classes = int(cast(int, decoded.head.num_classes))
    drawn = [NOISE * torch.randn(value.shape, generator=generator) for value in raw]
    return [value + low if value.shape[1] % classes == 0 else value for value in drawn]


def toolbox_detections(decoded: DecodedHead, raw: Sequence[Tensor]) -> list[Tensor]:
    """Return what the toolbox's own decoding finds in the raw outputs of one image; see `OUTPUTS`."""
    outputs = cast("tuple[object, ...]", with_tensors(decoded.template, (value.clone() for value in raw)))
    decode = cast("Callable[..., Sequence[object]]", decoded.head.predict_by_feat)
    metas = cast("Mapping[str, object]", dict(decoded.metas))
    found = decode(*outputs, batch_img_metas=[metas], rescale=False)[0]
    boxes, *others = (getattr(found, name) for name in ("bboxes", "scores", "labels"))
    return [getattr(boxes, "tensor", boxes), *others]


def _compare(results: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Make sure that detections are the same, whatever the order of equal scores.

    Raises:
        ExportError: They are not.
    """
    boxes, scores, labels = results
    size = max(float(wanted[0].abs().max()), 1.0) if len(wanted[0]) else 1.0
    same = 0
    for box, score, label in zip(*wanted, strict=True):
        near = (labels == label) & ((scores - score).abs() < NEAR) & ((boxes - box).abs().amax(dim=1) < NEAR * size)
        same += bool(near.any())
    most = max(len(scores), len(wanted[1]))
    if same < SAME * most:
        raise ExportError(
            f"The graph finds {len(scores)} boxes where the toolbox finds {len(wanted[1])}; {same} are the same."
        )
