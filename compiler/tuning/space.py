"""The space of hone's own templates: every choice that a template makes is one dimension of it.

A template asks the machine at each of its points (`hone.targets.schedule.machine.Machine.pick`);
the untuned schedule takes the first option everywhere. Here the points are found by listening, the
options next to the best schedule known are tried one by one, and then changed together. Making a
candidate takes some milliseconds, so they are made when they are asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import tvm
import tvm_ffi
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms

from hone.targets.schedule.cpu import trace
from hone.targets.schedule.machine import Machine

CACHE_FACTORS = (8.0, 0.125)
"""Steps that gave other schedules of the reference networks' kernels."""

PARENTS = 4
"""Schedules that the next ones are made from."""

POOL = 4
"""Candidates that are made for each one that is taken, where a cost model can tell them apart."""

ATTEMPTS = 12
"""Changes that are tried for each candidate wanted; when all were made before, the space is done:
a small one is, and a large one has little left near its best schedules."""

GUESSES = 0.25
"""Share of a batch that the cost model has no say in."""

Decided = Mapping[str, str]
Predict = Callable[[Sequence[ms.MeasureCandidate]], Sequence[float] | None]
"""Scores of candidates, larger is faster; None where no cost model is trained."""


def machines(base: Machine) -> dict[str, Machine]:
    """Return machines like the given one by name, itself first.

    For what a template computes from the machine without a point of its own: vectors of half the
    length, fewer accumulators, more tasks, other caches.

    Parameters
    ----------
    base : Machine
        The real one.
    """
    narrow = replace(base, lanes=max(base.lanes // 2, 1))
    found = {
        "real": base,
        "narrow": narrow,
        "few sums": replace(base, accumulators=max(base.accumulators // 2, 4)),
        "more tasks": replace(base, threads=2 * base.threads),
    }
    for factor in CACHE_FACTORS:
        size = "large" if factor > 1 else "small"
        found[f"{size} L2"] = replace(base, l2_bytes=max(int(base.l2_bytes * factor), 1))
        found[f"{size} L1"] = replace(base, l1_bytes=max(int(base.l1_bytes * factor), 1))
    return found


def _serial(schedule: s_tir.Schedule, workload: tvm.IRModule) -> s_tir.Schedule:
    """Return a schedule without its parallel loops: waking the other threads takes 2 us."""
    steps = schedule.trace.insts
    kept = [step for step in steps if step.kind.name != "Parallel"]
    if len(kept) == len(steps):
        return schedule
    serial = s_tir.Schedule(workload)
    s_tir.schedule.Trace(kept, schedule.trace.decisions).apply_to_schedule(
        serial, remove_postproc=False
    )
    return serial


@dataclass(frozen=True, kw_only=True)
class Made:
    """One schedule of the space.

    Parameters
    ----------
    decided : mapping of str to str
        The options that are not the first ones, by point.
    candidate : MeasureCandidate
        What they give.
    """

    decided: Decided
    candidate: ms.MeasureCandidate


class TemplateSpace:
    """The schedules that a kernel's template gives, the untuned one first.

    Parameters
    ----------
    workload : IRModule
        One unscheduled function ``main``.
    base : Machine
        The real machine.
    seed : int
        Of the changes.

    Attributes
    ----------
    points : dict of str to list of str
        Names of the options that were seen at each point so far.
    """

    def __init__(self, workload: tvm.IRModule, base: Machine, *, seed: int) -> None:
        self._workload = workload
        self._machines = machines(base)
        self._arguments = ms.arg_info.ArgInfo.from_entry_func(workload)
        self._random = random.Random(seed)
        self._seen: set[int] = set()
        self._tried: set[frozenset[tuple[str, str]]] = set()
        self._times: list[tuple[float, Decided]] = []
        self.points: dict[str, list[str]] = {
            "machine": list(self._machines),
            "threads": ["parallel", "serial"],
        }
        self._neighbours = self._around_first()

    def make(self, decided: Decided) -> Made | None:
        """Return the schedule of some decisions; None when it was made before, or none applies."""
        key = frozenset(decided.items())
        if key in self._tried:
            return None
        self._tried.add(key)
        asked: dict[str, tuple[str, ...]] = {}
        own = {k: v for k, v in decided.items() if k not in ("machine", "threads")}
        machine = replace(
            self._machines[decided.get("machine", "real")],
            decided=tuple(sorted(own.items())),
            asked=asked,
        )
        schedule, _, _ = trace(self._workload["main"], machine)
        for point, options in asked.items():
            known = self.points.setdefault(point, [])
            known += [option for option in options if option not in known]
        if schedule is None:
            return None
        if decided.get("threads") == "serial":
            schedule = _serial(schedule, self._workload)
        program = tvm_ffi.structural_hash(schedule.mod)
        if program in self._seen:
            return None
        self._seen.add(program)
        return Made(decided=dict(decided), candidate=ms.MeasureCandidate(schedule, self._arguments))

    @property
    def best_s(self) -> float | None:
        """Seconds of the fastest schedule noted."""
        return self._times[0][0] if self._times else None

    def note(self, decided: Decided, seconds: float) -> None:
        """Remember how long a schedule takes; the fastest ones become parents."""
        self._times.append((seconds, decided))
        self._times.sort(key=lambda row: row[0])

    def _around_first(self) -> Iterator[Made]:
        """Yield the untuned schedule, and those that differ from it at one point."""
        first = self.make({})
        if first is None:
            return
        yield first
        # Options next to the first one come first: a batch ranges over all points.
        listed = {
            point: options[1:] for point, options in self.points.items() if point != "machine"
        }
        listed["machine"] = self.points["machine"][1:]
        for rank in range(max(map(len, listed.values()))):
            for point, options in listed.items():
                if rank < len(options) and (made := self.make({point: options[rank]})):
                    yield made

    def _greedy(self) -> Iterator[Decided]:
        """Yield the best options of single points together, more and more of them."""
        base = next((seconds for seconds, decided in self._times if not decided), None)
        if base is None:
            return
        gains: dict[str, str] = {}
        for seconds, decided in self._times:
            if len(decided) == 1 and seconds < base:
                ((point, option),) = decided.items()
                gains.setdefault(point, option)
        points = list(gains)
        for count in range(2, len(points) + 1):
            yield {point: gains[point] for point in points[:count]}

    def _change(self) -> Decided:
        """Return one of the best schedules with one to three of its decisions changed."""
        parents = [decided for _, decided in self._times[:PARENTS]] or [{}]
        changed = dict(self._random.choice(parents))
        for _ in range(self._random.choice((1, 1, 2, 3))):
            point = self._random.choice(list(self.points))
            options = self.points[point]
            option = self._random.choice(options)
            if option == options[0]:
                changed.pop(point, None)
            else:
                changed[point] = option
        return changed

    def _changed(self, count: int) -> Iterator[Made]:
        for decided in self._greedy():
            if made := self.make(decided):
                yield made
        for _ in range(count * ATTEMPTS):
            if made := self.make(self._change()):
                yield made

    def next(self, count: int, predict: Predict) -> list[Made]:
        """Return new schedules; none when there are no more near the best ones.

        Parameters
        ----------
        count : int
            How many are wanted.
        predict : callable
            The cost model.
        """
        found = list(islice(self._neighbours, count))
        if found:
            return found
        pool: list[Made] = []
        for made in self._changed(count):
            pool.append(made)
            if len(pool) == POOL * count:
                break
        scores = predict([made.candidate for made in pool]) if len(pool) > count else None
        if scores is None:
            taken = pool[:count]
        else:
            ranked = sorted(range(len(pool)), key=lambda i: -scores[i])
            guessed = ranked[: count - int(GUESSES * count)]
            rest = sorted(set(range(len(pool))) - set(guessed))
            taken = [pool[i] for i in (*guessed, *rest[: count - len(guessed)])]
        kept = {id(made) for made in taken}
        for made in pool:
            if id(made) not in kept:  # it may be proposed again
                self._tried.discard(frozenset(made.decided.items()))
                self._seen.discard(tvm_ffi.structural_hash(made.candidate.sch.mod))
        return taken
