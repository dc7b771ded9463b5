"""How many of the threads a scheduled kernel keeps busy."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm_ffi import structural_walk


def parallel_extents(func: tirx.PrimFunc) -> tuple[int, ...]:
    """Return into how many tasks each parallel loop of a scheduled function is cut."""
    found: list[int] = []

    def note(loop: tirx.For) -> None:
        if loop.kind == tirx.ForKind.PARALLEL:
            found.append(int(loop.extent))

    structural_walk(func.body, (tirx.For, note))
    return tuple(found)


def busy_share(tasks: int, threads: int) -> float:
    """Return the share of the threads' time in which they have a task of equal length.

    ``tasks / (threads × ceil(tasks / threads))``: 3 tasks keep 2 threads busy for 0.75 of the time,
    4 for all of it, 1 for half.
    """
    return tasks / (threads * -(-tasks // threads))


def busy_shares(scheduled: tvm.IRModule, threads: int) -> dict[str, float]:
    """Return kernel → the busy share of its worst loop; one task where no loop is parallel.

    Parameters
    ----------
    scheduled : IRModule
        From `hone.pipeline.schedule`.
    threads : int
        Threads of one run.
    """
    return {
        variable.name_hint: min(
            busy_share(tasks, threads) for tasks in parallel_extents(func) or (1,)
        )
        for variable, func in scheduled.functions.items()
        if isinstance(func, tirx.PrimFunc)
    }
