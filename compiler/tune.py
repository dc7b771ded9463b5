"""Tunes the kernels of a lowered module under a time budget, and writes what it finds at once.

The search runs in a child process of its own session: `tuning/worker.py` there,
`tuning/session.py` here. It proposes candidates (`tuning/kernel.py`) in an order
(`tuning/order.py`), and each is built and timed in a process of its own (`tuning/bench.py`,
`tuning/builder.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import tvm

from hone.targets.features import missing
from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target

from . import progress as progress_module
from .database import Database
from .errors import InterruptError, OutOfTimeError, UsageError
from .tuning.child import socket_folder
from .tuning.choices import LoweringResult
from .tuning.follow import interrupts, search
from .tuning.records import Verdict
from .tuning.session import Session
from .tuning.tasks import extract, untuned_model

WATCHDOG_S = 45.0
"""A child silent for longer hangs: it speaks after every candidate, and each has a time limit."""


@dataclass(frozen=True, kw_only=True)
class TunedKernel:
    """What a session did for one kernel.

    Parameters
    ----------
    name : str
        Its name in the lowered module; equal kernels are one, under the first one's name.
    calls : int
        How often the model calls it (and its equals).
    untuned_ms : float or None
        Milliseconds per call without a record; None when the time did not reach for it.
    before_ms, after_ms : float or None
        Its best record before and after the session.
    trials, failed : int
        Candidates tried in this session, and how many of them failed.
    model_ms : float or None
        Of all its calls in one run of the untuned model; None when that did not run.
    verdict : Verdict or None
        What became of its record inside the model; None when it was not tried there.
    """

    name: str
    calls: int
    untuned_ms: float | None
    before_ms: float | None
    after_ms: float | None
    trials: int
    failed: int
    model_ms: float | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A kernel that the session gave up.

    Parameters
    ----------
    kernel : str
        Its name.
    reason : str
        What happened.
    """

    kernel: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """The outcome of a tuning session.

    Parameters
    ----------
    trials, records : int
        Candidates tried, and valid records written.
    kernels : tuple of TunedKernel
        In the order of their names.
    elapsed_s : float
        Seconds from the call to the end, start-up included.
    first_record_s : float or None
        Seconds until the first record.
    quarantined : tuple of Quarantined
        Kernels given up; their records so far are kept.
    exhausted : bool
        Whether every search space was searched to its end before the time was over.
    model_speedup : float or None
        How many times faster the whole model is with the records that stay; None when none does,
        or that was not tried.
    lowering : LoweringResult or None
        What the choice between ways to lower layers brought, where that was searched.
    """

    trials: int
    records: int
    kernels: tuple[TunedKernel, ...]
    elapsed_s: float
    first_record_s: float | None
    quarantined: tuple[Quarantined, ...]
    exhausted: bool
    model_speedup: float | None = None
    lowering: LoweringResult | None = None


def tune(
    module: tvm.IRModule,
    target: Target,
    *,
    threads: int,
    budget_s: float,
    database: Database,
    progress: progress_module.Progress | None = None,
    seed: int = 0,
    tasks: Collection[str] | None = None,
    untuned: Callable[[tvm.IRModule], tvm.IRModule] | None = None,
    watchdog_s: float = WATCHDOG_S,
) -> TuneResult:
    """Search better schedules for the kernels of a module, for a given time.

    The last part of it is for the running model: a record that is better in isolation stays only
    if it is better there as well; the database remembers.

    Parameters
    ----------
    module : IRModule
        Lowered by ``hone.pipeline.lower``: fused TIR functions, not scheduled, and a Relax
        ``main`` that calls them.
    target : Target
        A processor whose code runs on this machine.
    threads : int
        Threads that each kernel is measured with.
    budget_s : float
        Seconds, start-up included. A session ends at most 10% or 5 s later, whichever is more.
    database : Database
        Of the same target and threads; every record is on the disk before the next batch starts.
        What it knows already is not measured again.
    progress : Progress, optional
        Shows trials, the best total so far and the time left.
    seed : int
        Of the search. Measured times decide too, so a session cannot be repeated exactly.
    tasks : collection of str, optional
        Names of the kernels to tune; all of them when not given.
    untuned : callable, optional
        Schedules a workload (one function ``main``) as it is without a record: its time is what a
        record has to beat, and its result what a candidate has to reproduce. The target's rule
        when not given.
    watchdog_s : float
        A search that is silent for longer is replaced.

    Returns
    -------
    TuneResult

    Raises
    ------
    UsageError
        If the target's code does not run here, another process writes the database, or there is
        no kernel of a given name (exit 2).
    OutOfTimeError
        If the database has no valid record for any kernel of the module at the end (exit 11).
    InterruptError
        If SIGINT arrives; everything measured is in the database (exit 130).
    """
    started = time.monotonic()
    progress = progress or progress_module.silent()
    if budget_s <= 0:
        raise UsageError(f"the tuning budget must be positive, not {budget_s:g} s.")
    lacking = missing(target.features, target.arch)
    if lacking:
        raise UsageError(
            f"target {target.name!r} cannot be tuned on this machine, which lacks "
            f"{', '.join(lacking)}: candidates are measured where they run.",
            hint="tune on the target itself and compile here with the database of that session.",
        )
    with (
        database.writing(),
        database.scratch() as folder,
        socket_folder() as sockets,
        interrupts() as interrupt,
        progress.task("tuning", total=round(budget_s, 1)) as bar,
    ):
        for warning in database.warnings:
            progress.log(f"warning: {warning}")
        rule = untuned or ScheduleModule(Machine.of(target, threads))
        session = Session(
            tasks=extract(module, database, rule, tasks, cache_bytes=threads * target.l2_bytes),
            database=database,
            target=target,
            threads=threads,
            seed=seed,
            started=started,
            budget_s=budget_s,
            watchdog_s=watchdog_s,
            log=progress.log,
            model=folder / "model.json",
        )

        def show() -> None:
            bar.update(round(min(session.elapsed_s(), budget_s), 1), session.detail())

        interrupted = False
        if session.tasks:
            session.model.write_text(
                tvm.ir.save_json(untuned_model(module, rule)), encoding="utf-8"
            )
            interrupted = search(session, folder, Path(sockets), interrupt, show)
        else:
            session.exhausted = True
    if interrupted:
        raise InterruptError(
            f"interrupted after {session.elapsed_s():.0f} s of tuning; the {session.records} "
            "records of this session are kept.",
            where=str(database.folder),
            hint="run the same command again: it goes on from there.",
        )
    if session.tasks and all(task.best_s is None for task in session.tasks):
        raise _nothing_found(session)
    return _result(session)


def _nothing_found(session: Session) -> OutOfTimeError:
    reasons = [
        f"{task.name}: all {task.failed} candidates failed, the last one because: {task.failure}"
        for task in session.tasks
        if task.failed
    ]
    reasons += [f"{session.tasks[i].name}: {reason}" for i, reason in session.quarantined.items()]
    trials = sum(task.trials for task in session.tasks)
    return OutOfTimeError(
        f"tuning ended after {session.elapsed_s():.0f} s without a valid record "
        f"({trials} candidates tried, budget {session.budget_s:g} s)."
        + "".join(f"\n  - {reason}" for reason in reasons),
        where=str(session.database.folder),
        hint="the untuned schedules stay; a longer budget helps where no candidate was tried.",
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _result(session: Session) -> TuneResult:
    return TuneResult(
        trials=sum(task.trials for task in session.tasks),
        records=session.records,
        kernels=tuple(
            TunedKernel(
                name=task.name,
                calls=task.calls,
                untuned_ms=_ms(task.untuned_s),
                before_ms=_ms(task.before_s),
                after_ms=_ms(task.best_s),
                trials=task.trials,
                failed=task.failed,
                model_ms=_ms(task.model_s),
                verdict=task.verdict,
            )
            for task in session.tasks
        ),
        elapsed_s=session.elapsed_s(),
        first_record_s=session.first_record_s,
        quarantined=tuple(
            Quarantined(kernel=session.tasks[position].name, reason=reason)
            for position, reason in session.quarantined.items()
        ),
        exhausted=session.exhausted,
        model_speedup=session.speedup,
    )
