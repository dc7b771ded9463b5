"""Runs the whole model in a process of its own, and times its kernels there.

The model is compiled once, with its untuned kernels. A kernel with a record is compiled alone and
put before them: the virtual machine takes the first function of a name that it finds. So all
versions share their weights and their graph, and differ in the kernels alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import meta_schedule as ms

from hone.pipeline import finalize_stages
from hone.targets import features

from .builder import die_with_parent, make_arguments
from .confirm import RECORD, UNTUNED, Choice, Confirmation, OutOfTime, Views, confirm
from .pinning import pin_all
from .reason import reason_of
from .records import Match
from .replay import REFUSALS, ReplayError, replay
from .running import (
    Version,
    columns_s,
    compile_kernels,
    executable,
    fitting,
    interleave,
    kernel_times,
    least_s,
    timer_s,
    views,
)

WHOLE_CONTENDERS = 3
LOADING_S = 0.5
"""Models that are compared at the end, and about how long it takes to load them."""


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
    """

    def __init__(self, module: tvm.IRModule, target: tvm.target.Target) -> None:
        self._target = target
        self._inputs = make_arguments(
            [
                (str(variable.ty.dtype), tuple(int(extent) for extent in variable.ty.shape))
                for variable in module["main"].params
            ]
        )
        with target:
            for stage in finalize_stages():
                module = stage.run(module)
        self._functions = {
            variable.name_hint: func
            for variable, func in module.functions.items()
            if isinstance(func, tirx.PrimFunc)
        }
        self._module = module
        self._untuned_kernels = compile_kernels(self._functions, target)
        self._untuned = self._version([])
        self._calls = self._untuned.names()
        self._candidates: dict[str, Candidates] = {}
        self._built: dict[tuple[str, int], list[tvm.runtime.Module]] = {}
        self._deadline = float("inf")
        self._run_s, self._watched_s = self._untuned.probe()
        # Without the comparison of whole models at the end, all trials would be for nothing.
        self._reserve_s = LOADING_S + 2 * least_s(self._run_s, WHOLE_CONTENDERS)

    def _version(self, kernels: Sequence[tvm.runtime.Module]) -> Version:
        libraries = (*kernels, self._untuned_kernels)
        return Version(executable(self._module, libraries), self._inputs)

    def offer(self, candidates: Mapping[str, Candidates], deadline: float) -> None:
        """Say what may replace each kernel, and until when.

        Parameters
        ----------
        candidates : mapping of str to Candidates
            By kernel.
        deadline : float
            Monotonic time.
        """
        self._candidates = dict(candidates)
        self._deadline = deadline
        self._built = {}

    def profile(self) -> dict[str, float]:
        """Return the seconds of all calls of each function in one run of the untuned model."""
        return kernel_times(self._untuned, self._calls, self._watched_s)

    def _kernel(self, kernel: str, number: int) -> list[tvm.runtime.Module]:
        """Return the compiled functions of a candidate; none when it does not apply any more."""
        if (kernel, number) not in self._built:
            self._built[kernel, number] = self._compile(self._candidates[kernel], number)
        return self._built[kernel, number]

    def _compile(self, candidates: Candidates, number: int) -> list[tvm.runtime.Module]:
        workload = tvm.ir.load_json(candidates.module)
        filed = ms.database.Workload(workload).as_json()
        match = Match(
            workload=[str(filed[0]), str(filed[1])],
            record=candidates.records[number],
            untuned_s=None,
        )
        try:
            func = replay(workload["main"], match, self._target)
            return [compile_kernels({name: func}, self._target) for name in candidates.functions]
        except (*REFUSALS, ReplayError):
            return []

    def kernels(self, choice: Choice) -> Mapping[str, Views]:
        """Time each kernel of a choice; see `hone.tuning.confirm.Stage`."""
        libraries: list[tvm.runtime.Module] = []
        built = []
        for kernel, number in choice.items():
            fitting(self._watched_s, 2, self._deadline - self._reserve_s)
            if found := self._kernel(kernel, number):
                libraries += found
                built.append(kernel)
        if not built:
            return {}
        version = self._version(libraries)
        version.run()
        watched = interleave(
            {UNTUNED: self._untuned.watch, RECORD: version.watch},
            self._watched_s,
            self._deadline - self._reserve_s,
        )
        own_s = timer_s(watched[UNTUNED])
        measured = {}
        for kernel in built:
            functions = set(self._candidates[kernel].functions)
            columns = [i for i, name in enumerate(self._calls) if name in functions]
            measured[kernel] = views(
                {
                    name: [columns_s(rows, columns, own_s) for rows in blocks]
                    for name, blocks in watched.items()
                }
            )
        return measured

    def whole(self, choices: Mapping[str, Choice]) -> Views:
        """Time whole runs; see `hone.tuning.confirm.Stage`."""
        blocks = {}
        for name, choice in choices.items():
            kernels = [lib for item in choice.items() for lib in self._kernel(*item)]
            version = self._version(kernels) if kernels else self._untuned
            version.run()
            blocks[name] = version.clock
        return views(interleave(blocks, self._run_s, self._deadline))


def serve(connection: Connection, model: str, target: str) -> None:
    """Body of the model's process.

    It sends ``("profile", seconds by function)``, then waits for ``(candidates, deadline)``, and
    answers with any number of ``("say", text)`` and one ``("confirmed", Confirmation or None)``:
    None when the time did not suffice. At any point ``("failed", reason)`` ends it.

    Parameters
    ----------
    connection : Connection
        To the search.
    model : str
        File with the JSON of the scheduled module.
    target : str
        JSON of the TVM target.
    """
    die_with_parent()
    features.request_tiles()
    try:
        module = tvm.ir.load_json(Path(model).read_text(encoding="utf-8"))
        running = RunningModel(module, tvm.target.Target(json.loads(target)))
        pin_all()  # its first run started the threads
        connection.send(("profile", running.profile()))
        while True:
            candidates, deadline = connection.recv()
            running.offer(candidates, deadline)
            connection.send(("confirmed", _confirmed(running, candidates, connection.send)))
    except EOFError:  # the search is gone
        return
    except Exception as error:  # noqa: BLE001 - a process boundary: the search reports it
        connection.send(("failed", reason_of(error)))


def _confirmed(
    running: RunningModel,
    candidates: Mapping[str, Candidates],
    send: Callable[[tuple[str, str]], None],
) -> Confirmation | None:
    counts = {kernel: len(offered.records) for kernel, offered in candidates.items()}
    try:
        return confirm(running, counts, lambda text: send(("say", text)))
    except OutOfTime:
        return None
