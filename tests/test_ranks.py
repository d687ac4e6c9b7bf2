"""Calibrations of several processes end as that of one would, or stop together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import Progress, RepAPQConfig, quantize_model
from repapq_plugin.core import ranks
from tests.support.comparing import difference
from tests.support.killing import same
from tests.support.networks import Chain, Pyramid, settle
from tests.support.ranked import on_ranks, values

Shares = Callable[[list[Tensor], int, int], list[Tensor]]
"""Returns the batches of a rank out of all, from the rank and the number of ranks."""


def network(kind: type[nn.Module] = Pyramid) -> nn.Module:
    torch.manual_seed(1)
    return settle(kind())


def data(count: int = 4) -> list[Tensor]:
    """Return batches of images that are not equally loud."""
    torch.manual_seed(2)
    return [torch.randn(8, 3, 16, 16) * torch.rand(8, 1, 1, 1) * 4 for _ in range(count)]


def split(batches: list[Tensor], rank: int, size: int) -> list[Tensor]:
    """Each rank has a part of each batch."""
    return [batch[rank::size] for batch in batches]


def uneven(batches: list[Tensor], rank: int, size: int) -> list[Tensor]:
    """The last rank has one sample of the first batches, and nothing of the last one."""
    first = [batch[:1] if rank == size - 1 else batch[1 + rank :: size - 1] for batch in batches[:-1]]
    return first if rank == size - 1 else [*first, batches[-1][rank :: size - 1]]


def on_the_first(batches: list[Tensor], rank: int, size: int) -> list[Tensor]:
    """Rank 0 has all data."""
    return batches if rank == 0 else []


def calibrate(
    rank: int, shares: Shares, kind: type[nn.Module], keys: Mapping[str, object], folder: str = "", dies: str = ""
) -> dict[str, object]:
    """Calibrate a small network on this rank's share; ``"1 30"`` lets rank 1 be killed after 30 steps."""
    size = ranks.world().size

    def report(progress: Progress) -> None:
        if progress.phase == "calibration" and dies == f"{rank} {progress.done}":
            (Path(folder).parent / "died").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)

    config = RepAPQConfig.from_preset("w4a4", **{"steps": 10, **keys})
    more = {"checkpoint_dir": folder, "resume": True} if folder else {}
    result = quantize_model(network(kind), shares(data(), rank, size), config, progress=report, **more)  # type: ignore[arg-type]
    return {
        "numbers": {key: value.clone() for key, value in result.model.state_dict().items()},
        "units": [(unit.name, unit.kept, unit.loss_after) for unit in result.units],
        "notes": result.notes,
        "reductions": ranks.traffic.calls["all-reduce"],
    }


def calibrate_each(rank: int, shares: Shares, kind: type[nn.Module], keys: list[dict[str, object]]) -> list[object]:
    """Calibrate once for each configuration."""
    return [calibrate(rank, shares, kind, each) for each in keys]


def test_ranges_of_two_processes_are_those_of_one_to_the_last_bit() -> None:
    keys = [{"steps": 0}, {"steps": 0, "activation_observer": "percentile"}]
    keys.append({"steps": 0, "activation_observer": "min_max", "target": "tensorrt"})
    [alone] = values(1, calibrate_each, split, Pyramid, keys)
    for found in values(2, calibrate_each, split, Pyramid, keys):
        for one, other, each in zip(found, alone, keys, strict=True):
            assert same(one["numbers"], other["numbers"]), each


def test_what_two_processes_learn_is_what_one_learns() -> None:
    keys = [{"schedule": name, "steps": 3} for name in ("unit", "stage")]
    keys.append({"views": 2, "drop_probability": 0.5, "steps": 2})
    keys.append({"weight_bits": 8, "activation_bits": 8, "schedule": "network", "steps": 100})
    [alone] = values(1, calibrate_each, split, Pyramid, keys)
    first, second = values(2, calibrate_each, split, Pyramid, keys)
    for one, other, wanted, each in zip(first, second, alone, keys, strict=True):
        assert same(one["numbers"], other["numbers"]), "on all ranks the same"
        if "views" not in each:
            assert difference(one["numbers"], wanted["numbers"]) <= (1e-4 if each["steps"] == 100 else 1e-5), each
            assert [unit[:2] for unit in one["units"]] == [unit[:2] for unit in wanted["units"]]
            assert [unit[2] for unit in one["units"]] == pytest.approx([unit[2] for unit in wanted["units"]], rel=1e-4)
    steps = first[3]["reductions"] - first[2]["reductions"]
    assert 100 <= steps <= 103, "one for each step, and three for what comes before"


def test_solved_weights_are_the_same_on_all_ranks_and_better_than_rounded_ones() -> None:
    first, second = values(2, calibrate_each, split, Chain, [{"solve": True, "steps": 0}])
    assert same(first[0]["numbers"], second[0]["numbers"])
    assert sum(kept for _, kept, _ in first[0]["units"]) >= 4


@pytest.mark.parametrize("shares", [uneven, on_the_first], ids=["uneven", "a rank without data"])
def test_each_sample_counts_alike_wherever_it_lies(shares: Shares) -> None:
    [alone] = values(1, calibrate, split, Chain, {"steps": 3})
    found = values(3, calibrate, shares, Chain, {"steps": 3})
    for each in found:
        assert same(each["numbers"], found[0]["numbers"])
        assert difference(each["numbers"], alone["numbers"]) <= 1e-5
    without = shares is on_the_first
    assert found[0]["notes"] == (("Rank 1, 2 of 3 had no calibration data.",) if without else ())


def test_a_rank_that_dies_stops_the_others_and_any_number_of_ranks_goes_on(tmp_path: Path) -> None:
    keys = {"schedule": "stage", "steps": 4}
    wanted = values(2, calibrate, split, Chain, keys)[0]
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        first, second = on_ranks(2, calibrate, split, Chain, keys, str(folder), "1 10")
        assert second.status == -signal.SIGKILL and first.status == 0
        assert first.error.startswith("RankError: Rank 1 has ended.") and "resume=True" in first.error
        assert first.at - float((tmp_path / "died").read_text()) < 60
        assert sorted(path.name for path in folder.glob("*")) == [
            "checkpoint.json", "checkpoint.lock", *(f"part-{number:05d}.safetensors" for number in range(3))
        ]  # fmt: skip
    found = values(2, calibrate, split, Chain, keys, str(one))
    assert all(same(each["numbers"], wanted["numbers"]) for each in found)
    found = values(1, calibrate, split, Chain, keys, str(other))
    assert difference(found[0]["numbers"], wanted["numbers"]) <= 1e-5


def with_nan(batches: list[Tensor], rank: int, size: int) -> list[Tensor]:
    return [batch * (torch.nan if rank == 1 else 1) for batch in split(batches, rank, size)]


def differing(rank: int) -> object:
    config = RepAPQConfig(steps=rank + 1)
    return quantize_model(network(), split(data(), rank, 2), config).notes


def alone_on_the_first(rank: int) -> object:
    if rank:
        return None
    with ranks.alone():
        return calibrate(rank, split, Chain, {"steps": 1})["notes"]


def test_what_stops_one_rank_is_told_by_the_others() -> None:
    first, second = on_ranks(2, calibrate, with_nan, Chain, {})
    assert second.error.startswith("CalibrationError: The input of 'stem.conv' is not finite")
    assert first.error.startswith("RankError: Rank 1 stopped: CalibrationError: The input of 'stem.conv' is not finite")
    for each in on_ranks(2, differing):
        assert "RankError: Rank 1 was given another work than rank 0: config.steps was 1 and is 2" in each.error
    first, second = on_ranks(2, calibrate, nothing, Chain, {})
    for each in (first, second):
        assert each.error.startswith("CalibrationError: The calibration data holds no batch")


def nothing(batches: list[Tensor], rank: int, size: int) -> list[Tensor]:
    return []


def test_one_rank_may_work_alone() -> None:
    assert values(2, alone_on_the_first) == [(), None]


def test_with_one_process_nothing_is_copied() -> None:
    value, tensors = object(), [torch.ones(2)]
    assert ranks.world() == (0, 1)
    assert ranks.gather(value) == [value] and ranks.first(lambda: value) is value
    assert ranks.sum_(tensors)[0] is tensors[0] and ranks.greatest(tensors)[0] is tensors[0]
    with ranks.together():
        assert ranks.collect(lambda: value) == [value] and ranks.most(3) == 3


def levelled(rank: int) -> dict[str, Tensor]:
    kinds = (torch.float32, torch.float16, torch.int16, torch.bool, torch.complex64)
    tensors = {str(kind): (torch.arange(4) + rank).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(float(rank)), "empty": torch.zeros(0), "sparse": torch.eye(2).to_sparse()}
    ranks.level(tensors)
    return {name: tensor.to_dense() for name, tensor in tensors.items()}


def test_tensors_of_any_kind_become_those_of_the_first_rank() -> None:
    first, second = values(2, levelled)
    assert same(first, second) and first["torch.float32"].tolist() == [0, 1, 2, 3]
