"""A compiled model that can be run with other kernels, and clocks for it.

A kernel that is compiled alone is put before those of the model: the virtual machine takes the
first function of a name that it finds. Versions of a model are timed in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from hone.measure import LEAST_ROUNDS, SETTLE_S, Measurement, Rounds
from hone.passes.lower.promote_accumulators import CODEGEN_CONFIG, TIR_PIPELINE
from hone.profiling.kernel_timer import BUILTIN, clock_reader

from .confirm import OutOfTime, Views

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


class Version:
    """A model with some kernels replaced, loaded.

    Parameters
    ----------
    program : VMExecutable
        From `executable`.
    inputs : sequence of Tensor
        What it is run on.
    """

    def __init__(self, program: relax.VMExecutable, inputs: Sequence[tvm.runtime.Tensor]) -> None:
        self._machine = relax.VirtualMachine(program, tvm.cpu())
        self._main = self._machine["main"]
        self._inputs = inputs
        self._ticks: list[int] = []
        self._clock = clock_reader(self._ticks)

    def run(self) -> None:
        """Run it once."""
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
        kept = len(block(run, rounds))
        self._machine.set_instrument(None)
        return np.diff(np.array(rows[-kept:], np.int64), axis=1)[:, ::2] * 1e-9

    def probe(self) -> tuple[float, float]:
        """Return the seconds of one run, and of one run under the instrument."""
        probes = Rounds(rounds=1, runs=PROBES + 1, warmup=1)
        watched = block(lambda: self.watch(ONCE), probes)
        return float(np.median(self.clock(probes))), float(np.median(watched))

    def clock(self, rounds: Rounds) -> np.ndarray:
        """Return ``[runs]`` of one block: seconds of every run."""
        return block(self.run, rounds)


def block(run: Callable[[], object], rounds: Rounds) -> np.ndarray:
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


def compile_kernels(
    functions: Mapping[str, tirx.PrimFunc], target: tvm.target.Target
) -> tvm.runtime.Module:
    """Compile scheduled functions under the given names, as a package's kernels are compiled."""
    module = tvm.IRModule(
        {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    )
    with tvm.transform.PassContext(opt_level=3, config=CODEGEN_CONFIG):
        return tvm.tirx.build(module, target, pipeline=TIR_PIPELINE)


def executable(module: tvm.IRModule, libraries: Sequence[tvm.runtime.Module]) -> relax.VMExecutable:
    """Return the virtual machine's program for a finalized module, over compiled kernels."""
    builder = relax.ExecBuilder()
    relax.vm_build._vmcodegen(builder, module)
    program = builder.get()
    for library in libraries:
        program.mod.import_module(library)
    return program


def kernel_times(
    version: Version, calls: Sequence[str], run_s: float, seconds: float = PROFILE_S
) -> dict[str, float]:
    """Return the seconds of all calls of each function in one run."""
    rounds = plan(run_s, 1, seconds)
    watched = np.concatenate([version.watch(rounds) for _ in range(rounds.rounds)])
    times = np.median(watched, axis=0)
    times -= times.min()  # the instrument's own time
    found: dict[str, float] = {}
    for name, call_s in zip(calls, times, strict=True):
        if not name.startswith(BUILTIN):
            found[name] = found.get(name, 0.0) + float(call_s)
    return found


def least_s(run_s: float, contenders: int) -> float:
    """Return the seconds that the shortest comparison takes."""
    rounds = plan(run_s, contenders, 0.0)
    return contenders * rounds.rounds * (rounds.runs * run_s + SETTLE_S)


def fitting(run_s: float, contenders: int, deadline: float) -> tuple[Rounds, float]:
    """Return the rounds of a comparison that fits into the time that is left, and its end.

    Raises
    ------
    OutOfTime
        None does.
    """
    now = time.monotonic()
    left = deadline - now
    seconds = min(MEASURE_S, left * MEASURE_SHARE)
    rounds = plan(run_s, contenders, seconds)
    if contenders * rounds.rounds * (rounds.runs * run_s + SETTLE_S) > left:
        raise OutOfTime
    return rounds, now + seconds


def interleave(
    blocks: Mapping[str, Callable[[Rounds], np.ndarray]], run_s: float, deadline: float
) -> dict[str, list[np.ndarray]]:
    """Return the block of each round of each contender, measured in turns.

    A busy machine may slow down a thousandfold: after the least number of rounds the clock ends
    them.

    Raises
    ------
    OutOfTime
        The deadline came too early for a comparison.
    """
    rounds, end = fitting(run_s, len(blocks), deadline)
    samples: dict[str, list[np.ndarray]] = {name: [] for name in blocks}
    names = list(blocks)
    for number in range(rounds.rounds):
        now = time.monotonic()
        if now > (end if number >= ROUNDS[0] else deadline):
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE_S)
            samples[name].append(blocks[name](rounds))
    if len(samples[names[0]]) < LEAST_ROUNDS:
        raise OutOfTime
    return samples


def timer_s(watched: Sequence[np.ndarray]) -> float:
    """Return the instrument's own seconds in each call of watched blocks."""
    return float(np.median([np.median(rows, axis=0).min() for rows in watched]))


def columns_s(rows: np.ndarray, columns: Sequence[int], timer: float) -> np.ndarray:
    """Return the seconds of some calls together in each run of a block."""
    return np.asarray(np.maximum(rows[:, columns] - timer, 1e-9).sum(axis=1))


def views(blocks: Mapping[str, list[np.ndarray]]) -> Views:
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
