"""Searches how layers are lowered: how weights are packed, which Winograd transform, or none.

These choices change a kernel's weights, so no schedule can make them, and a kernel alone says
little: larger weights come from memory only inside the model. So the model is lowered anew with
one choice changed, the kernels that differ are timed inside both versions in turns, and the better
version is the one that the next choice is tried on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx

from hone.pipeline import (
    Stage,
    constant_bytes,
    finalize_stages,
    graph_stages,
    lower_stages_of,
)
from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import Machine

from . import journal
from .builder import die_with_parent, make_arguments
from .confirm import OutOfTime, Views
from .pinning import pin_all
from .reason import reason_of
from .replay import REFUSALS
from .running import (
    Version,
    columns_s,
    compile_kernels,
    executable,
    interleave,
    kernel_times,
    timer_s,
    views,
)

LEAST_SHARE = 0.01
"""Of a run: kernels that take less are left as they are."""

ALTERNATIVES = 3
"""Options that are tried at a point, beside the model's own choice."""

OTHER = "other"
"""The version of the model with one choice changed, beside the best one so far."""

BEST = "best"


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
    calls : list of str
        Names of the kernels of a run, in order.
    points : dict of str to tuple of str
        The options of each choice.
    """

    version: Version
    calls: list[str]
    points: dict[str, tuple[str, ...]]


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
        self._deadline = deadline
        self._libraries: dict[str, tvm.runtime.Module] = {}
        self._graph = self._run(graph_stages(), module)
        self._inputs = make_arguments(
            [
                (str(variable.ty.dtype), tuple(int(extent) for extent in variable.ty.shape))
                for variable in self._graph["main"].params
            ]
        )
        self.decided: dict[str, str] = {}
        self.untuned = self.best = self._lowered({})
        if pin:
            pin_all()  # its first run started the threads
        self._run_s, self._watched_s = self.best.version.probe()
        times = kernel_times(self.best.version, self.best.calls, self._watched_s)
        total_s = sum(times.values())
        self._small = {name for name, seconds in times.items() if seconds < LEAST_SHARE * total_s}

    def _run(self, stages: tuple[Stage, ...], module: tvm.IRModule) -> tvm.IRModule:
        with self._target:
            for stage in stages:
                module = stage.run(module)
        return module

    def _program(
        self, decided: Mapping[str, str]
    ) -> tuple[tvm.IRModule, dict[str, tuple[str, ...]]]:
        asked: dict[str, tuple[str, ...]] = {}
        machine = replace(self._machine, decided=tuple(sorted(decided.items())), asked=asked)
        stages = lower_stages_of(machine, compact=self._compact)
        lowered = self._run(stages, self._graph)
        scheduled = ScheduleModule(self._machine)(lowered)
        return self._run(finalize_stages(), canonical(scheduled)), asked

    def _load(self, module: tvm.IRModule) -> Version:
        functions = {
            variable.name_hint: func
            for variable, func in module.functions.items()
            if isinstance(func, tirx.PrimFunc)
        }
        for name, func in functions.items():
            if name not in self._libraries:
                self._libraries[name] = compile_kernels({name: func}, self._target)
                if time.monotonic() >= self._deadline:
                    raise OutOfTime
        program = executable(module, [self._libraries[name] for name in functions])
        return Version(program, self._inputs)

    def _lowered(self, decided: Mapping[str, str]) -> Lowered:
        module, points = self._program(decided)
        version = self._load(module)
        return Lowered(version=version, calls=version.names(), points=points)

    def options(self) -> list[tuple[str, str]]:
        """Return the choices to try, each layer's first alternative before any second one."""
        points = self.untuned.points
        ordered = sorted(points, key=lambda point: not point.startswith("winograd"))
        return [
            (point, points[point][rank])
            for rank in range(1, ALTERNATIVES + 1)
            for point in ordered
            if rank < len(points[point])
        ]

    def attempt(self, point: str, option: str) -> dict[str, Any] | None:
        """Change one choice, and keep it when the kernels that it changes are faster.

        Returns
        -------
        dict or None
            What was measured; None where the choice changes nothing that matters.

        Raises
        ------
        OutOfTime
            The deadline is near.
        """
        if time.monotonic() >= self._deadline:
            raise OutOfTime
        decided = {**self.decided, point: option}
        module, points = self._program(decided)
        names = {
            variable.name_hint
            for variable, func in module.functions.items()
            if isinstance(func, tirx.PrimFunc)
        }
        gone = (set(self.best.calls) & set(self._libraries)) - names
        if not gone - self._small:
            return None
        version = self._load(module)
        other = Lowered(version=version, calls=version.names(), points=points)
        measured = self._compare(other)
        kept = measured.faster(OTHER, over=BEST)
        if kept:
            self.best, self.decided = other, decided
        return {
            "kept": kept,
            "seconds": measured.quiet.latency(OTHER).median_ms * 1e-3,
            "default_s": measured.quiet.latency(BEST).median_ms * 1e-3,
        }

    def _compare(self, other: Lowered) -> Views:
        """Time the calls that differ, in turns."""
        contenders = {BEST: self.best, OTHER: other}
        before, after = Counter(self.best.calls), Counter(other.calls)
        differ = {name for name in before | after if before[name] != after[name]}
        watched = interleave(
            {name: lowered.version.watch for name, lowered in contenders.items()},
            self._watched_s,
            self._deadline,
        )
        own_s = timer_s(watched[BEST])
        return views(
            {
                name: [
                    columns_s(
                        rows,
                        [i for i, call in enumerate(contenders[name].calls) if call in differ],
                        own_s,
                    )
                    for rows in blocks
                ]
                for name, blocks in watched.items()
            }
        )

    def speedup(self) -> float | None:
        """Return how many times faster the best version is as a whole; None when it is not."""
        if not self.decided:
            return None
        blocks = {BEST: self.best.version.clock, OTHER: self.untuned.version.clock}
        measured = views(interleave(blocks, self._run_s, self._deadline + 5.0))
        if not measured.faster(BEST, over=OTHER):
            return None
        return measured.quiet.speedup(BEST, over=OTHER).ratio


def search(link: Connection, request: dict[str, Any]) -> None:
    """Search, and say what was found: ``trial`` for each choice, then ``done``."""

    def say(kind: str, **values: Any) -> None:
        link.send_bytes(journal.dumps({"kind": kind, **values}))

    module = tvm.ir.load_json(Path(request["module"]).read_text(encoding="utf-8"))
    tried = {(str(point), str(option)) for point, option in request["tried"]}
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
        options = descent.options()
        say("start", choices=len(options))
        known = [(str(point), str(option)) for point, option in request["decided"].items()]
        for point, option in known + [choice for choice in options if choice not in tried]:
            measured = descent.attempt(point, option) or {}
            say("trial", point=point, option=option, **measured)
        exhausted = True
    except OutOfTime:
        pass
    if descent is not None:
        try:
            speedup = descent.speedup()
        except OutOfTime:
            speedup = None
    decided = descent.decided if descent is not None and speedup is not None else {}
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
