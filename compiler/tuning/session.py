"""One tuning session: what it is asked for, what a search says, and what becomes of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hone.database import Database
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target

from .records import Verdict, seconds_of
from .tasks import Task

GRACE_S = 0.5
"""How long after the deadline the child is stopped, whatever it does: it times nothing any more,
but it may be on its way out. Far below the 5 s or 10% that a session may overrun its budget."""

BUILD_TIMEOUT_S = (3.0, 15.0)
"""Least and most that one candidate's build may take; a tenth of the budget between them. Most
take 0.1 to 2 s, and the few that unroll everything would otherwise eat a short session."""

RUN_TIMEOUT_S = 10.0

CONFIRM_SHARE = 0.2
CONFIRM_MOST_S = 120.0
"""How much of the budget the trial inside the model may take: a share, and at most so long."""

LATE_SHARE = 0.1
LEAST_TRIAL_S = 2.0
"""A search that does not stop for the trial is replaced, when a share of the trial's time has
passed and enough is left: TVM's part of it cannot be interrupted, and may take many seconds."""


@dataclass
class Session:
    """The state of one call of `tune`.

    Parameters
    ----------
    tasks : list of Task
        Kernels; their numbers change.
    database : Database
        Open for writing.
    target : Target
        What is tuned for.
    threads : int
        Threads of each kernel.
    seed : int
        Of the search.
    started : float
        Monotonic time of the call.
    budget_s : float
        Seconds that the session may take.
    watchdog_s : float
        Seconds of silence after which a child is replaced.
    log : callable
        Says a line to the user.
    model : Path
        File with the JSON of the whole model as it is without records.
    quarantined : dict
        Position of a kernel to why it was given up.
    records : int
        Written so far.
    first_record_s : float or None
        Seconds until the first.
    exhausted : bool
        Whether the child searched every space to its end.
    current : int or None
        The kernel that the child works on.
    searched : bool
        Whether the search is over, and only the trial inside the model is left.
    speedup : float or None
        How many times faster the whole model is with the confirmed records; None when it was not
        tried, or none is confirmed.
    """

    tasks: list[Task]
    database: Database
    target: Target
    threads: int
    seed: int
    started: float
    budget_s: float
    watchdog_s: float
    log: Callable[[str], None]
    model: Path
    quarantined: dict[int, str] = field(default_factory=dict)
    records: int = 0
    first_record_s: float | None = None
    exhausted: bool = False
    current: int | None = None
    searched: bool = False
    speedup: float | None = None

    @property
    def trial_s(self) -> float:
        """Seconds that are kept for the trial inside the model."""
        return min(CONFIRM_SHARE * self.budget_s, CONFIRM_MOST_S)

    def is_late(self, now: float) -> bool:
        """Say whether the search still goes on in the trial's time."""
        return (
            not self.searched
            and now >= self.deadline - (1 - LATE_SHARE) * self.trial_s
            and now <= self.deadline - LEAST_TRIAL_S
        )

    @property
    def deadline(self) -> float:
        """Monotonic time at which nothing is timed any more."""
        return self.started + self.budget_s

    @property
    def last_call(self) -> float:
        """When the child is stopped whatever it does."""
        return self.deadline + GRACE_S

    def elapsed_s(self) -> float:
        """Return seconds since the call."""
        return time.monotonic() - self.started

    def restart(self) -> None:
        """Forget what the last child was doing."""
        self.current = None

    def quarantine(self, position: int, reason: str) -> None:
        """Give a kernel up."""
        self.quarantined[position] = reason
        self.log(f"quarantined {self.tasks[position].name}: {reason}")

    def take(self, message: dict[str, Any]) -> None:
        """Write down one message of the child."""
        kind = message["kind"]
        if kind == "done":
            self.exhausted = bool(message["exhausted"])
            self.current = None
            return
        if kind == "searched":
            self.searched = True
            self.current = None
            return
        if kind == "between":
            self.current = None  # what happens now is no kernel's fault
            return
        if kind == "say":
            if message["text"]:  # else it only says that it lives
                self.log(str(message["text"]))
            return
        if kind == "profile":
            for task, seconds in zip(self.tasks, message["seconds"], strict=True):
                task.model_s = seconds
            return
        if kind == "verdicts":
            self._judge(message)
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

    def _judge(self, message: dict[str, Any]) -> None:
        """Write down what became of the records inside the model."""
        self.speedup = message["speedup"]
        for trial in message["trials"]:
            task = self.tasks[int(trial["task"])]
            verdict = Verdict.CONFIRMED if trial["kept"] else Verdict.REJECTED
            self.database.add_verdict(
                task.key,
                name=task.name,
                record=trial["record"],
                verdict=verdict,
                model_s=trial["seconds"],
                model_untuned_s=trial["untuned_s"],
            )
            if task.verdict is not Verdict.CONFIRMED:
                task.verdict = verdict
        kept = sum(bool(trial["kept"]) for trial in message["trials"])
        kernels = len({trial["task"] for trial in message["trials"]})
        self.log(
            f"inside the model the records of {kept} of {kernels} kernels are faster"
            + (f": {self.speedup:.2f} times as fast as a whole" if self.speedup else "")
            + "; the others stay untuned"
        )

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

    def request(self, folder: Path) -> dict[str, Any]:
        """Return what a new child is told."""
        return {
            "target": self.target.llvm(self.threads),
            "machine": Machine.of(self.target, self.threads).facts(),
            "seed": self.seed,
            "deadline": self.deadline,
            "batch": batch_size(self.budget_s, len(self.tasks)),
            "folder": str(folder),
            "build_timeout_s": min(max(self.budget_s / 10, BUILD_TIMEOUT_S[0]), BUILD_TIMEOUT_S[1]),
            "run_timeout_s": RUN_TIMEOUT_S,
            "model": str(self.model),
            "confirm_s": self.trial_s,
            "searched": self.searched,
            "tasks": [
                {
                    "name": task.name,
                    "names": task.names,
                    "module": task.module,
                    "untuned": task.untuned_module,
                    "calls": task.calls,
                    "estimate_s": task.estimate_s,
                    "records": self.database.records(task.key),
                    "verdicts": self.database.verdicts(task.key),
                    "untuned_s": self.database.untuned_s(task.key),
                    "weights": task.weights,
                    "cold_bytes": task.cold_bytes,
                    "quarantined": position in self.quarantined,
                }
                for position, task in enumerate(self.tasks)
            ],
        }


def batch_size(budget_s: float, tasks: int) -> int:
    """Return candidates per turn, 4 to 16: fewer when many kernels share little time.

    Parameters
    ----------
    budget_s : float
        Seconds of the session.
    tasks : int
        Kernels.
    """
    return max(4, min(16, round(budget_s / max(tasks, 1))))
