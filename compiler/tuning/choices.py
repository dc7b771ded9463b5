"""A session over the ways to lower layers, as its parent sees it; `lowering.py` is its child."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import tvm

from hone.database import Database
from hone.errors import InterruptError
from hone.progress import Progress
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target

from .child import Child, socket_folder
from .follow import TICK_S, interrupts
from .session import GRACE_S


@dataclass(frozen=True, kw_only=True)
class LoweringResult:
    """What a session found.

    Parameters
    ----------
    choices, tried : int
        Alternatives to the model's own choices, and how many changes were timed in the model:
        some of them are of several choices at once.
    decided : dict of str to str
        Those that are used from now on, by point.
    speedup : float or None
        How many times faster they make the whole model; None where none does.
    exhausted : bool
        Whether every alternative was tried before the time was over.
    elapsed_s : float
        Seconds.
    failure : str
        Why the search ended early; empty when it did not.
    """

    choices: int
    tried: int
    decided: dict[str, str]
    speedup: float | None
    exhausted: bool
    elapsed_s: float
    failure: str = ""

    def followed_by(self, later: LoweringResult) -> LoweringResult:
        """Return what this session and one behind it did together."""
        return replace(
            later,
            tried=self.tried + later.tried,
            elapsed_s=self.elapsed_s + later.elapsed_s,
            speedup=self.speedup if later.speedup is None else later.speedup,
        )


def tune_lowerings(
    module: tvm.IRModule,
    target: Target,
    *,
    threads: int,
    budget_s: float,
    database: Database,
    compact: bool,
    progress: Progress,
) -> LoweringResult:
    """Search how to lower the layers of a model, for a given time.

    Parameters
    ----------
    module : IRModule
        Operators, as ``hone.pipeline.lower`` takes it.
    target : Target
        A processor whose code runs on this machine.
    threads : int
        Threads of one run.
    budget_s : float
        Seconds, start-up included.
    database : Database
        Where what is found is kept. What was tried before is not tried again.
    compact : bool
        As in ``hone.pipeline.lower``.
    progress : Progress
        Shows the trials.

    Raises
    ------
    InterruptError
        If SIGINT arrives; nothing of this search is kept.
    """
    started = time.monotonic()
    with (
        database.writing(),
        database.scratch() as folder,
        socket_folder() as sockets,
        interrupts() as interrupt,
        progress.task("lowering", total=round(budget_s, 1)) as bar,
    ):
        path = folder / "module.json"
        path.write_text(tvm.ir.save_json(module), encoding="utf-8")
        before = database.tried_lowerings()
        request = {
            "module": str(path),
            "target": target.llvm(threads),
            "machine": Machine.of(target, threads).facts(),
            "compact": compact,
            "deadline": started + budget_s,
            "decided": database.lowerings(),
            "tried": [[point, option] for point in before for option in sorted(before[point])],
        }
        child = Child(request, folder, Path(sockets), threads=threads, entry="hone.tuning.lowering")
        follower = _Follower(progress.log)
        ended = interrupted = False
        try:
            while not follower.done:
                bar.update(round(min(time.monotonic() - started, budget_s), 1), follower.detail())
                sources = [child.link] if interrupt is None else [child.link, interrupt]
                ready = wait(sources, timeout=TICK_S)
                if interrupt is not None and interrupt in ready:
                    interrupted = True
                    break
                if child.link in ready:
                    message = child.receive()
                    if message is None:
                        ended = True
                        break
                    follower.take(message)
                if time.monotonic() > started + budget_s + LAST_COMPARISON_S + GRACE_S:
                    break
        finally:
            how = child.kill(ended=ended)
            child.link.close()
        if interrupted:
            raise InterruptError(
                "interrupted while the lowering of layers was searched; the database is as it was.",
                where=str(database.folder),
                hint="run the same command again.",
            )
        if not follower.done:
            follower.failure = follower.failure or f"the search of lowerings {how}"
            progress.log(f"warning: {follower.failure}: {child.complaint()}")
        else:
            _keep(database, follower)
    return LoweringResult(
        choices=follower.choices,
        tried=sum(map(len, follower.tried.values())),
        decided=follower.decided,
        speedup=follower.speedup,
        exhausted=follower.exhausted,
        elapsed_s=time.monotonic() - started,
        failure=follower.failure,
    )


LAST_COMPARISON_S = 5.0
"""How long the child may compare whole models after its deadline."""


class _Follower:
    """What the child has said so far."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self.choices = 0
        self.tried: dict[str, list[str]] = {}
        self.decided: dict[str, str] = {}
        self.speedup: float | None = None
        self.exhausted = False
        self.done = False
        self.failure = ""

    def take(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "start":
            self.choices = int(message["choices"])
        elif kind == "trial":
            options = self.tried.setdefault(message["point"], [])
            if message["option"] not in options:
                options.append(message["option"])
            if message["kept"]:
                gain = message["default_s"] / message["seconds"]
                saved_us = 1e6 * (message["default_s"] - message["seconds"])
                self._log(
                    f"{message['point']}: {message['option']} is {gain:.3f} times as fast, "
                    f"{saved_us:.0f} us of a run"
                )
        elif kind == "failed":
            self.failure = str(message["reason"])
        elif kind == "done":
            self.done = True
            self.decided = dict(message["decided"])
            self.speedup = message["speedup"]
            self.exhausted = bool(message["exhausted"])
            if self.decided:
                text = f"{len(self.decided)} layers are lowered in another way"
                if self.speedup is not None:
                    text += f": {self.speedup:.3f} times as fast as a whole"
                self._log(text)

    def detail(self) -> str:
        """Say where the search stands."""
        tried = sum(map(len, self.tried.values()))
        return f"{tried} of {self.choices} ways to lower layers"


def _keep(database: Database, follower: _Follower) -> None:
    """Write down what was tried, and what stays."""
    before = database.lowerings()
    # What was decided before for points that this search did not come to stays: of other models
    # in the same database, of the batch, or for want of time.
    for point in follower.tried:
        option = follower.decided.get(point, "")
        if point in follower.tried or before.get(point, "") != option:
            database.add_lowering(point, option, tried=follower.tried.get(point, []))
