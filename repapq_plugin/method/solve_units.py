"""Solves the weights of a stage's units, one after the other, each behind what is solved already (see `solve`)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from repapq_plugin.core import ranks
from repapq_plugin.method.learners import Learner, restore, snapshot
from repapq_plugin.method.optimise import Loss, evaluate
from repapq_plugin.method.partition import Unit
from repapq_plugin.method.replay import answering, outputs_of
from repapq_plugin.method.schedules import Activation, Role, StageRun, UnitSubject
from repapq_plugin.method.shares import Share
from repapq_plugin.method.sites import WeightSite
from repapq_plugin.method.solve import MAX_INPUTS, Moments, ProductInputs, Seen, solve_layer
from repapq_plugin.method.unit_result import UnitResult


def solvable(sites: Mapping[str, WeightSite]) -> dict[str, WeightSite]:
    """Return those layers, by module path, whose weights can be solved for.

    The others keep what they have: those with a scale along another axis than the outputs (transposed convolutions),
    those that share their weight or bias, and those whose problem is too large.
    """
    owners = Counter(id(p) for site in sites.values() for p in site.layer.parameters(recurse=False))

    def fits(site: WeightSite) -> bool:
        layer, weight = site.layer, site.layer.weight
        if not isinstance(weight, nn.Parameter) or site.quantizer.ch_axis not in (0, None):
            return False
        alone = all(owners[id(p)] == 1 for p in layer.parameters(recurse=False))
        return alone and "Transpose" not in type(layer).__name__ and weight[0].numel() <= MAX_INPUTS

    return {name: site for name, site in sites.items() if fits(site)}


class StageSolver:
    """Solves the units of one stage.

    Args:
        run: The stage of the quantized network.
        teacher: Modules of the float network, by module path.
        calls: How often one forward pass calls a module.
        learners: Those of the stage, by module path.
        batches: Indices of cached batches to solve for, and of those that judge.
        share: Of which this rank has a part.
    """

    def __init__(
        self,
        run: StageRun,
        teacher: Mapping[str, nn.Module],
        calls: Callable[[str], int],
        learners: Mapping[str, Learner],
        batches: tuple[Sequence[int], Sequence[int]],
        share: Share,
    ) -> None:
        self._run, self._teacher, self._calls, self._learners = run, teacher, calls, learners
        self._training, self._held_out = batches
        self._share = share

    @torch.no_grad()
    def solve(self, sites: Mapping[str, WeightSite], loss: Loss) -> list[UnitResult]:
        """Solve the units, in call order; return what became of each.

        Args:
            sites: Layers that can be solved, by module path.
            loss: The reconstruction loss that judges each unit.
        """
        stage, results = self._run.stage, list[UnitResult]()
        for position, unit in enumerate(stage.units):
            started = time.perf_counter()
            finished = [done.name for done in stage.units[:position]]
            subject = UnitSubject(self._run, self._learners, unit, self._calls(unit.name), finished, False)
            self._share.prepare(subject, self._held_out)
            before, _ = evaluate(subject, loss, self._held_out, self._share)
            start = snapshot(self._learners_of(unit))
            for name in unit.layers:
                if name in sites:
                    self._solve_layer(sites[name], subject, unit, finished)
            after, _ = evaluate(subject, loss, self._held_out, self._share)
            kept, note = after < before, ""
            if not kept:
                restore(self._learners_of(unit), start)
                note, after = f"solved weights: held-out loss went from {before:.4g} to {after:.4g}", before
            if position + 1 < len(stage.units):
                ranks.agreed(partial(self._keep_outputs, unit, subject))
            seconds = time.perf_counter() - started
            results.append(UnitResult(unit.name, stage.name, before, after, kept, seconds, note))
        return results

    def _keep_outputs(self, unit: Unit, subject: UnitSubject) -> None:
        for batch in filter(self._share.has, sorted({*self._training, *self._held_out})):
            self._run.cache.put(Activation(Role.STUDENT, unit.name), batch, subject.unit_outputs(batch))

    def _learners_of(self, unit: Unit) -> dict[str, Learner]:
        return {name: learner for name, learner in self._learners.items() if name in unit.layers}

    def _solve_layer(self, site: WeightSite, subject: UnitSubject, unit: Unit, finished: Collection[str]) -> None:
        teacher = self._teacher[site.name]

        def pairs(batch: int) -> list[tuple[Seen, Seen]]:
            read = _collected(ProductInputs(site.layer), lambda: subject.unit_outputs(batch))
            wanted = _collected(ProductInputs(teacher), lambda: self._teacher_unit(unit, finished, batch))
            return list(zip(read, wanted, strict=True))

        own = [batch for batch in self._training if self._share.has(batch)]
        moments = Moments.over_ranks(ranks.agreed(lambda: Moments.of(pair for batch in own for pair in pairs(batch))))
        if moments is not None:
            solve_layer(site.layer, teacher, site.quantizer, moments)
            ranks.level(dict(site.layer.named_parameters(recurse=False)))

    def _teacher_unit(self, unit: Unit, finished: Collection[str], batch: int) -> list[Tensor]:
        cache, stage = self._run.cache, self._run.stage.name
        stored = {name: cache.get(Activation(Role.TEACHER, name), batch) for name in finished}
        inputs = cache.get(Activation(Role.TEACHER_READS, stage), batch)
        with answering(self._teacher, stored):
            return outputs_of(
                self._teacher[unit.name],
                self._calls(unit.name),
                lambda: [self._teacher[stage](x) for x in inputs],
            )


def _collected(watch: ProductInputs, run: Callable[[], object]) -> list[Seen]:
    with watch:
        run()
    return watch.found
