"""Searches how layers are lowered: how weights are packed, which Winograd transform, or none.

These choices change a kernel's weights, so no schedule can make them, and a kernel alone says
little: larger weights come from memory only inside the model. So versions of the model are run as
a package runs them, with a clock around each kernel. Choices that only pack weights in another way
are screened many at a time, one in each layer; what seems better there, and every choice between
forms of a layer, is tried alone against the best version so far, which it replaces when the kernels
that differ are faster. Equal layers are one choice.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx

from hone.pipeline import Stage, constant_bytes, graph_stages, lower_stages_of
from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import Machine

from . import journal
from .builder import die_with_parent, make_arguments
from .confirm import OutOfTime, Views
from .reason import reason_of
from .replay import REFUSALS
from .running import call_ratios, call_times, compare, differing, probe
from .versions import Kernels, Program, Version, versions

LEAST_SHARE = 0.004
"""Of a run: choices whose kernels take less together are left as they are."""

PACKING = "pack "
"""What the points begin with whose options leave the calls of a run as they are."""

PROMISING = 0.99
"""Ratio from which on a choice that was screened is tried alone: other layers changed beside it."""

NEAR = 0.98
"""A choice that lost by less is tried once more when others have been made since."""

JOINT = 0.9
"""A form of a layer that lost by less is tried once more with other options of its own points."""

JOINT_OPTIONS = 2
"""Of each of those points."""

END_SHARE = 0.1
END_MOST_S = 20.0
"""Of the time, for the comparison of whole models at the end: a share, and at most so long."""

OTHER = "other"
"""The version of the model with a choice changed, beside the best one so far."""

BEST = "best"

Change = tuple[tuple[str, str], ...]
"""Points and the options to take there, tried together."""


@relax.expr_functor.mutator
class _Renamed(relax.PyExprMutator):  # type: ignore[misc]
    """Calls functions by other names."""

    def __init__(self, variables: Mapping[str, tvm.ir.GlobalVar]) -> None:
        super().__init__()
        self._variables = variables

    def visit_global_var_(self, op: tvm.ir.GlobalVar) -> tvm.ir.GlobalVar:
        return self._variables.get(op.name_hint, op)


def canonical(module: tvm.IRModule) -> tvm.IRModule:
    """Return a module whose kernels are named after what they do.

    So versions of a model share the kernels in which they do not differ.

    Parameters
    ----------
    module : IRModule
        Every function scheduled.
    """
    builder = relax.BlockBuilder()
    variables: dict[str, tvm.ir.GlobalVar] = {}
    for variable, func in module.functions.items():
        if isinstance(func, tirx.PrimFunc):
            bare = func.without_attr("global_symbol")
            digest = tvm_ffi.structural_hash(bare) & (2**64 - 1)
            variables[variable.name_hint] = builder.add_func(bare, f"kernel_{digest:016x}")
    renamed = _Renamed(variables)
    for variable, func in module.functions.items():
        if isinstance(func, relax.Function):
            builder.add_func(renamed.visit_expr(func), variable.name_hint)
    return builder.get()


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A version of the model, ready to run.

    Parameters
    ----------
    version : Version
        The loaded model.
    points : dict of str to tuple of str
        The options of each choice, the model's own one first.
    """

    version: Version
    points: dict[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of a change.

    Parameters
    ----------
    change : tuple of (str, str)
        Points and options.
    kept : bool
        Whether it is part of the best version now.
    seconds, default_s : float or None
        Of the calls that differ, with and without it; None where it changes nothing that matters.
    screened : bool
        Whether it was timed beside changes of other layers only.
    """

    change: Change
    kept: bool = False
    seconds: float | None = None
    default_s: float | None = None
    screened: bool = False

    @property
    def ratio(self) -> float:
        """How many times as fast; 0 where that was not measured."""
        if self.seconds is None or self.default_s is None:
            return 0.0
        return self.default_s / self.seconds

    @property
    def gain_s(self) -> float:
        """Seconds saved in a run; 0 where that was not measured."""
        return 0.0 if not self.ratio else (self.default_s or 0.0) - (self.seconds or 0.0)


class LoweringSearch:
    """Coordinate descent over the choices of the lowering.

    Parameters
    ----------
    module : IRModule
        As imported or compressed: operators, not lowered.
    target : Target
        What to generate code for.
    machine : Machine
        Its numbers.
    compact : bool
        As in ``hone.pipeline.lower``.
    deadline : float
        Monotonic time.
    pin : bool
        Pin the threads of this process, which has no other business.
    """

    def __init__(
        self,
        module: tvm.IRModule,
        target: tvm.target.Target,
        machine: Machine,
        *,
        compact: bool,
        deadline: float,
        pin: bool = True,
    ) -> None:
        self._target = target
        self._machine = machine.holding(constant_bytes(module))
        self._compact = compact
        end_s = min(END_SHARE * (deadline - time.monotonic()), END_MOST_S)
        self._last_s, self._deadline = deadline, deadline - end_s
        self._kernels: dict[str, Kernels] = {}
        self._graph = self._run(graph_stages(), module)
        inputs = make_arguments(
            [
                (str(variable.ty.dtype), tuple(int(extent) for extent in variable.ty.shape))
                for variable in self._graph["main"].params
            ]
        )
        self.decided: dict[str, str] = {}
        self.trials: list[Trial] = []
        scheduled, points = self._scheduled({})
        self._versions = versions(scheduled, target, machine.threads, inputs)
        self.untuned = self.best = self._lowered(scheduled, points)
        self.untuned.version.run()
        if pin:
            self._versions.pin()  # its first run started the threads
        self._run_s = probe(self.untuned.version)
        times = call_times(self._versions, self.untuned.version, self._run_s)
        self._total_s = float(times.sum())
        self._call_s: dict[str, float] = {}
        for name, seconds in zip(self.untuned.version.calls, times, strict=True):
            self._call_s[name] = self._call_s.get(name, 0.0) + float(seconds)

    def _run(self, stages: tuple[Stage, ...], module: tvm.IRModule) -> tvm.IRModule:
        with self._target:
            for stage in stages:
                module = stage.run(module)
        return module

    def _scheduled(
        self, decided: Mapping[str, str]
    ) -> tuple[tvm.IRModule, dict[str, tuple[str, ...]]]:
        asked: dict[str, tuple[str, ...]] = {}
        machine = replace(self._machine, decided=tuple(sorted(decided.items())), asked=asked)
        stages = lower_stages_of(machine, compact=self._compact)
        lowered = self._run(stages, self._graph)
        return canonical(ScheduleModule(self._machine)(lowered)), asked

    def _load(self, program: Program) -> Version:
        functions = program.functions
        for name, func in functions.items():
            if name not in self._kernels:
                self._kernels[name] = self._versions.compile({name: func})
                if time.monotonic() >= self._deadline:
                    raise OutOfTime
        return self._versions.load(program, [self._kernels[name] for name in functions])

    def _lowered(self, scheduled: tvm.IRModule, points: dict[str, tuple[str, ...]]) -> Lowered:
        program = self._versions.program(scheduled)
        if program is None:
            raise ValueError("a way to lower a layer made a model that needs the virtual machine")
        return Lowered(version=self._load(program), points=points)

    def options(self) -> list[tuple[str, str]]:
        """Return the choices that there are now: forms of layers first, next best options first."""
        points = {**self.untuned.points, **self.best.points}
        ordered = sorted(points, key=lambda point: point.startswith(PACKING))
        return [
            (point, options[rank])
            for rank in range(1, max(map(len, points.values()), default=0))
            for point in ordered
            if rank < len(options := points[point])
        ]

    def screen(self, choices: list[tuple[str, str]]) -> list[Trial]:
        """Time packings of many layers at once, one option of each layer in a version.

        Parameters
        ----------
        choices : list of (str, str)
            Points that begin with `PACKING`, and options.

        Returns
        -------
        list of Trial
            None of them kept.

        Raises
        ------
        OutOfTime
            The deadline is near.
        """
        base = self.best.version
        calls = self._calls_of(dict(reversed(choices)))
        found = []
        batches: list[dict[str, str]] = []
        for point, option in choices:
            batch = next((b for b in batches if point not in b), None)
            if batch is None:
                batches.append(batch := {})
            batch[point] = option
        for batch in batches:
            self._check_time()
            scheduled, points = self._scheduled({**self.decided, **batch})
            other = self._lowered(scheduled, points).version
            same = len(other.calls) == len(base.calls)
            seconds = (
                call_ratios(self._versions, [base, other], self._run_s, self._deadline)
                if same
                else None
            )
            for point, option in batch.items():
                columns = calls.get(point, [])
                trial = Trial(change=((point, option),), screened=True)
                if seconds is not None and columns:
                    before, after = (float(s[columns].sum()) for s in seconds)
                    trial = replace(trial, seconds=after, default_s=before)
                found.append(trial)
            self._versions.keep([self.untuned.version, self.best.version])
        self.trials += found
        return found

    def _calls_of(self, options: Mapping[str, str]) -> dict[str, list[int]]:
        """Return the calls of the best version that an option at each point changes.

        Points are numbered from 1; the options of all points whose number has a certain bit are
        taken together, one model for each bit, and a call changes where its point's number says.
        """
        base = self.best.version.calls
        numbers = {point: number for number, point in enumerate(options, 1)}
        found = [0] * len(base)
        for bit in range(len(options).bit_length()):
            self._check_time()
            taken = {p: options[p] for p, number in numbers.items() if number >> bit & 1}
            program = self._versions.program(self._scheduled({**self.decided, **taken})[0])
            calls = [] if program is None or program.plan is None else program.plan.calls
            if len(calls) != len(base):
                return {}
            for position, call in enumerate(calls):
                found[position] |= (call.kernel != base[position]) << bit
        return {
            point: [i for i, other in enumerate(found) if other == number]
            for point, number in numbers.items()
        }

    def _check_time(self) -> None:
        if time.monotonic() >= self._deadline:
            raise OutOfTime

    def attempt(self, change: Change, *, known: bool = False) -> Trial:
        """Change some choices, and keep that when the kernels that it changes are faster.

        Parameters
        ----------
        change : tuple of (str, str)
            Points and options.
        known : bool
            Whether an earlier session found it faster: then it stays unless it is slower.

        Raises
        ------
        OutOfTime
            The deadline is near.
        """
        self._check_time()
        decided = {**self.decided, **dict(change)}
        scheduled, points = self._scheduled(decided)
        names = {variable.name_hint for variable in scheduled.functions}
        gone = {name for name in self.best.version.calls if name not in names}
        trial = Trial(change=change)
        known_s = sum(self._call_s.get(name, self._total_s) for name in gone)
        if known_s >= LEAST_SHARE * self._total_s:
            other = self._lowered(scheduled, points)
            measured = self._compare(other)
            trial = Trial(
                change=change,
                kept=not measured.slower(OTHER, over=BEST)
                if known
                else measured.faster(OTHER, over=BEST),
                seconds=measured.quiet.latency(OTHER).median_ms * 1e-3,
                default_s=measured.quiet.latency(BEST).median_ms * 1e-3,
            )
            if trial.kept:
                self.best, self.decided = other, decided
            self._versions.keep([self.untuned.version, self.best.version])
        self.trials.append(trial)
        return trial

    def joint(self, trial: Trial, known: Mapping[str, tuple[str, ...]]) -> list[Change]:
        """Return a change again, with other options of the points that only it brings."""
        _, points = self._scheduled({**self.decided, **dict(trial.change)})
        return [
            (*trial.change, (point, option))
            for rank in range(1, 1 + JOINT_OPTIONS)
            for point, options in points.items()
            if point not in known
            for option in options[rank : rank + 1]
        ]

    def _compare(self, other: Lowered) -> Views:
        """Time the calls that differ, in turns."""
        before, after = differing(self.best.version, other.version)
        return compare(
            self._versions,
            {BEST: self.best.version, OTHER: other.version},
            self._run_s,
            self._deadline,
            columns={BEST: before, OTHER: after},
        )

    def settle(self) -> float | None:
        """Drop what makes the whole model slower, and return how many times faster it is.

        Each decision made its kernels faster; what they do to all others, only the whole run
        shows. While it is slower than the model without decisions, the one that saved least goes.

        Returns
        -------
        float or None
            None where nothing is decided, or the time did not suffice to compare.
        """
        while self.decided:
            try:
                measured = compare(
                    self._versions,
                    {OTHER: self.untuned.version, BEST: self.best.version},
                    self._run_s,
                    self._last_s,
                )
            except OutOfTime:
                return None
            if not measured.slower(BEST, over=OTHER):
                return measured.quiet.speedup(BEST, over=OTHER).ratio
            kept = [trial for trial in self.trials if trial.kept]
            weakest = min(kept, key=lambda trial: trial.gain_s)
            self.trials[self.trials.index(weakest)] = replace(weakest, kept=False)
            self.decided = {
                point: option
                for point, option in self.decided.items()
                if (point, option) not in weakest.change
            }
            self.best = self.untuned
            if self.decided:
                try:
                    self.best = self._lowered(*self._scheduled(self.decided))
                except OutOfTime:
                    # What is left was never run together.
                    self.decided = {}
        return None


def descend(
    search: LoweringSearch,
    known: list[tuple[str, str]],
    tried: set[tuple[str, str]],
    say: Callable[[Trial], None],
) -> None:
    """Try everything that was not tried before, as long as there is time.

    Parameters
    ----------
    search : LoweringSearch
        Knows how.
    known : list of (str, str)
        What an earlier session decided; tried again first.
    tried : set of (str, str)
        What earlier sessions tried; grows.
    say : callable
        Is told each trial.

    Raises
    ------
    OutOfTime
        The deadline is near, and something is left to try.
    """

    def attempt(change: Change, *, known: bool = False) -> Trial:
        trial = search.attempt(change, known=known)
        tried.add(named(change))
        say(trial)
        return trial

    for choice in known:
        # Others belong to another model, or to how a batch is cut: no kernel here depends on them.
        if choice[0] in {**search.untuned.points, **search.best.points}:
            attempt((choice,), known=True)
    joint: list[Change] = []
    near: list[tuple[Trial, dict[str, str]]] = []
    while choices := [choice for choice in search.options() if choice not in tried]:
        for choice in choices:
            if choice[0].startswith(PACKING):
                continue
            trial = attempt((choice,))
            if not trial.kept and trial.ratio >= JOINT:
                joint += search.joint(trial, {**search.untuned.points, **search.best.points})
        packings = [choice for choice in choices if choice[0].startswith(PACKING)]
        screened = search.screen(packings)
        for trial in screened:
            tried.add(named(trial.change))
            say(trial)
        promising = [trial for trial in screened if trial.ratio >= PROMISING]
        for trial in sorted(promising, key=lambda trial: -trial.gain_s):
            alone = attempt(trial.change)
            if not alone.kept and alone.ratio >= NEAR:
                near.append((alone, dict(search.decided)))
    for change in joint:
        if named(change) not in tried:
            attempt(change)
    for trial, decided in near:
        if search.decided != decided:
            attempt(trial.change)


def named(change: Change) -> tuple[str, str]:
    """Return the point and the option that a change is remembered as."""
    (point, option), *others = change
    return point, " + ".join([option, *(f"{name}: {taken}" for name, taken in others)])


def search(link: Connection, request: dict[str, Any]) -> None:
    """Search, and say what was found: ``trial`` for each change, then ``done``."""

    def say(kind: str, **values: Any) -> None:
        link.send_bytes(journal.dumps({"kind": kind, **values}))

    def tell(trial: Trial) -> None:
        point, option = named(trial.change)
        say(
            "trial",
            point=point,
            option=option,
            kept=trial.kept,
            screened=trial.screened,
            seconds=trial.seconds,
            default_s=trial.default_s,
        )

    module = tvm.ir.load_json(Path(request["module"]).read_text(encoding="utf-8"))
    tried = {(str(point), str(option)) for point, option in request["tried"]}
    known = [(str(point), str(option)) for point, option in request["decided"].items()]
    exhausted, speedup = False, None
    descent: LoweringSearch | None = None
    try:
        descent = LoweringSearch(
            module,
            tvm.target.Target(request["target"]),
            Machine(**request["machine"]),
            compact=bool(request["compact"]),
            deadline=float(request["deadline"]),
        )
        say("start", choices=len(descent.options()))
        descend(descent, known, tried, tell)
        exhausted = True
    except OutOfTime:
        pass
    decided: dict[str, str] = dict(known)
    if descent is not None:
        speedup = descent.settle()
        decided = descent.decided
    say("done", decided=decided, speedup=speedup, exhausted=exhausted)


def main() -> None:
    """Run the search; the arguments are the number of the pipe and the request's file."""
    die_with_parent()
    link = Connection(int(sys.argv[1]))
    request = json.loads(Path(sys.argv[2]).read_bytes())
    try:
        search(link, request)
    except (EOFError, ConnectionError):
        os._exit(1)  # the parent is gone
    except REFUSALS as error:
        link.send_bytes(journal.dumps({"kind": "failed", "reason": reason_of(error)}))
