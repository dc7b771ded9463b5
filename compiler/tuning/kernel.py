"""The search for one kernel's schedule: proposes candidates and learns from their times.

TVM's own loop (``tune_tasks``) can neither be stopped between batches nor told what to do next;
its parts, the design space, the evolutionary search and the cost model, are driven from here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule import _ffi_api

from hone.targets.schedule.machine import Machine

from .reason import reason_of
from .records import trace_key
from .replay import REFUSALS, ReplayError, parse
from .space import Made, TemplateSpace

POPULATION = 40
FRESH = 20
GENERATIONS = 2
"""Traces that the evolutionary search holds, how many of them are sampled anew each time, and how
often it breeds them. Each trace costs 10 ms on two cores: with TVM's 512, 50 and 4, proposing a
batch of a small convolution takes half a minute, building and timing it two seconds."""

SEEDS = 64
"""Best records of a kernel that a resumed search starts from."""

FOREVER = 1 << 30
"""Trials per kernel: the clock ends the search, not a count."""


def cores() -> int:
    """Return the processors that this process may use."""
    return len(os.sched_getaffinity(0))


def _mute(_level: int, _file: str, _line: int, _text: str) -> None:
    """Log nothing: TVM writes 30 lines per batch."""


def make_context(
    module: tvm.IRModule,
    target: tvm.target.Target,
    strategy: ms.SearchStrategy,
    *,
    seed: int,
) -> ms.TuneContext:
    """Return a tune context made without ``TuneContext.__init__``.

    That one imports ``tvm.s_tir.tensor_intrin``, half a minute of work, for intrinsics that only
    the rules of other targets use; the rules given here need none.

    Parameters
    ----------
    module : IRModule
        The workload.
    target : Target
        What is tuned for.
    strategy : SearchStrategy
        How the space is searched.
    seed : int
        Positive.

    Returns
    -------
    meta_schedule.TuneContext
    """
    space = ms.space_generator.PostOrderApply(
        sch_rules=ms.ScheduleRule.create("llvm"),
        postprocs=ms.Postproc.create("llvm"),
        mutator_probs=ms.Mutator.create("llvm"),
    )
    context = ms.TuneContext.__new__(ms.TuneContext)
    context.__init_handle_by_constructor__(
        _ffi_api.TuneContext, module, target, space, strategy, "main", cores(), seed, _mute
    )
    _ffi_api.TuneContextInitialize(context)
    return context


def _result(seconds: tuple[float, ...]) -> ms.runner.RunnerResult:
    if seconds:
        return ms.runner.RunnerResult(list(seconds), None)
    return ms.runner.RunnerResult(None, "failed")


def _times(record: ms.database.TuningRecord) -> tuple[float, ...]:
    return tuple(float(seconds) for seconds in record.run_secs)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Candidates to measure next.

    Parameters
    ----------
    candidates : list of MeasureCandidate
        Empty when the search space is exhausted.
    bred : bool
        Whether the evolutionary search made them, which has to hear how they did.
    made : tuple of Made
        The same candidates with their decisions, where a template made them.
    """

    candidates: list[ms.MeasureCandidate]
    bred: bool
    made: tuple[Made, ...] = ()


class KernelSearch:
    """The search space of one kernel, and what is known about it.

    The first candidates are those of hone's templates: the untuned schedule, those next to it, and
    what becomes of the best ones when their decisions are changed; the cost model says which of
    them to measure. When there are no more, TVM's general space is made; where nothing is known
    that could be bred, one batch is drawn from it at random, and the evolutionary search does the
    rest.

    Parameters
    ----------
    module : IRModule
        The workload.
    target : Target
        What is tuned for.
    machine : Machine
        For the templates.
    records : list
        JSON of what earlier sessions measured, best first.
    database : Database
        Where the evolutionary search looks for parents.
    model : CostModel
        Shared by all kernels.
    batch : int
        Candidates per proposal.
    seed : int
        Positive.

    Attributes
    ----------
    refusal : str
        Why only the templates are tried; empty as long as the general space is not refused.
    """

    def __init__(
        self,
        module: tvm.IRModule,
        target: tvm.target.Target,
        machine: Machine,
        *,
        records: list[Any],
        database: ms.database.Database,
        model: ms.CostModel,
        batch: int,
        seed: int,
    ) -> None:
        self.refusal = ""
        self._module = module
        self._target = target
        self._database = database
        self._model = model
        self._batch = batch
        self._seed = seed
        self._workload = database.commit_workload(module)
        self._known = {trace_key(record): tuple(record[1]) for record in records}
        self._parents = []
        for value in records[:SEEDS]:
            with suppress(ReplayError):  # a record that does not apply any more is no parent
                self._parents.append(parse(value, self._workload))
        for record in self._parents:
            database.commit_tuning_record(record)
        self._context: ms.TuneContext | None = None
        self._seen: set[int] = set()
        self._template = TemplateSpace(module, machine, seed=seed)
        self._plain: ms.TuneContext | None = None
        self._queue: Iterator[ms.MeasureCandidate] = iter(())
        self._teach([(record.as_measure_candidate(), _times(record)) for record in self._parents])

    def _new(self, candidates: Iterable[ms.MeasureCandidate]) -> Iterator[ms.MeasureCandidate]:
        """Yield what is new of some candidates: small spaces give the same one over and over."""
        for candidate in candidates:
            key = tvm_ffi.structural_hash(candidate.sch.mod)
            if key not in self._seen and not self.known(candidate):
                yield candidate
            self._seen.add(key)

    def propose(self) -> Proposal:
        """Return the next candidates; none when the space is exhausted."""
        made = self._from_template()
        if made:
            self._seen |= {tvm_ffi.structural_hash(m.candidate.sch.mod) for m in made}
            candidates = [m.candidate for m in made]
            return Proposal(candidates=candidates, bred=False, made=tuple(made))
        candidates = list(islice(self._queue, self._batch))
        if not candidates and self._context is None and not self.refusal:
            self._open()
            candidates = list(islice(self._queue, self._batch))
        if candidates:
            return Proposal(candidates=candidates, bred=False)
        if self._context is None:
            return Proposal(candidates=[], bred=False)
        bred = self._context.generate_measure_candidates()
        return Proposal(candidates=list(bred or ()), bred=True)

    def _from_template(self) -> list[Made]:
        """Return what a template gives that no session has measured yet."""
        while made := self._template.next(self._batch, self._predict):
            new = []
            for one in made:
                if seconds := self.known(one.candidate):
                    self._template.note(one.decided, fmean(seconds))
                else:
                    new.append(one)
            if new:
                return new
        return []

    def _predict(self, candidates: Sequence[ms.MeasureCandidate]) -> list[float] | None:
        """Return the cost model's scores, larger is faster."""
        scores: list[float] = self._model.predict(self._light, list(candidates)).tolist()
        return scores

    @property
    def _light(self) -> ms.TuneContext:
        """What the cost model wants to know of the kernel, without TVM's general space."""
        if self._plain is None:
            self._plain = make_context(
                self._module, self._target, ms.search_strategy.ReplayTrace(), seed=self._seed
            )
        return self._plain

    def _open(self) -> None:
        """Make TVM's general space, which takes seconds; queue a random draw from it."""
        evolution = ms.search_strategy.EvolutionarySearch(
            population_size=POPULATION, init_min_unmeasured=FRESH, genetic_num_iters=GENERATIONS
        )
        try:
            context = make_context(self._module, self._target, evolution, seed=self._seed)
            spaces = context.generate_design_space()
            context.pre_tuning(FOREVER, self._batch, spaces, self._database, self._model)
            if not self._parents:
                self._draw(spaces)
        except REFUSALS as error:
            # TVM's rules do not cope with every kernel; what its template offers was tried.
            self.refusal = reason_of(error)
            return
        self._context = context

    def _draw(self, spaces: list[s_tir.Schedule]) -> None:
        strategy = ms.search_strategy.ReplayTrace()
        context = make_context(self._module, self._target, strategy, seed=self._seed)
        context.pre_tuning(self._batch, self._batch, spaces, self._database, self._model)
        self._queue = self._new(context.generate_measure_candidates() or ())

    def known(self, candidate: ms.MeasureCandidate) -> tuple[float, ...]:
        """Return the seconds that were measured for a candidate before; empty when none were."""
        return self._known.get(trace_key(self._record(candidate, (1.0,)).as_json()), ())

    def record(self, candidate: ms.MeasureCandidate, seconds: tuple[float, ...]) -> list[Any]:
        """Remember a measured candidate.

        Parameters
        ----------
        candidate : MeasureCandidate
            One of a proposal.
        seconds : tuple of float
            What was measured.

        Returns
        -------
        list
            JSON of its record.
        """
        record = self._record(candidate, seconds)
        self._database.commit_tuning_record(record)
        value: list[Any] = record.as_json()
        self._known[trace_key(value)] = seconds
        return value

    def _record(
        self, candidate: ms.MeasureCandidate, seconds: tuple[float, ...]
    ) -> ms.database.TuningRecord:
        return ms.database.TuningRecord(
            candidate.sch.trace, self._workload, list(seconds), self._target, candidate.args_info
        )

    def learn(self, proposal: Proposal, seconds: list[tuple[float, ...]], new: list[int]) -> None:
        """Tell the search how all candidates did, and the cost model how the new ones did.

        Parameters
        ----------
        proposal : Proposal
            What was measured.
        seconds : list of tuple of float
            For each candidate; empty when it failed.
        new : list of int
            Positions of the candidates that had not been measured before.
        """
        if proposal.bred and self._context is not None:
            results = [_result(times) for times in seconds]
            self._context.notify_runner_results(proposal.candidates, results)
        for made, times in zip(proposal.made, seconds, strict=False):
            if times:
                self._template.note(made.decided, fmean(times))
        self._teach([(proposal.candidates[i], seconds[i]) for i in new])

    def _teach(self, lessons: list[tuple[ms.MeasureCandidate, tuple[float, ...]]]) -> None:
        if lessons:
            candidates = [candidate for candidate, _ in lessons]
            self._model.update(self._light, candidates, [_result(times) for _, times in lessons])
