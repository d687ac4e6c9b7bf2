"""The one job: its phases in order, what each leaves behind, and nothing left behind outside."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.backend import PHASES, OwnBackend, Placing
from repapq_plugin.conditioning.equalize import Equalized
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.running import Batch, call_model, seeded
from repapq_plugin.errors import CalibrationError, HostError
from repapq_plugin.job import Job, Merged, Progress, State, counted, merge_for_inference
from repapq_plugin.quantizers.layers import QuantizedLayer
from repapq_plugin.reparam import MergedBlock
from repapq_plugin.result import Calibrated, CalibrationResult
from tests.support.comparing import equal_numbers, hooks_of, numbers
from tests.support.networks import Chain, Pyramid, TwoBranchBlock, batches, settle
from tests.support.placed import after


def config(**keys: object) -> RepAPQConfig:
    return RepAPQConfig.from_preset("w4a4", **{"steps": 3, **keys})


class Spy(OwnBackend):
    """Writes down what a job asks of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def check(self, model: nn.Module, data: Sequence[Batch], settings: RepAPQConfig) -> None:
        self.asked.append("check")

    def join(self, teacher: nn.Module, data: Sequence[Batch]) -> Sequence[Batch]:
        self.asked.append("join")
        assert not torch.is_grad_enabled()
        return data

    def place(self, task: Placing) -> None:
        self.asked.append("place")
        super().place(task)

    def attach_affine(self) -> None:
        self.asked.append("attach_affine")
        super().attach_affine()

    def fold(self, *args: object) -> None:
        self.asked.append("fold")
        super().fold(*args)  # type: ignore[arg-type]

    def deliver(self, calibrated: Calibrated, data: Sequence[Batch]) -> CalibrationResult:
        self.asked.append("deliver")
        return super().deliver(calibrated, data)


class Watched(Job[CalibrationResult]):
    """Writes down its phases, and which were done when each began."""

    def __init__(self, *args: object, **keys: object) -> None:
        super().__init__(*args, **keys)  # type: ignore[arg-type]
        self.ran: dict[str, list[str]] = {}

    def __getattribute__(self, name: str) -> object:
        value = super().__getattribute__(name)
        if name not in PHASES:
            return value

        def phase(state: State) -> None:
            self.ran[name] = list(state.done)
            value(state)

        return phase


def test_phases_run_in_their_order_and_each_is_noted_when_done() -> None:
    backend = Spy()
    job = Watched(backend, config())
    job.run(settle(Chain()), batches())
    assert tuple(job.ran) == PHASES
    assert [tuple(done) for done in job.ran.values()] == [PHASES[:index] for index in range(len(PHASES))]
    assert backend.asked == ["check", "join", "place", "attach_affine", "fold", "deliver"]


@pytest.mark.parametrize(
    ("keys", "missing"), [({"affine": False}, "attach_affine"), ({"steps": 0}, "attach_affine")], ids=["plain", "ptq"]
)
def test_affine_layers_are_attached_only_to_learn(keys: dict[str, object], missing: str) -> None:
    backend = Spy()
    result = Job(backend, config(**keys)).run(settle(Chain()), batches())
    assert missing not in backend.asked
    assert bool(result.units) == bool(result.config.steps)


class Short(Spy):
    """A host that takes a network as it is."""

    phases = ("plan", "place", "find_ranges", "fold")


def test_a_backend_with_fewer_phases_gets_just_these() -> None:
    backend, model = Short(), settle(Chain())
    job = Watched(backend, config())
    result = job.run(model, batches())
    assert tuple(job.ran) == Short.phases
    assert result.units == () and result.merges == () and result.plan.folded == ()
    assert "stages.0.0.large.0" in result.layers
    assert any(isinstance(module, TwoBranchBlock) for module in result.model.modules())


def test_a_backend_refuses_before_any_work_is_done() -> None:
    class Refusing(Spy):
        def check(self, model: nn.Module, data: Sequence[Batch], settings: RepAPQConfig) -> None:
            super().check(model, data, settings)
            raise HostError("not here")

    backend, ran = Refusing(), []
    with pytest.raises(HostError, match="not here"):
        Job(backend, config(), lambda model, batch: ran.append(batch)).run(settle(Chain()), batches())
    assert backend.asked == ["check"] and ran == []


def test_no_batch_is_an_error_before_the_backend_is_asked() -> None:
    backend = Spy()
    with pytest.raises(CalibrationError, match="holds no batch; give at least one"):
        Job(backend, config()).run(settle(Chain()), iter([]))
    assert backend.asked == []


def stepwise(model: nn.Module, data: list[Tensor], settings: RepAPQConfig) -> dict[str, tuple[OwnBackend, State]]:
    """Backend and state after each phase, each from a job of its own."""
    found = {}
    for phase in PHASES:
        job, state = after(phase, model, data, settings)
        found[phase] = job.backend, state
    return found


def test_each_phase_adds_to_the_state_what_it_says() -> None:
    model, data = settle(Chain()), batches()
    x = data[0]
    states = stepwise(model, data, config())
    wanted = model(x)
    for index, phase in enumerate(PHASES):
        backend, state = states[phase]
        assert tuple(state.done) == PHASES[: index + 1]
        assert torch.allclose(state.teacher(x), wanted, atol=1e-4), "the float network stays the same function"
        assert bool(state.trace.layers) == bool(state.plans) == (index >= PHASES.index("plan"))
        assert hasattr(backend, "student") == bool(state.stages) == (index >= PHASES.index("place"))
        assert bool(state.units) == (index >= PHASES.index("learn"))
    merged = states["merge"][1].merged
    blocks = [module for module in merged.network.modules() if isinstance(module, TwoBranchBlock)]
    assert blocks and all(isinstance(block, MergedBlock) for block in blocks)
    assert [record.name for record in merged.records if record.merged] == [
        name for name, module in model.named_modules() if isinstance(module, TwoBranchBlock)
    ]
    before, conditioned = states["plan"][1].teacher, states["condition"][1].teacher
    changed = [
        name for name, value in before.state_dict().items() if not torch.equal(value, conditioned.state_dict()[name])
    ]
    assert changed, "this network's channels are of unlike size"
    backend, state = states["place"]
    assert not any(parameter.requires_grad for parameter in state.teacher.parameters())
    assert [unit for stage in state.stages for unit in stage.units]
    scales = [layer.input_fake_quant.scale.item() for layer in backend.layers.values()]
    assert scales == [1.0] * len(scales)
    backend, state = states["find_ranges"]
    assert all(layer.input_fake_quant.scale.item() != 1.0 for layer in backend.layers.values())
    assert all(layer.affine is None for layer in backend.layers.values())
    backend, state = states["learn"]
    assert all(layer.affine is not None for layer in backend.layers.values())
    assert [unit.name for unit in state.units] == [unit.name for stage in state.stages for unit in stage.units]
    backend, state = states["fold"]
    assert all(layer.affine is None for layer in backend.layers.values())


@pytest.mark.parametrize("keys", [{"equalize": False}, {"fold_constants": False}, {}])
def test_conditioning_does_what_the_configuration_asks(
    keys: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("fold_constant_channels", "equalize_channels"):
        monkeypatch.setattr(f"repapq_plugin.job.{name}", lambda *_, name=name: called.append(name) or Equalized())
    after("condition", settle(Chain()), batches(1), config(**keys))
    wanted = ["fold_constant_channels", "equalize_channels"]
    if "equalize" in keys:
        wanted.remove("equalize_channels")
    if "fold_constants" in keys:
        wanted.remove("fold_constant_channels")
    assert called == wanted


@pytest.mark.parametrize("fails_at", [0, 3, 12])
def test_seeds_and_the_model_are_as_before_also_after_an_error(fails_at: int) -> None:
    model, data, ran = settle(Chain()), batches(), []
    before, state = numbers(model), torch.random.get_rng_state()

    def forward(network: nn.Module, batch: Batch) -> object:
        torch.rand(3)
        if len(ran) == fails_at:
            raise KeyError("stop")
        ran.append(batch)
        return call_model(network, batch)

    with pytest.raises(KeyError, match="stop"):
        Job(OwnBackend(), config(), forward).run(model, data)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert equal_numbers(numbers(model), before)
    assert hooks_of(model) == []


def test_seeded_draws_by_its_seed_alone_and_leaves_no_trace() -> None:
    state = torch.random.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        with seeded(seed):
            drawn.append(torch.rand(4))
        torch.testing.assert_close(torch.random.get_rng_state(), state, rtol=0, atol=0)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with pytest.raises(RuntimeError, match="stop"), seeded(3):
        torch.rand(4)
        raise RuntimeError("stop")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("schedule", "network_steps"),
    [pytest.param("stage", 0, marks=pytest.mark.slow), ("unit", 2), pytest.param("network", 0, marks=pytest.mark.slow)],
)
def test_progress_goes_from_nothing_to_all_by_ones(schedule: str, network_steps: int) -> None:
    seen: list[Progress] = []
    settings = config(schedule=schedule, network_steps=network_steps)
    Job(OwnBackend(), settings, report=seen.append).run(settle(Chain()), batches())
    phases = list(dict.fromkeys(progress.phase for progress in seen))
    assert phases == ["estimate", "ranges", "calibration"]
    for phase in phases:
        done = [progress.done for progress in seen if progress.phase == phase]
        totals = {progress.total for progress in seen if progress.phase == phase}
        assert done == list(range(len(done))) and totals == {len(done) - 1}


def test_without_steps_only_ranges_are_reported() -> None:
    seen: list[Progress] = []
    Job(OwnBackend(), config(steps=0), report=seen.append).run(settle(Chain()), batches(3))
    assert seen == [Progress("ranges", done, 3) for done in range(4)]


def test_progress_tells_what_learns_and_its_loss() -> None:
    seen: list[Progress] = []
    Job(OwnBackend(), config(), report=seen.append).run(settle(Chain()), batches())
    learning = [progress for progress in seen if progress.phase == "calibration" and progress.done]
    assert {progress.part for progress in learning} <= {name for name, _ in Chain().named_modules()}
    assert all(progress.loss is not None and progress.loss >= 0 for progress in learning)
    assert learning[-1].detail == f"{learning[-1].part}, loss {learning[-1].loss:.3g}"


def test_a_counter_reports_its_start_and_needs_nobody_to_listen() -> None:
    seen: list[Progress] = []
    advance = counted("ranges", 2, seen.append)
    assert seen == [Progress("ranges", 0, 2)]
    advance()
    assert seen[1:] == [Progress("ranges", 1, 2)]
    counted("ranges", 2, None)()


@pytest.mark.parametrize("network", [Chain, Pyramid])
def test_merging_for_inference_works_on_a_copy(network: type[nn.Module]) -> None:
    model, data = settle(network()).train(), batches(1)
    before = numbers(model)
    merged = merge_for_inference(model, lambda each: each(data[0]))
    assert isinstance(merged, Merged) and isinstance(merged, tuple)
    assert equal_numbers(numbers(model), before) and model.training
    assert not merged.network.training
    assert any(isinstance(module, MergedBlock) for module in merged.network.modules())
    assert merged.notes == ()


class BehindAnAddition(nn.Module):
    """Its first norm can be folded; the others follow no layer."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        for norm in self.norms:
            x = norm(x + 1).relu()
        return x


def test_norms_that_stay_stand_in_the_notes_of_the_result() -> None:
    reason = "its input is not the output of one layer that nothing else reads"
    result = Job(OwnBackend(), config(steps=0)).run(settle(BehindAnAddition(2)), batches(2))
    assert result.plan.folded == (("conv", "bn"),)
    assert result.notes == (f"Norms that were not folded and stay float (2): norms.0, norms.1: {reason}.",)
    data = batches(1)[0]
    merged = merge_for_inference(settle(BehindAnAddition(7)), lambda each: each(data))
    assert len(merged.notes) == 1 and merged.notes[0].endswith(f"norms.4, and 2 more: {reason}.")


def test_batches_may_come_from_a_generator_and_are_read_once() -> None:
    given = batches(2)
    result = Job(OwnBackend(), config()).run(settle(Chain()), (batch for batch in given))
    assert all(unit.kept or unit.note for unit in result.units)


def test_the_record_says_what_came_about() -> None:
    result = Job(OwnBackend(), config(keep_float=("fc",))).run(settle(Chain()), batches())
    assert result.config == config(keep_float=("fc",))
    assert result.float_layers == {"fc": "kept float by the configuration"}
    quantized = [name for name, module in result.model.named_modules() if isinstance(module, QuantizedLayer)]
    assert list(result.layers) == quantized
    assert result.seconds > 0
