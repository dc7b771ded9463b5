"""Runs the whole model in a process of its own, and times its kernels there.

The model is compiled once, with its untuned kernels; a kernel with a record is compiled alone. So
all versions share their weights and their graph, and differ in the kernels alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.s_tir import meta_schedule as ms

from hone.measure import Rounds
from hone.targets import features

from .builder import WrongResultError, die_with_parent, make_arguments
from .builder import compare as compare_results
from .confirm import RECORD, UNTUNED, Choice, Confirmation, OutOfTime, Views, confirm
from .reason import reason_of
from .records import Match
from .replay import REFUSALS, ReplayError, replay
from .running import (
    SCREEN_ROUNDS,
    compare,
    differing,
    fitting,
    interleave,
    kernel_times,
    least_s,
    probe,
    views,
)
from .versions import Kernels, Version, versions

RESERVED = 6
RESERVED_SHARE = 0.45
LAST_SHARE = 0.15
"""What is kept for the comparisons of single candidates and whole models, after the last rank: so
many of the shortest ones, or a share of the time; and the share that is for the whole model."""

ANSWER_S = 0.3
"""In which an answer is on its way before the deadline."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What may replace a kernel.

    Parameters
    ----------
    functions : tuple of str
        Names of the model's functions that this kernel is.
    module : str
        JSON of its workload.
    records : tuple of list
        JSON of tuning records, best first.
    """

    functions: tuple[str, ...]
    module: str
    records: tuple[list[Any], ...]


class RunningModel:
    """A model whose kernels can be replaced; a `hone.tuning.confirm.Stage`.

    Parameters
    ----------
    module : IRModule
        Every function scheduled, as without records.
    target : Target
        What to generate code for.
    threads : int
        Threads of one run.
    """

    def __init__(self, module: tvm.IRModule, target: tvm.target.Target, *, threads: int) -> None:
        self._target = target
        inputs = make_arguments(
            [
                (str(variable.ty.dtype), tuple(int(extent) for extent in variable.ty.shape))
                for variable in module["main"].params
            ]
        )
        self._versions = versions(module, target, threads, inputs)
        program = self._versions.program(module)
        if program is None:
            raise ValueError("the model cannot be run")
        self._program = program
        self._untuned_kernels = self._versions.compile(program.functions)
        self._candidates: dict[str, Candidates] = {}
        self._built: dict[tuple[str, int], list[Kernels]] = {}
        self._deadline = float("inf")
        self._untuned = self._version({})
        self._untuned.run()
        self._run_s = probe(self._untuned)
        self._ranks_until = self._alone_until = self._deadline

    def pin(self) -> None:
        """Pin the threads of the runs, in a process that has no other business."""
        self._versions.pin()

    def _version(self, choice: Choice) -> Version:
        kernels = [built for item in choice.items() for built in self._kernel(*item)]
        return self._versions.load(self._program, [*kernels, self._untuned_kernels])

    def offer(
        self, candidates: Mapping[str, Candidates], deadline: float, *, decide: bool = True
    ) -> None:
        """Say what may replace each kernel, and until when.

        Parameters
        ----------
        candidates : mapping of str to Candidates
            By kernel.
        deadline : float
            Monotonic time.
        decide : bool
            Whether single candidates and whole models will be compared at the end, without which
            all trials would be for nothing: they have a part of the time.
        """
        left = deadline - time.monotonic()
        self._candidates = dict(candidates)
        self._built = {}
        self._deadline = self._ranks_until = self._alone_until = deadline
        if decide:
            self._deadline -= ANSWER_S
            reserve_s = max(RESERVED * least_s(self._run_s, 2), RESERVED_SHARE * left)
            self._ranks_until = self._deadline - reserve_s
            self._alone_until = self._deadline - max(least_s(self._run_s, 2), LAST_SHARE * left)

    def profile(self) -> dict[str, float]:
        """Return the seconds of all calls of each function in one run of the untuned model."""
        return kernel_times(self._versions, self._untuned, self._run_s)

    def _kernel(self, kernel: str, number: int) -> list[Kernels]:
        """Return the compiled functions of a candidate; none when it does not apply any more."""
        if (kernel, number) not in self._built:
            self._built[kernel, number] = self._compile(self._candidates[kernel], number)
        return self._built[kernel, number]

    def _compile(self, candidates: Candidates, number: int) -> list[Kernels]:
        workload = tvm.ir.load_json(candidates.module)
        filed = ms.database.Workload(workload).as_json()
        match = Match(
            workload=[str(filed[0]), str(filed[1])],
            record=candidates.records[number],
            untuned_s=None,
        )
        try:
            func = replay(workload["main"], match, self._target)
            return [self._versions.compile({name: func}) for name in candidates.functions]
        except (*REFUSALS, ReplayError):
            return []

    def kernels(self, choice: Choice) -> Mapping[str, Views]:
        """Time each kernel of a choice; see `hone.tuning.confirm.Stage`."""
        built = {}
        for kernel, number in choice.items():
            fitting(self._run_s, 2, self._ranks_until)
            if self._kernel(kernel, number):
                built[kernel] = number
        found: dict[str, Views] = {}
        for group in apart(self._untuned.calls, {k: self._functions(k) for k in built}):
            found.update(self._timed({kernel: built[kernel] for kernel in group}))
        return found

    def _functions(self, kernel: str) -> tuple[str, ...]:
        return self._candidates[kernel].functions

    def _timed(self, choice: Choice) -> dict[str, Views]:
        """Time kernels that do not follow one another, each with the calls behind it."""
        watched = {UNTUNED: self._untuned, RECORD: self._version(choice)}
        columns = {}
        for kernel in choice:
            own = [i for i, n in enumerate(self._untuned.calls) if n in self._functions(kernel)]
            last = len(self._untuned.calls) - 1
            columns[kernel] = sorted({*own, *(min(i + 1, last) for i in own)})

        def block(one: Version) -> Callable[[Rounds], np.ndarray]:
            return one.watch

        samples = interleave(
            {name: block(one) for name, one in watched.items()},
            self._run_s,
            self._ranks_until,
            move=lambda: self._versions.move(list(watched.values())),
            settled=lambda samples: len(samples[UNTUNED]) >= SCREEN_ROUNDS,
        )
        return {
            kernel: views(
                {name: [r[:, wanted].sum(axis=1) for r in rows] for name, rows in samples.items()}
            )
            for kernel, wanted in columns.items()
        }

    def right(self, choice: Choice) -> bool:
        """Say whether the model computes the same; see `hone.tuning.confirm.Stage`."""
        try:
            compare_results(self._untuned.outputs(), self._version(choice).outputs())
        except WrongResultError:
            return False
        return True

    def pair(self, before: Choice, after: Choice) -> Views:
        """Time what differs between two choices; see `hone.tuning.confirm.Stage`."""
        one, other = self._version(before), self._version(after)
        columns = dict(zip((UNTUNED, RECORD), differing(one, other), strict=True))
        return compare(
            self._versions,
            {UNTUNED: one, RECORD: other},
            self._run_s,
            self._alone_until,
            columns=columns,
        )

    def whole(self, choices: Mapping[str, Choice]) -> Views:
        """Time whole runs; see `hone.tuning.confirm.Stage`."""
        loaded = {name: self._version(choice) for name, choice in choices.items()}
        return compare(self._versions, loaded, self._run_s, self._deadline)


def apart(calls: Sequence[str], kernels: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return groups of kernels of which none is called right behind another of its group.

    What a kernel takes depends on where the one before it left its result: with both on one thread
    a depthwise layer seemed three times as fast.

    Parameters
    ----------
    calls : sequence of str
        Functions in the order of a run.
    kernels : mapping of str to sequence of str
        The functions of each kernel.
    """
    owner = {name: kernel for kernel, names in kernels.items() for name in names}
    beside: dict[str, set[str]] = {kernel: set() for kernel in kernels}
    for first, second in pairwise(owner.get(name, "") for name in calls):
        if first and second and first != second:
            beside[first].add(second)
            beside[second].add(first)
    groups: list[list[str]] = []
    for kernel in kernels:
        group = next((g for g in groups if not beside[kernel] & set(g)), None)
        if group is None:
            groups.append(group := [])
        group.append(kernel)
    return groups


def serve(connection: Connection, model: str, target: str, threads: int) -> None:
    """Body of the model's process.

    It sends ``("profile", seconds by function)``, then waits for ``(candidates, deadline, whether
    to decide)``, and answers with any number of ``("say", text)`` and one ``("confirmed",
    Confirmation or None)``: None when the time did not suffice. At any point ``("failed",
    reason)`` ends it.

    Parameters
    ----------
    connection : Connection
        To the search.
    model : str
        File with the JSON of the scheduled module.
    target : str
        JSON of the TVM target.
    threads : int
        Threads of one run.
    """
    die_with_parent()
    features.request_tiles()
    try:
        module = tvm.ir.load_json(Path(model).read_text(encoding="utf-8"))
        running = RunningModel(module, tvm.target.Target(json.loads(target)), threads=threads)
        running.pin()  # its first run started the threads
        connection.send(("profile", running.profile()))
        while True:
            candidates, deadline, decide = connection.recv()
            running.offer(candidates, deadline, decide=decide)
            found = _confirmed(running, candidates, connection.send, decide=decide)
            connection.send(("confirmed", found))
    except EOFError:  # the search is gone
        return
    except Exception as error:  # noqa: BLE001 - a process boundary: the search reports it
        connection.send(("failed", reason_of(error)))


def _confirmed(
    running: RunningModel,
    candidates: Mapping[str, Candidates],
    send: Callable[[tuple[str, str]], None],
    *,
    decide: bool,
) -> Confirmation | None:
    counts = {kernel: len(offered.records) for kernel, offered in candidates.items()}
    try:
        return confirm(running, counts, lambda text: send(("say", text)), decide=decide)
    except OutOfTime:
        return None
