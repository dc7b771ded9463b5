"""Runs candidates in processes of their own: built side by side, timed in turns.

The clock of a shared machine jumps between minutes, so a time says little beside one of another
minute. All candidates of a batch are warmed up, then give one sample after the other in rounds,
and the untuned kernel with them: what counts is the ratio to it in the same round.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from .builder import Job, run_candidate

REFERENCE = -1
"""Position of the untuned kernel's outcome."""

ROUNDS = 5
"""Samples of each candidate."""

FINAL_ROUNDS = 10
"""Further samples of those that are nearly the best."""

NEARLY = 1.1
"""A candidate this many times slower than the best one gets no further samples."""

HOPELESS = 3.0
"""A candidate this many times slower than the untuned kernel is timed by its warm run."""

RECORDED = 3
"""Samples that become the record: those next to the median."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one candidate.

    Parameters
    ----------
    position : int
        Its place among the jobs; `REFERENCE` for the untuned kernel.
    seconds : tuple of float
        Seconds per run; empty when it failed.
    ratios : tuple of float
        The same over those of the untuned kernel in the same round; empty when it failed, or the
        untuned kernel did.
    reason : str
        Why it failed.
    """

    position: int
    seconds: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    reason: str = ""


@dataclass(eq=False)
class _Candidate:
    position: int
    process: BaseProcess
    connection: Connection
    limit: float
    samples: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def answer(self) -> tuple[str, Any]:
        """Return the next message: ``built``, ``warm``, ``sample`` or ``failed``, and its value."""
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

    def outcome(self) -> Outcome:
        middle = (len(self.samples) - RECORDED) // 2
        take = slice(middle, middle + RECORDED) if middle > 0 else slice(None)
        return Outcome(
            position=self.position,
            seconds=tuple(sorted(self.samples)[take]),
            ratios=tuple(sorted(self.ratios)[take]),
        )

    @property
    def score(self) -> float:
        """What candidates are compared by."""
        return statistics.median(self.ratios or self.samples)


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

    def measure(
        self, jobs: Sequence[Job], deadline: float, *, reference: Job | None = None
    ) -> Iterator[Outcome]:
        """Yield the outcome of each candidate as soon as it is known.

        Parameters
        ----------
        jobs : sequence of Job
            The candidates.
        deadline : float
            Monotonic time at which the rest is given up and has no outcome.
        reference : Job, optional
            The untuned kernel; its outcome comes first, unless it fails to be built.
        """
        listed = [(REFERENCE, reference)] if reference is not None else []
        listed += enumerate(jobs)
        started: list[_Candidate] = []
        try:
            built: list[_Candidate] = []
            for candidate, failure in self._build(listed, deadline, started):
                if failure:
                    yield candidate.failed(failure)
                else:
                    built.append(candidate)
            # The untuned kernel leaves the right results for the others.
            built.sort(key=lambda candidate: candidate.position)
            warm: list[_Candidate] = []
            for candidate in built:
                problem = self._ask(candidate, deadline)
                if problem is None:
                    break
                if problem:
                    yield candidate.failed(problem)
                else:
                    warm.append(candidate)
            yield from self._compare(warm, deadline)
        finally:
            for candidate in started:
                candidate.process.kill()
                candidate.process.join()
                candidate.connection.close()

    def _compare(self, warm: list[_Candidate], deadline: float) -> Iterator[Outcome]:
        """Sample warm candidates in rounds."""
        untuned = next((c for c in warm if c.position == REFERENCE), None)
        base_s = math.inf if untuned is None else untuned.samples[0]
        racing: list[_Candidate] = []
        for candidate in warm:
            once_s = candidate.samples.pop()
            if once_s > HOPELESS * base_s:
                seconds, ratio = (once_s,), (once_s / base_s,)
                yield Outcome(position=candidate.position, seconds=seconds, ratios=ratio)
            else:
                racing.append(candidate)
        done: list[_Candidate] = []
        for number in range(ROUNDS + FINAL_ROUNDS):
            if number == ROUNDS:
                rivals = [c for c in racing if c is not untuned]
                best = min((c.score for c in rivals), default=0.0)
                done = [c for c in rivals if c.score > NEARLY * best]
                racing = [c for c in racing if c not in done]
            for candidate in list(racing):
                failure = self._ask(candidate, deadline)
                if failure is None:
                    enough = [c for c in (*racing, *done) if len(c.samples) >= ROUNDS]
                    yield from (c.outcome() for c in enough)
                    return
                if failure:
                    racing.remove(candidate)
                    yield candidate.failed(failure)
                    if candidate is untuned:
                        untuned = None
                elif untuned is not None:
                    candidate.ratios.append(candidate.samples[-1] / untuned.samples[-1])
        yield from (candidate.outcome() for candidate in (*racing, *done))

    def _ask(self, candidate: _Candidate, deadline: float) -> str | None:
        """Let a candidate run and keep its time.

        Returns
        -------
        str or None
            Why it failed, empty when it did not; None when the deadline has passed.
        """
        patience = min(self._run_timeout_s, deadline - time.monotonic())
        if patience <= 0:
            return None
        with suppress(ConnectionError):  # it died since; reading its answer says how
            candidate.connection.send("go")
        if not candidate.connection.poll(patience):
            late = time.monotonic() >= deadline
            return None if late else f"ran longer than {self._run_timeout_s:g} s"
        kind, value = candidate.answer()
        if kind == "failed":
            return str(value)
        candidate.samples.append(float(value))
        return ""

    def _start(self, position: int, job: Job) -> _Candidate:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=run_candidate, args=(theirs, job), daemon=True)
        process.start()
        theirs.close()
        limit = time.monotonic() + self._build_timeout_s
        return _Candidate(position, process, ours, limit)

    def _build(
        self, jobs: Sequence[tuple[int, Job]], deadline: float, started: list[_Candidate]
    ) -> Iterator[tuple[_Candidate, str]]:
        """Yield every candidate once it is built (no reason) or lost (its reason)."""
        waiting = list(jobs)[::-1]
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
