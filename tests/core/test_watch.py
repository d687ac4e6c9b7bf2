"""Watchers see the tensor functions of a run, before and after."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.watch import FunctionWatch, MakersWatch


class Log(FunctionWatch):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, float, float]] = []

    def before(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> float:
        first = args[0]
        return float(first.sum()) if isinstance(first, Tensor) else 0.0

    def after(
        self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object], result: object, note: float
    ) -> None:
        assert isinstance(result, Tensor)
        self.calls.append((name, note, float(result.sum())))


def test_arguments_are_read_before_a_function_overwrites_them() -> None:
    x = torch.ones(2)
    with Log() as log:
        x.mul_(3)
        torch.add(x, 1)
    assert log.calls == [("mul_", 2.0, 6.0), ("add", 6.0, 8.0)]


def test_reading_a_shape_is_no_call_and_nothing_is_seen_afterwards() -> None:
    x = torch.ones(2)
    with Log() as log:
        _ = x.shape, x.dtype, x.dim()
    torch.add(x, 1)
    assert log.calls == []


def test_a_watch_does_not_change_results() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(3, 4)
    wanted = model(x)
    with Log():
        assert torch.equal(model(x), wanted)


class Uses(nn.Module):
    def __init__(self, more: bool) -> None:
        super().__init__()
        self.layer, self.reader, self.more = nn.Linear(2, 2), nn.ReLU(), more

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.reader(y) + y if self.more else self.reader(y)


def watched(more: bool) -> tuple[Uses, MakersWatch]:
    model, watch = Uses(more), MakersWatch()

    def runs(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        watch.reading.append(args[0])

    with Hooks() as hooks, watch:
        hooks.after(model.layer, lambda layer, _, output: watch.made(layer, output))
        hooks.before(model.reader, runs)
        hooks.after(model.reader, lambda *_: watch.reading.clear())
        watch.note_use(model(torch.ones(1, 2)))
    return model, watch


def test_a_reader_that_reports_is_no_use_elsewhere() -> None:
    assert watched(more=False)[1].used_elsewhere == set()


def test_what_else_reads_an_output_is_a_use_elsewhere() -> None:
    model, watch = watched(more=True)
    assert watch.used_elsewhere == {model.layer}


def test_the_maker_of_a_tensor_is_known_by_the_tensor_itself() -> None:
    watch, layer = MakersWatch(), nn.Linear(1, 1)
    output = torch.ones(1)
    watch.made(layer, output)
    watch.made(layer, "no tensor")
    assert watch.maker_of(output) is layer
    assert watch.maker_of(output.clone()) is None and watch.maker_of("no tensor") is None
