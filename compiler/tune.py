"""Tunes the kernels of a lowered module under a time budget, and writes what it finds at once.

The search runs in a child process of its own session (`tune_worker.py`); this side owns the clock,
SIGINT, the log and the progress. Whatever happens to the child, what it measured is kept: a child
that dies or falls silent is replaced, and the kernel it worked on is quarantined.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from json import loads
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.analysis import estimate_tir_flops

from hone.targets.features import missing
from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target

from . import journal
from . import progress as progress_module
from .database import Database, kernels, seconds_of, workload_module
from .errors import HoneError, InterruptError, OutOfTimeError, UsageError
from .tune_order import estimate_s

GRACE_S = 0.5
"""How long after the deadline the child is stopped, whatever it does: it times nothing any more,
but it may be on its way out. Far below the 5 s or 10% that a session may overrun its budget."""

WATCHDOG_S = 45.0
"""A child silent for longer hangs: it speaks after every candidate, and each has a time limit."""

BUILD_TIMEOUT_S = (3.0, 15.0)
"""Least and most that one candidate's build may take; a tenth of the budget between them. Most
take 0.1 to 2 s, and the few that unroll everything would otherwise eat a short session."""

RUN_TIMEOUT_S = 10.0

TICK_S = 0.25
"""How often the progress moves while nothing happens."""

LAST_BREATH_S = 2.0
"""How long a child that hung up may take to end (a crash writes its traceback first)."""

START_ATTEMPTS = 2
"""Children that may die before their first kernel; then it is not a kernel's fault."""


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
    """

    name: str
    calls: int
    untuned_ms: float | None
    before_ms: float | None
    after_ms: float | None
    trials: int
    failed: int


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
    """

    trials: int
    records: int
    kernels: tuple[TunedKernel, ...]
    elapsed_s: float
    first_record_s: float | None
    quarantined: tuple[Quarantined, ...]
    exhausted: bool


@dataclass
class _Task:
    """A kernel while the session lasts."""

    name: str
    calls: int
    workload: list[Any]
    module: str
    untuned_module: str
    estimate_s: float
    before_s: float | None
    best_s: float | None
    untuned_s: float | None = None
    trials: int = 0
    failed: int = 0
    failure: str = ""

    @property
    def key(self) -> str:
        return str(self.workload[0])


@dataclass
class _Session:
    """The state of one call of `tune`."""

    tasks: list[_Task]
    database: Database
    target: Target
    threads: int
    seed: int
    started: float
    budget_s: float
    watchdog_s: float
    log: Callable[[str], None]
    quarantined: dict[int, str] = field(default_factory=dict)
    records: int = 0
    first_record_s: float | None = None
    exhausted: bool = False
    current: int | None = None

    @property
    def deadline(self) -> float:
        return self.started + self.budget_s

    @property
    def last_call(self) -> float:
        """When the child is stopped whatever it does."""
        return self.deadline + GRACE_S

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def restart(self) -> None:
        """Forget what the last child was doing."""
        self.current = None

    def quarantine(self, position: int, reason: str) -> None:
        self.quarantined[position] = reason
        self.log(f"quarantined {self.tasks[position].name}: {reason}")

    def take(self, message: dict[str, Any]) -> None:
        """Write down one message of the child."""
        kind = message["kind"]
        if kind == "done":
            self.exhausted = bool(message["exhausted"])
            self.current = None
            return
        position = int(message["task"])
        task = self.tasks[position]
        if kind == "turn":
            self.current = position
        elif kind == "record":
            self.database.add_record(task.workload, message["record"])
            seconds = seconds_of(message["record"])
            task.trials += 1
            self.records += 1
            task.best_s = min(seconds or math.inf, task.best_s or math.inf)
            if self.first_record_s is None:
                self.first_record_s = self.elapsed_s()
        elif kind == "failed":
            task.trials += 1
            task.failed += 1
            task.failure = str(message["reason"])
        elif kind == "untuned":
            seconds = message["seconds"]
            self.database.add_task(task.key, name=task.name, untuned_s=seconds)
            if seconds is not None:
                task.untuned_s = min(seconds, task.untuned_s or math.inf)
            else:
                self.log(f"{task.name}: could not be run untuned: {message['reason']}")
        elif kind == "exhausted" and message["reason"]:
            self.log(f"{task.name}: only its template was searched: {message['reason']}")
        elif kind == "quarantine":
            self.quarantine(position, message["reason"])

    def detail(self) -> str:
        """Say where the session stands, in a few words."""
        known = [
            task.calls * min(task.best_s or math.inf, task.untuned_s or math.inf)
            for task in self.tasks
            if task.best_s is not None or task.untuned_s is not None
        ]
        trials = sum(task.trials for task in self.tasks)
        left = max(0.0, self.deadline - time.monotonic())
        text = f"{trials} trials, {len(known)} of {len(self.tasks)} kernels"
        if known:
            text += f", best so far {sum(known) * 1e3:.3g} ms"
        text += f", {left:.0f} s left"
        if self.current is not None:
            text += f", {self.tasks[self.current].name}"
        return text

    def request(self, folder: str) -> dict[str, Any]:
        """Return what a new child is told."""
        return {
            "target": self.target.llvm(self.threads),
            "machine": asdict(Machine.of(self.target, self.threads)),
            "seed": self.seed,
            "deadline": self.deadline,
            "batch": _batch(self.budget_s, len(self.tasks)),
            "folder": folder,
            "build_timeout_s": min(max(self.budget_s / 10, BUILD_TIMEOUT_S[0]), BUILD_TIMEOUT_S[1]),
            "run_timeout_s": RUN_TIMEOUT_S,
            "tasks": [
                {
                    "name": task.name,
                    "module": task.module,
                    "untuned": task.untuned_module,
                    "calls": task.calls,
                    "estimate_s": task.estimate_s,
                    "records": self.database.records(task.key),
                    "quarantined": position in self.quarantined,
                }
                for position, task in enumerate(self.tasks)
            ],
        }


def _batch(budget_s: float, tasks: int) -> int:
    """Return candidates per turn: fewer when many kernels share little time (4 to 16)."""
    return max(4, min(16, round(budget_s / max(tasks, 1))))


def _calls(module: tvm.IRModule) -> dict[str, int]:
    """Count how often the Relax functions of a module call each TIR function."""
    counts: dict[str, int] = {}

    def visit(expression: relax.Expr) -> None:
        if isinstance(expression, relax.Call) and expression.args:
            callee = expression.args[0]
            if isinstance(callee, tvm.ir.GlobalVar):
                counts[callee.name_hint] = counts.get(callee.name_hint, 0) + 1

    for func in module.functions.values():
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func, visit)
    return counts


def _moved_bytes(workload: tvm.IRModule) -> float:
    total = 0
    for info in ms.arg_info.ArgInfo.from_entry_func(workload):
        elements = math.prod(int(extent) for extent in info.shape)
        total += elements * tvm.runtime.DataType(str(info.dtype)).itemsize
    return float(total)


def _extract(
    module: tvm.IRModule,
    database: Database,
    untuned: Callable[[tvm.IRModule], tvm.IRModule],
    names: Collection[str] | None,
) -> list[_Task]:
    functions = kernels(module)
    if names is not None:
        unknown = sorted(set(names) - set(functions))
        if unknown:
            raise UsageError(
                f"there is no kernel {', '.join(map(repr, unknown))} to tune.",
                hint=f"the module has {', '.join(functions) or 'none'}.",
            )
        functions = {name: func for name, func in functions.items() if name in names}
    calls = _calls(module)
    found: dict[str, _Task] = {}
    for name, func in functions.items():
        workload = workload_module(func)
        filed = ms.database.Workload(workload).as_json()
        filed = [str(filed[0]), str(filed[1])]
        if filed[0] in found:
            found[filed[0]].calls += calls.get(name, 1)
            continue
        records = database.records(filed[0])
        before_s = seconds_of(records[0]) if records else None
        found[filed[0]] = _Task(
            name=name,
            calls=calls.get(name, 1),
            workload=filed,
            module=tvm.ir.save_json(workload),
            untuned_module=tvm.ir.save_json(untuned(workload)),
            estimate_s=estimate_s(estimate_tir_flops(workload), _moved_bytes(workload)),
            before_s=before_s,
            best_s=before_s,
        )
    return list(found.values())


class _Child:
    """The search process and the pipe to it."""

    def __init__(self, session: _Session, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        self._errors = folder / "search.log"
        environment = {
            **os.environ,
            "TVM_NUM_THREADS": str(session.threads),
            # One thread of numpy keeps the fork server single-threaded.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "TMPDIR": str(folder),
        }
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c"),
                    "from hone.tune_worker import main; main()",
                    str(theirs.fileno()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        theirs.close()
        self.link = Connection(ours.detach())
        with suppress(ConnectionError):  # a child that is dead already shows in `receive`
            self.link.send_bytes(journal.dumps(session.request(str(folder))))

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None when the child is gone."""
        try:
            message: dict[str, Any] = loads(self.link.recv_bytes())
        except (EOFError, ConnectionError):
            return None
        return message

    def acknowledge(self) -> None:
        """Tell the child that everything it said is on the disk."""
        with suppress(ConnectionError):
            self.link.send_bytes(b"{}")

    def kill(self, *, ended: bool) -> str:
        """End the child and everything it started; return how it had ended by itself.

        Parameters
        ----------
        ended : bool
            Whether it hung up: then the system is about to say how it ended.
        """
        if ended:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=LAST_BREATH_S)
        code = self._process.poll()
        # The session's group outlives its leader: forked candidates may still be at work.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if code is None:
            return "was stopped"
        return f"died by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def complaint(self) -> str:
        """Return the last line that the child wrote to its log."""
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "it wrote nothing"


@contextmanager
def _interrupts() -> Iterator[Connection | None]:
    """Turn SIGINT into something to wait for; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    ours, theirs = socket.socketpair()
    waiting = Connection(ours.detach())
    previous = signal.signal(signal.SIGINT, lambda _signal, _frame: theirs.send(b"\n"))
    try:
        yield waiting
    finally:
        signal.signal(signal.SIGINT, previous)
        waiting.close()
        theirs.close()


def _follow(
    session: _Session, child: _Child, interrupt: Connection | None, show: Callable[[], None]
) -> str:
    """Write down what a child says until it ends; return why: done, time, interrupt, hang, died."""
    heard = time.monotonic()
    sources: list[Connection] = [child.link] if interrupt is None else [child.link, interrupt]
    while True:
        show()
        ready = wait(sources, timeout=TICK_S)
        now = time.monotonic()
        if interrupt is not None and interrupt in ready:
            return "interrupt"
        if child.link in ready:
            heard = now
            message = child.receive()
            if message is None:
                return "died"
            session.take(message)
            if message["kind"] == "done":
                return "done"
            if message["kind"] == "batch":
                child.acknowledge()
        if now >= session.last_call:
            return "time"
        if now - heard > session.watchdog_s:
            return "hang"


def _search(
    session: _Session, folder: Path, interrupt: Connection | None, show: Callable[[], None]
) -> bool:
    """Run children until the search is over; return whether the user interrupted it."""
    false_starts = 0
    while True:
        session.restart()
        child = _Child(session, folder)
        reason = "failed"
        try:
            reason = _follow(session, child, interrupt, show)
        finally:
            how = child.kill(ended=reason == "died")
            # What the child had said before it was stopped is kept.
            while child.link.poll() and (message := child.receive()) is not None:
                session.take(message)
            child.link.close()
        if reason == "interrupt":
            return True
        if reason in ("done", "time") or time.monotonic() >= session.deadline:
            return False
        if reason == "hang":
            how = f"was silent for {session.watchdog_s:g} s"
        if session.current is None:
            false_starts += 1
            if false_starts == START_ATTEMPTS:
                raise HoneError(
                    f"the search {how} before it reached the first kernel: {child.complaint()}",
                    hint="this is a bug in hone; records found before are kept.",
                )
            continue
        session.quarantine(session.current, f"the search {how} while it worked on this kernel")


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
        If the session ends without a valid record (exit 11).
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
        tempfile.TemporaryDirectory(prefix="hone-tune-", ignore_cleanup_errors=True) as folder,
        _interrupts() as interrupt,
        progress.task("tuning", total=round(budget_s, 1)) as bar,
    ):
        for warning in database.warnings:
            progress.log(f"warning: {warning}")
        session = _Session(
            tasks=_extract(
                module, database, untuned or ScheduleModule(Machine.of(target, threads)), tasks
            ),
            database=database,
            target=target,
            threads=threads,
            seed=seed,
            started=started,
            budget_s=budget_s,
            watchdog_s=watchdog_s,
            log=progress.log,
        )

        def show() -> None:
            bar.update(round(min(session.elapsed_s(), budget_s), 1), session.detail())

        interrupted = False
        if session.tasks:
            interrupted = _search(session, Path(folder), interrupt, show)
        else:
            session.exhausted = True
    if interrupted:
        raise InterruptError(
            f"interrupted after {session.elapsed_s():.0f} s of tuning; the {session.records} "
            "records of this session are kept.",
            where=str(database.folder),
            hint="run the same command again: it goes on from there.",
        )
    complete = session.exhausted and any(task.best_s is not None for task in session.tasks)
    if session.tasks and session.records == 0 and not complete:
        raise _nothing_found(session)
    return _result(session)


def _nothing_found(session: _Session) -> OutOfTimeError:
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


def _result(session: _Session) -> TuneResult:
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
    )
