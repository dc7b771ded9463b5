"""Runs the whole model in a process of its own, and times its kernels there.

The model is compiled once, with its untuned kernels. A kernel with a record is compiled alone and
put before them: the virtual machine takes the first function of a name that it finds. So all
versions share their weights and their graph, and differ in the kernels alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.s_tir import meta_schedule as ms

from hone.measure import SETTLE_S, Measurement, Rounds
from hone.passes.lower.promote_accumulators import CODEGEN_CONFIG, TIR_PIPELINE
from hone.pipeline import finalize_stages
from hone.profiling.kernel_timer import BUILTIN, clock_reader

from .builder import die_with_parent, make_arguments
from .confirm import RECORD, UNTUNED, Choice, Confirmation, OutOfTime, Views, confirm
from .reason import reason_of
from .records import Match
from .replay import REFUSALS, ReplayError, replay

BLOCK_S = 0.01
LONGEST_BLOCK_S = 0.05
"""Length of one block of runs, and the length at which it ends early: on a busy machine, a kernel
whose threads wait for one that does not run takes a thousand times as long."""

MEASURE_S = 1.5
MEASURE_SHARE = 0.25
"""About how long a comparison takes: this, or a share of the time that is left."""

PROFILE_S = 0.3

PROBES = 5
"""Runs that tell how long one takes."""

QUIET = 0.1
"""Quantile of a block's runs that shows a quiet machine."""

ONCE = Rounds(rounds=1, runs=1, warmup=0)

RUNS = (3, 200)
ROUNDS = (8, 60)
"""Least and most runs of a block, and blocks of a comparison, as planned."""

LEAST_ROUNDS = 5
"""A comparison that the deadline ends before so many is no comparison."""


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


def plan(run_s: float, contenders: int, seconds: float) -> Rounds:
    """Return how often to run contenders in turns, in about a given time.

    Parameters
    ----------
    run_s : float
        Seconds of one run.
    contenders : int
        How many there are.
    seconds : float
        The time; the least numbers of runs and rounds may take longer.
    """
    runs = min(max(int(BLOCK_S / run_s), RUNS[0]), RUNS[1])
    warmup = 1 + runs // 4
    block_s = SETTLE_S + (runs + warmup) * run_s
    rounds = min(max(int(seconds / (contenders * block_s)), ROUNDS[0]), ROUNDS[1])
    return Rounds(rounds=rounds, runs=runs + warmup, warmup=warmup)


class _Version:
    """The model with some kernels replaced, loaded."""

    def __init__(
        self, executable: relax.VMExecutable, inputs: Sequence[tvm.runtime.Tensor]
    ) -> None:
        self._machine = relax.VirtualMachine(executable, tvm.cpu())
        self._main = self._machine["main"]
        self._inputs = inputs
        self._ticks: list[int] = []
        self._clock = clock_reader(self._ticks)

    def run(self) -> None:
        self._main(*self._inputs)

    def names(self) -> list[str]:
        """Return the function of each call of a run."""
        names: list[str] = []

        def note(_function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> None:
            if before:
                names.append(name)

        self._machine.set_instrument(note)
        self.run()
        self._machine.set_instrument(None)
        return names

    def watch(self, rounds: Rounds) -> np.ndarray:
        """Return ``[runs, calls]`` of one block: seconds of every call."""
        rows: list[tuple[int, ...]] = []

        def run() -> None:
            self._ticks.clear()
            self.run()
            rows.append(tuple(self._ticks))

        self._machine.set_instrument(self._clock)
        kept = len(_block(run, rounds))
        self._machine.set_instrument(None)
        return np.diff(np.array(rows[-kept:], np.int64), axis=1)[:, ::2] * 1e-9

    def clock(self, rounds: Rounds) -> np.ndarray:
        """Return ``[runs]`` of one block: seconds of every run."""
        return _block(self.run, rounds)


def _block(run: Callable[[], object], rounds: Rounds) -> np.ndarray:
    """Return the seconds of the runs of one block after its warm-up; at least one."""
    seconds: list[float] = []
    started = time.perf_counter()
    for number in range(rounds.runs):
        before = time.perf_counter()
        run()
        after = time.perf_counter()
        if number >= rounds.warmup or not number:
            seconds.append(after - before)
        if after - started > LONGEST_BLOCK_S and number:
            break
    return np.array(seconds[1:] or seconds)


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
        self._untuned_kernels = self._build(self._functions)
        self._untuned = self._version([])
        self._calls = self._untuned.names()
        self._candidates: dict[str, Candidates] = {}
        self._built: dict[tuple[str, int], list[tvm.runtime.Module]] = {}
        self._deadline = float("inf")
        probes = Rounds(rounds=1, runs=PROBES + 1, warmup=1)
        self._run_s = float(np.median(self._untuned.clock(probes)))
        self._watched_s = float(np.median(_block(lambda: self._untuned.watch(ONCE), probes)))

    def _build(self, functions: Mapping[str, tirx.PrimFunc]) -> tvm.runtime.Module:
        module = tvm.IRModule(
            {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
        )
        with tvm.transform.PassContext(opt_level=3, config=CODEGEN_CONFIG):
            return tvm.tirx.build(module, self._target, pipeline=TIR_PIPELINE)

    def _version(self, kernels: Sequence[tvm.runtime.Module]) -> _Version:
        builder = relax.ExecBuilder()
        relax.vm_build._vmcodegen(builder, self._module)
        executable = builder.get()
        for library in (*kernels, self._untuned_kernels):
            executable.mod.import_module(library)
        return _Version(executable, self._inputs)

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

    def profile(self, seconds: float = PROFILE_S) -> dict[str, float]:
        """Return the seconds of all calls of each function in one run of the untuned model."""
        rounds = plan(self._watched_s, 1, seconds)
        watched = np.concatenate([self._untuned.watch(rounds) for _ in range(rounds.rounds)])
        times = np.median(watched, axis=0)
        times -= times.min()  # the instrument's own time
        found: dict[str, float] = {}
        for name, call_s in zip(self._calls, times, strict=True):
            if not name.startswith(BUILTIN):
                found[name] = found.get(name, 0.0) + float(call_s)
        return found

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
            return [self._build({name: func}) for name in candidates.functions]
        except (*REFUSALS, ReplayError):
            return []

    def _plan(self, run_s: float, contenders: int) -> tuple[Rounds, float]:
        """Return the rounds of a comparison that fits into the time that is left, and its end."""
        now = time.monotonic()
        left = self._deadline - now
        seconds = min(MEASURE_S, left * MEASURE_SHARE)
        rounds = plan(run_s, contenders, seconds)
        if contenders * rounds.rounds * (rounds.runs * run_s + SETTLE_S) > left:
            raise OutOfTime
        return rounds, now + seconds

    def _interleave(
        self, blocks: Mapping[str, Callable[[Rounds], np.ndarray]], run_s: float
    ) -> dict[str, list[np.ndarray]]:
        """Return the block of each round of each contender, measured in turns.

        A busy machine may slow down a thousandfold: after the least number of rounds the clock
        ends them.
        """
        rounds, end = self._plan(run_s, len(blocks))
        samples: dict[str, list[np.ndarray]] = {name: [] for name in blocks}
        names = list(blocks)
        for number in range(rounds.rounds):
            now = time.monotonic()
            if now > (end if number >= ROUNDS[0] else self._deadline):
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                time.sleep(SETTLE_S)
                samples[name].append(blocks[name](rounds))
        if len(samples[names[0]]) < LEAST_ROUNDS:
            raise OutOfTime
        return samples

    def kernels(self, choice: Choice) -> Mapping[str, Views]:
        """Time each kernel of a choice; see `hone.tuning.confirm.Stage`."""
        libraries: list[tvm.runtime.Module] = []
        built = []
        for kernel, number in choice.items():
            self._plan(self._watched_s, contenders=2)
            if found := self._kernel(kernel, number):
                libraries += found
                built.append(kernel)
        if not built:
            return {}
        version = self._version(libraries)
        version.run()
        seconds = self._interleave(
            {UNTUNED: self._untuned.watch, RECORD: version.watch}, self._watched_s
        )
        timer_s = float(np.median([np.median(block, axis=0).min() for block in seconds[UNTUNED]]))
        measured = {}
        for kernel in built:
            functions = set(self._candidates[kernel].functions)
            columns = [i for i, name in enumerate(self._calls) if name in functions]
            measured[kernel] = _views(
                {
                    name: [np.maximum(b[:, columns] - timer_s, 1e-9).sum(axis=1) for b in blocks]
                    for name, blocks in seconds.items()
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
        return _views(self._interleave(blocks, self._run_s))


def _views(blocks: Mapping[str, list[np.ndarray]]) -> Views:
    """Return what blocks, whose numbers of runs may differ, say of their contenders."""
    typical, quiet = (
        Measurement(
            seconds={
                name: np.array([[np.quantile(block, quantile)] for block in rows])
                for name, rows in blocks.items()
            }
        )
        for quantile in (0.5, QUIET)
    )
    return Views(typical=typical, quiet=quiet)


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
    try:
        module = tvm.ir.load_json(Path(model).read_text(encoding="utf-8"))
        running = RunningModel(module, tvm.target.Target(json.loads(target)))
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
