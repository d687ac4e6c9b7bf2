"""A dense head's own decoding as a module to be traced: raw outputs in, boxes, scores and labels out.

Nothing of a head is written anew. Its ``predict_by_feat`` runs as it stands. Three things that it calls, and that a
graph cannot hold, are exchanged for the time of the call:

* ``filter_scores_and_topk`` leaves out what is below a threshold, so that shapes depend on data. Here such scores
  become negative, and the suppression leaves them out.
* ``batched_nms`` of mmcv becomes one operator on the same boxes, shifted by class as mmcv shifts them.
* Clamping in place through a view, which the tracer loses, writes back.

Boxes are those of the network's input. Scaling them to the original image is left to whoever runs the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from repapq_plugin.core.origin import Decoding
from repapq_plugin.core.tensors import with_tensors
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab._compat import DENSE_HEAD, dense_functions, everywhere, outside_of_export

OUTPUTS = ("boxes", "scores", "labels")
"""Names of a whole detector's outputs: float ``(n, 4)`` as x1, y1, x2, y2 in pixels; float ``(n,)``; int64 ``(n,)``."""

LEFT_OUT = -1.0
"""Score of a candidate that a head's threshold leaves out."""


class _Graph(Protocol):
    """What torch's tracing exporter hands to ``symbolic``."""

    def op(self, operator: str, *inputs: torch.Value, **attributes: object) -> torch.Value:
        """Append a node and return its output."""


class Suppression(torch.autograd.Function):
    """Non-maximum suppression of boxes with scores above a threshold, as one ONNX node.

    It is there to be traced: in torch it only takes the best scores, of whatever boxes; nobody reads the values.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, most: int
    ) -> Tensor:
        """Return indices, int64, of what could be kept, best score first.

        Args:
            ctx: Not used.
            boxes: Float ``(n, 4)``.
            scores: Float ``(n,)``.
            iou_threshold: The node leaves out boxes that overlap a better one by more.
            score_threshold: And those without a higher score.
            most: How many are kept at most.
        """
        return scores.topk(min(most, len(scores))).indices

    @staticmethod
    def symbolic(
        g: _Graph,
        boxes: torch.Value,
        scores: torch.Value,
        iou_threshold: float,
        score_threshold: float,
        most: int,
    ) -> torch.Value:
        """Emit the node, on a batch and a class of one."""

        def constant(value: Tensor) -> torch.Value:
            return g.op("Constant", value_t=value)

        selected = g.op(
            "NonMaxSuppression",
            g.op("Unsqueeze", boxes, constant(torch.tensor([0]))),
            g.op("Unsqueeze", scores, constant(torch.tensor([0, 1]))),
            constant(torch.tensor([most])),
            constant(torch.tensor([iou_threshold], dtype=torch.float32)),
            constant(torch.tensor([score_threshold], dtype=torch.float32)),
        )
        return g.op("Gather", selected, constant(torch.tensor(2)), axis_i=1)


class Traceable(TorchFunctionMode):
    """Reads sizes as numbers, and turns a clamp of some columns in place into one of the whole tensor.

    The tracer would lose a change that is made through a view.
    """

    def __init__(self) -> None:
        super().__init__()
        self._views: dict[int, tuple[Tensor, Tensor, object]] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run a function of torch."""
        kwargs = dict(kwargs or {})
        if func is Tensor.clamp_ and id(args[0]) in self._views:
            _, base, taken = self._views[id(args[0])]
            bounds = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
            _clamp_columns(base, taken, bounds.get("min"), bounds.get("max"))
            return args[0]
        if func is Tensor.__getitem__ and _takes_a_column(args[1]):
            # By a slice: OpenVINO gets the shape wrong where several columns of one tensor are gathered.
            *others, column = cast("tuple[int, ...]", args[1])
            index = tuple([*others, slice(column, column + 1 or None)])
            return cast(Tensor, args[0])[index].squeeze(-1)
        result = func(*args, **kwargs)
        if func is Tensor.__getitem__ and isinstance(result, Tensor):
            self._views[id(result)] = (result, cast(Tensor, args[0]), args[1])  # kept, so that an id stays its own
        if func is not Tensor.size and getattr(func, "__self__", None) is not Tensor.shape:
            return result
        return torch.Size(map(int, result)) if isinstance(result, tuple) else int(cast(int, result))


def _takes_a_column(index: object) -> bool:
    """Whether an index means one column of the last axis, and whole other axes."""
    if not isinstance(index, tuple) or not isinstance(index[-1], int) or isinstance(index[-1], bool):
        return False
    return all(part is Ellipsis or part == slice(None) for part in index[:-1])


def _clamp_columns(base: Tensor, index: object, lowest: object, highest: object) -> None:
    """Do ``base[index].clamp_(lowest, highest)`` in place of ``base``, where ``index`` takes columns of all rows."""
    width = int(base.shape[-1])
    columns = range(width)[cast("tuple[slice, ...]", index)[-1]]

    def bounds(bound: object, open_end: float) -> Tensor:
        end = open_end if bound is None else float(cast(float, bound))
        return base.new_tensor([end if column in columns else open_end for column in range(width)])

    base.clamp_(bounds(lowest, -torch.inf), bounds(highest, torch.inf))


class Noting(dict[str, object]):
    """A dict that notes which of its keys are asked for."""

    def __init__(self, values: Mapping[str, object]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> object:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        """Return a value, or ``default``."""
        self.read.add(key)
        return super().get(key, default)


class DecodedHead(nn.Module):
    """The decoding of a head for one image of a fixed size, to be traced; see `Suppression`.

    Args:
        head: A dense head of mmdet or mmyolo.
        template: What its ``forward`` returns for one image; says how raw outputs belong together.
        input_shape: Height and width of the network's input, in pixels.
        image_shape: Those of the part of it that is image, to which mmdet's heads clamp boxes.

    Raises:
        HostError: The head decodes in a way that no graph can hold; see `refuse`.
    """

    def __init__(
        self, head: nn.Module, template: object, input_shape: tuple[int, int], image_shape: tuple[int, int]
    ) -> None:
        super().__init__()
        refuse(head)
        self.head, self.template = head, template
        own = cast("Mapping[str, object]", head.test_cfg)
        self.threshold = float(cast(float, own.get("score_thr", 0)))
        self.smallest = float(cast(float, own.get("min_bbox_size", -1)))
        self.cfg = copy.deepcopy(own)
        # Both are seen to by the suppression.
        cast("dict[str, object]", self.cfg).update(score_thr=-1, min_bbox_size=-1)
        self.metas = Noting(
            {
                **{key: input_shape for key in ("ori_shape", "pad_shape", "batch_input_shape")},
                "img_shape": image_shape,
                "scale_factor": (1.0, 1.0),
            }
        )
        self.filters = False

    @property
    def decoding(self) -> Decoding:
        """What is left to whoever runs the graph; known once this has run."""
        reads = self.metas.read
        shape = cast("tuple[int, int]", self.metas["img_shape"]) if "img_shape" in reads else None
        return Decoding(shape, "ori_shape" in reads)

    def forward(self, *raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decode the raw outputs of one image, in the order of `tensors_of`; see `OUTPUTS`."""
        self.filters = False
        outputs = cast("tuple[object, ...]", with_tensors(self.template, iter(raw)))
        decode = cast("Callable[..., Sequence[object]]", self.head.predict_by_feat)
        with ExitStack() as stack:
            stack.enter_context(outside_of_export())
            stack.enter_context(self._exchanged())
            stack.enter_context(Traceable())
            found = decode(*outputs, batch_img_metas=[self.metas], cfg=self.cfg, rescale=False, with_nms=True)[0]
        boxes = getattr(found, "bboxes")  # noqa: B009 - the toolbox's own element, which has any name
        boxes = getattr(boxes, "tensor", boxes)
        return boxes, getattr(found, "scores"), getattr(found, "labels")  # noqa: B009

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        filter_scores, suppress = dense_functions()
        with everywhere(filter_scores, self._filter), everywhere(suppress, self._suppress):
            yield

    def _filter(
        self, scores: Tensor, score_thr: float, topk: int, results: object = None
    ) -> tuple[Tensor, Tensor, Tensor, object]:
        """Stand for ``filter_scores_and_topk``: float ``(n, classes)`` in; scores, labels and rows of the best out."""
        self.filters = True
        count, classes = scores.shape
        best, places = scores.flatten(), torch.arange(count * classes)
        if 0 < topk < count * classes:
            best, places = best.topk(topk)
        rows, labels = torch.div(places, classes, rounding_mode="floor"), places % classes
        kept: object = None
        if isinstance(results, Mapping):
            kept = {key: value[rows] for key, value in results.items()}
        elif isinstance(results, list):
            kept = [value[rows] for value in results]
        elif isinstance(results, Tensor):
            kept = results[rows]
        return torch.where(best > self.threshold, best, LEFT_OUT), labels, rows, kept

    def _suppress(
        self,
        boxes: Tensor,
        scores: Tensor,
        idxs: Tensor,
        nms_cfg: Mapping[str, object] | None,
        class_agnostic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Stand for mmcv's ``batched_nms``."""
        told = _suppression_of(nms_cfg)
        threshold = 0.0 if self.filters else self.threshold
        hopeful = scores > threshold
        if self.smallest >= 0:
            sides = boxes[:, 2:] - boxes[:, :2]
            hopeful = hopeful & (sides > self.smallest).all(dim=1)
            scores = torch.where(hopeful, scores, LEFT_OUT)
        shifted = torch.where(hopeful[:, None], boxes, 0.0)  # what is left out may be infinite
        if not told.get("class_agnostic", class_agnostic):
            shifted = shifted + (idxs.to(boxes) * (shifted.max() + 1))[:, None]
        most = len(scores)
        if limits_boxes(self.head) and not self.cfg.get("yolox_style", False):
            most = int(cast(int, self.cfg.get("max_per_img", most)))
        iou = float(cast(float, told.get("iou_threshold", told.get("iou_thr"))))
        kept = cast(Tensor, Suppression.apply(shifted, scores, iou, threshold, most))  # type: ignore[no-untyped-call]
        return torch.cat([boxes[kept], scores[kept, None]], dim=1), kept


def limits_boxes(head: nn.Module) -> bool:
    """Whether a head cuts what it finds to ``max_per_img`` as mmdet's base class does; YOLOX's does not."""
    post_process = getattr(type(head), "_bbox_post_process", None)
    return getattr(post_process, "__qualname__", "").startswith(f"{DENSE_HEAD}.")


def _suppression_of(nms_cfg: Mapping[str, object] | None) -> Mapping[str, object]:
    """Return the settings of a suppression that the ONNX operator has.

    Raises:
        HostError: It is of another kind.
    """
    allowed = {"type", "iou_threshold", "iou_thr", "class_agnostic", "split_thr"}
    if nms_cfg is None or nms_cfg.get("type", "nms") != "nms" or not set(nms_cfg) <= allowed:
        said = None if nms_cfg is None else dict(nms_cfg)
        raise HostError(
            f"test_cfg.nms={said} has no form in a file; --with-decoding knows dict(type='nms', iou_threshold=...)."
        )
    return nms_cfg


def refuse(head: nn.Module) -> None:
    """Make sure that a head's decoding can be traced.

    Raises:
        HostError: It is no dense head with a suppression (a transformer's, for example), gives masks or keypoints, or
            its settings cannot be kept.
    """
    kind, bases = type(head).__name__, {base.__name__ for base in type(head).__mro__}
    remedy = "Export it without --with-decoding: the network part, whose outputs the toolbox decodes."
    if DENSE_HEAD not in bases or not hasattr(head, "predict_by_feat"):
        raise HostError(f"{kind} is no dense head with a decoding of its own that ends in a suppression. {remedy}")
    more = [name for name in ("mask_head", "mask_decoder", "kpt", "loss_mask", "loss_kpt") if hasattr(head, name)]
    if more or any(word in kind for word in ("Ins", "Mask", "Pose", "Rotated", "YOLACT", "SOLO", "Corner")):
        raise HostError(f"{kind} gives more than upright boxes, which --with-decoding cannot write. {remedy}")
    cfg = getattr(head, "test_cfg", None)
    if not isinstance(cfg, Mapping):
        raise HostError(f"{kind} has no test_cfg, so nothing says how it decodes; give model.test_cfg in the config.")
    _suppression_of(cast("Mapping[str, object] | None", cfg.get("nms")))
    for key, most in (("min_bbox_size", 0), ("conf_thr", 0)):
        if float(cast(float, cfg.get(key, -1))) > most:
            raise HostError(
                f"test_cfg.{key}={cfg[key]} of {kind} is applied where a file cannot follow; set it to {most}. {remedy}"
            )
