"""The search: a child process that proposes candidates, has them timed and says what it found.

It owns no file, and no clock but its deadline: every result goes up a pipe at once, and the parent
writes it down. It can be killed at any moment. `tune.py` starts `main`.

TVM's own loop (``tune_tasks``) can neither be stopped between batches nor told what to do next;
its parts, the design space, the evolutionary search and the cost model, are driven from here.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule import _ffi_api

from . import journal
from .tune_bench import Bench
from .tune_builder import Job, die_with_parent
from .tune_order import Order

POPULATION = 48
FRESH = 24
GENERATIONS = 3
"""Traces that the evolutionary search holds, how many of them are sampled anew each time, and how
often it breeds them. Each trace costs 10 ms on two cores: with TVM's 512, 50 and 4, proposing a
batch of a small convolution takes half a minute, building and timing it two seconds."""

WARM_MODEL = 24
"""Measured candidates from which on the cost model is believed (TVM: 100)."""

SEEDS = 64
"""Best records of a kernel that a resumed search starts from."""

FOREVER = 1 << 30
"""Trials per kernel: the clock ends the search, not a count."""


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
        _ffi_api.TuneContext, module, target, space, strategy, "main", _cores(), seed, _mute
    )
    _ffi_api.TuneContextInitialize(context)
    return context


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _mute(_level: int, _file: str, _line: int, _text: str) -> None:
    """Log nothing: TVM writes 30 lines per batch."""


def _trace_key(record: list[Any]) -> str:
    return hashlib.sha256(journal.dumps(record[0])).hexdigest()


class Kernel:
    """One kernel under search.

    Parameters
    ----------
    task : dict
        Its part of the request: ``name``, ``module``, ``untuned``, ``records``.
    target : dict
        What is tuned for, as TVM's target dictionary.
    reference : Path
        Where its right results are kept.
    """

    def __init__(self, task: dict[str, Any], target: dict[str, Any], reference: Path) -> None:
        self.name = str(task["name"])
        self.module = tvm.ir.load_json(task["module"])
        self.untuned = str(task["untuned"])
        self.target = tvm.target.Target(target)
        self._target_json = json.dumps(target)
        self.reference: Path | None = reference
        self.best_s: float | None = None
        self.arguments = tuple(
            (str(info.dtype), tuple(int(extent) for extent in info.shape))
            for info in ms.arg_info.ArgInfo.from_entry_func(self.module)
        )
        self._records: list[Any] = task["records"]
        self._known = {_trace_key(record): tuple(record[1]) for record in self._records}
        self._random: ms.TuneContext | None = None
        self._context: ms.TuneContext | None = None

    def job(self, module: str, *, save_reference: bool = False) -> Job:
        """Return the measurement of one scheduled form of this kernel."""
        return Job(
            module=module,
            target=self._target_json,
            arguments=self.arguments,
            best_s=self.best_s,
            reference=None if self.reference is None else str(self.reference),
            save_reference=save_reference,
        )

    def start(
        self, database: ms.database.Database, model: ms.CostModel, *, batch: int, seed: int
    ) -> None:
        """Make the search space, and teach the cost model what the database knows."""
        self._database = database
        self._model = model
        self._workload = database.commit_workload(self.module)
        seeds = [
            ms.database.TuningRecord.from_json(record, self._workload)
            for record in self._records[:SEEDS]
        ]
        for known in seeds:
            database.commit_tuning_record(known)
        evolution = ms.search_strategy.EvolutionarySearch(
            population_size=POPULATION, init_min_unmeasured=FRESH, genetic_num_iters=GENERATIONS
        )
        self._context = make_context(self.module, self.target, evolution, seed=seed)
        spaces = self._context.generate_design_space()
        self._context.pre_tuning(FOREVER, batch, spaces, database, model)
        if seeds:
            self._model.update(
                self._context,
                [known.as_measure_candidate() for known in seeds],
                [ms.runner.RunnerResult(list(known.run_secs), None) for known in seeds],
            )
        else:
            # Nothing is known that could be bred: the first batch is drawn at random, at once.
            self._random = make_context(
                self.module, self.target, ms.search_strategy.ReplayTrace(), seed=seed
            )
            self._random.pre_tuning(batch, batch, spaces, database, model)

    @property
    def started(self) -> bool:
        """Whether the search space exists."""
        return self._context is not None

    def propose(self) -> list[ms.MeasureCandidate]:
        """Return the next candidates; none when the space is exhausted."""
        if self._random is not None:
            candidates = list(self._random.generate_measure_candidates() or ())
            self._random = None
            if candidates:
                return candidates
        return list(self._context.generate_measure_candidates() or ())

    def known(self, candidate: ms.MeasureCandidate) -> tuple[float, ...]:
        """Return what an earlier session measured for a candidate; empty when it did not."""
        return self._known.get(_trace_key(self._record(candidate, (1.0,)).as_json()), ())

    def record(self, candidate: ms.MeasureCandidate, seconds: tuple[float, ...]) -> list[Any]:
        """Remember a measured candidate, and return its record as JSON."""
        record = self._record(candidate, seconds)
        self._database.commit_tuning_record(record)
        value: list[Any] = record.as_json()
        self._known[_trace_key(value)] = seconds
        return value

    def _record(
        self, candidate: ms.MeasureCandidate, seconds: tuple[float, ...]
    ) -> ms.database.TuningRecord:
        return ms.database.TuningRecord(
            candidate.sch.trace, self._workload, list(seconds), self.target, candidate.args_info
        )

    def learn(
        self, candidates: list[ms.MeasureCandidate], seconds: list[tuple[float, ...]]
    ) -> None:
        """Tell the search and the cost model how the candidates did."""
        results = [
            ms.runner.RunnerResult(list(times), None)
            if times
            else ms.runner.RunnerResult(None, "failed")
            for times in seconds
        ]
        self._context.notify_runner_results(candidates, results)
        self._model.update(self._context, candidates, results)


class Search:
    """The whole search, over all kernels of the request.

    Parameters
    ----------
    link : Connection
        To the parent: every message is one JSON object.
    request : dict
        What `tune.py` sends.
    bench : Bench
        Measures.
    """

    def __init__(self, link: Connection, request: dict[str, Any], bench: Bench) -> None:
        self._link = link
        self._bench = bench
        self._deadline = float(request["deadline"])
        self._batch = int(request["batch"])
        self._seed = int(request["seed"])
        folder = Path(request["folder"])
        self._kernels = [
            Kernel(task, request["target"], folder / f"{position}.npz")
            for position, task in enumerate(request["tasks"])
        ]
        self._order = Order(
            [task["estimate_s"] for task in request["tasks"]],
            [task["calls"] for task in request["tasks"]],
        )
        for position, task in enumerate(request["tasks"]):
            if task["quarantined"]:
                self._order.finish(position)
        self._database = ms.database.MemoryDatabase()
        self._model = ms.CostModel.create(
            "xgb", num_tuning_cores=_cores(), num_warmup_samples=WARM_MODEL
        )

    def run(self) -> None:
        """Search until every space is exhausted or the deadline has passed."""
        while (position := self._order.next()) is not None:
            self._say("turn", task=position)
            try:
                finished = not self._turn(position)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                # What TVM's search refuses about one kernel does not concern the others.
                lines = str(error).strip().splitlines() or [type(error).__name__]
                self._say("quarantine", task=position, reason=lines[-1].strip())
                self._order.finish(position)
                continue
            if finished:
                self._say("done", exhausted=False)
                return
        self._say("done", exhausted=True)

    def _turn(self, position: int) -> bool:
        """Do one batch of a kernel; return False when the time is over."""
        kernel = self._kernels[position]
        if not kernel.started:
            if not self._measure_untuned(position):
                return False
            kernel.start(
                self._database,
                self._model,
                batch=self._batch,
                seed=(self._seed * 1009 + position) % (2**31 - 2) + 1,
            )
        candidates = kernel.propose()
        if not candidates:
            self._say("exhausted", task=position)
            self._order.finish(position)
            return True
        seconds = [kernel.known(candidate) for candidate in candidates]
        progress = False
        unknown = [i for i, times in enumerate(seconds) if not times]
        jobs = [kernel.job(tvm.ir.save_json(candidates[i].sch.mod)) for i in unknown]
        outcomes = 0
        for outcome in self._bench.measure(jobs, self._deadline):
            outcomes += 1
            i = unknown[outcome.position]
            if not outcome.seconds:
                self._say("failed", task=position, reason=outcome.reason)
                continue
            seconds[i] = outcome.seconds
            mean = float(np.mean(outcome.seconds))
            progress |= self._order.timed(position, mean)
            kernel.best_s = min(mean, kernel.best_s or mean)
            record = kernel.record(candidates[i], outcome.seconds)
            self._say("record", task=position, record=record, seconds=mean)
        if outcomes < len(jobs):
            return False
        kernel.learn(candidates, seconds)
        self._order.turned(position, progress=progress)
        self._say("batch", task=position)
        self._link.recv_bytes()  # the parent has written everything down
        return True

    def _measure_untuned(self, position: int) -> bool:
        kernel = self._kernels[position]
        job = kernel.job(kernel.untuned, save_reference=True)
        outcomes = list(self._bench.measure([job], self._deadline))
        if not outcomes:
            return False
        outcome = outcomes[0]
        if not outcome.seconds:
            kernel.reference = None
            self._say("untuned", task=position, seconds=None, reason=outcome.reason)
            return True
        kernel.best_s = float(np.mean(outcome.seconds))
        self._order.timed(position, kernel.best_s)
        self._say("untuned", task=position, seconds=kernel.best_s, reason="")
        return True

    def _say(self, kind: str, **values: Any) -> None:
        self._link.send_bytes(journal.dumps({"kind": kind, **values}))


def main() -> None:
    """Run the search for the parent whose pipes are given by number as arguments."""
    die_with_parent()
    faulthandler.enable()
    link = Connection(int(sys.argv[1]))
    request = json.loads(link.recv_bytes())
    bench = Bench(
        workers=_cores(),
        build_timeout_s=float(request["build_timeout_s"]),
        run_timeout_s=float(request["run_timeout_s"]),
    )
    np.random.seed(int(request["seed"]))
    try:
        Search(link, request, bench).run()
    except (EOFError, ConnectionError):
        os._exit(1)  # the parent is gone
