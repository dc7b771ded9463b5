"""Runs candidates in processes of their own: built side by side, timed one by one."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from .builder import Job, run_candidate


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one candidate.

    Parameters
    ----------
    position : int
        Its place among the jobs.
    seconds : tuple of float
        Seconds per run; empty when it failed.
    reason : str
        Why it failed.
    """

    position: int
    seconds: tuple[float, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class _Candidate:
    position: int
    process: BaseProcess
    connection: Connection
    limit: float

    def answer(self) -> tuple[str, Any]:
        """Return the next message: ``built``, ``timed`` or ``failed``, and its value."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return "failed", f"its process died ({how})"
        return kind, value

    def failed(self, reason: str) -> Outcome:
        self.process.kill()
        return Outcome(position=self.position, reason=reason)


class Bench:
    """Measures candidates on this machine.

    Parameters
    ----------
    workers : int
        Builds at a time.
    build_timeout_s, run_timeout_s : float
        A candidate that takes longer is killed and lost.
    """

    def __init__(self, *, workers: int, build_timeout_s: float, run_timeout_s: float) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["hone.tuning.builder", "hone.tuning.whole_model"])
        forkserver.ensure_running()  # it imports TVM while the caller does
        self._workers = workers
        self._build_timeout_s = build_timeout_s
        self._run_timeout_s = run_timeout_s

    @property
    def context(self) -> ForkServerContext:
        """Where warm processes come from."""
        return self._context

    def measure(self, jobs: Sequence[Job], deadline: float) -> Iterator[Outcome]:
        """Yield the outcome of each candidate as soon as it is known.

        Parameters
        ----------
        jobs : sequence of Job
            The candidates.
        deadline : float
            Monotonic time at which the rest is given up and has no outcome.
        """
        candidates: list[_Candidate] = []
        try:
            built: list[_Candidate] = []
            for candidate, failure in self._build(jobs, deadline, candidates):
                if failure:
                    yield candidate.failed(failure)
                else:
                    built.append(candidate)
            for candidate in built:
                patience = min(self._run_timeout_s, deadline - time.monotonic())
                if patience <= 0:
                    return
                outcome = self._time(candidate, patience)
                if outcome is None:
                    if time.monotonic() >= deadline:
                        return
                    outcome = candidate.failed(f"ran longer than {self._run_timeout_s:g} s")
                yield outcome
        finally:
            for candidate in candidates:
                candidate.process.kill()
                candidate.process.join()
                candidate.connection.close()

    def _start(self, position: int, job: Job) -> _Candidate:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=run_candidate, args=(theirs, job), daemon=True)
        process.start()
        theirs.close()
        limit = time.monotonic() + self._build_timeout_s
        return _Candidate(position, process, ours, limit)

    def _build(
        self, jobs: Sequence[Job], deadline: float, started: list[_Candidate]
    ) -> Iterator[tuple[_Candidate, str]]:
        """Yield every candidate once it is built (no reason) or lost (its reason)."""
        waiting = list(enumerate(jobs))[::-1]
        building: list[_Candidate] = []
        while waiting or building:
            while waiting and len(building) < self._workers:
                building.append(self._start(*waiting.pop()))
                started.append(building[-1])
            now = time.monotonic()
            if now >= deadline:
                return
            patience = min([deadline, *(candidate.limit for candidate in building)]) - now
            ready = wait([candidate.connection for candidate in building], max(patience, 0.0))
            now = time.monotonic()
            still: list[_Candidate] = []
            for candidate in building:
                if candidate.connection in ready:
                    kind, value = candidate.answer()
                    yield candidate, "" if kind == "built" else str(value)
                elif now >= candidate.limit:
                    yield candidate, f"built longer than {self._build_timeout_s:g} s"
                else:
                    still.append(candidate)
            building = still

    def _time(self, candidate: _Candidate, patience: float) -> Outcome | None:
        """Let a built candidate run; None when it did not answer in time."""
        with suppress(ConnectionError):  # it died since; reading its answer says how
            candidate.connection.send("go")
        if not candidate.connection.poll(patience):
            return None
        kind, value = candidate.answer()
        if kind == "timed":
            return Outcome(position=candidate.position, seconds=value)
        return candidate.failed(str(value))
