"""Measures how a batch is best cut: the model's own choice against its next ones.

A slice changes every kernel and how often it runs, so that only whole runs can be compared: each
way is compiled without records, in this process, and timed in turns with the best one so far.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from hone.assembling import assemble
from hone.database import Database
from hone.measure import InProcess, Outcome, Rounds, measure
from hone.model import Model
from hone.parity import random_inputs
from hone.progress import Progress
from hone.runtime import load
from hone.slicing import options_of, slice_batch
from hone.targets.target import Target

ALTERNATIVES = 2
"""Ways that are tried, beside the model's own."""

ROUNDS = Rounds(rounds=8, runs=3, warmup=1)


@dataclass(frozen=True, kw_only=True)
class SliceResult:
    """What was found.

    Parameters
    ----------
    option : str
        Samples of a slice, or ``whole``.
    tried : tuple of str
        What the model's own choice was compared with.
    """

    option: str
    tried: tuple[str, ...]


def tune_slices(
    model: Model,
    target: Target,
    *,
    threads: int,
    budget_s: float,
    database: Database,
    compact: bool,
    progress: Progress,
) -> SliceResult | None:
    """Compare ways to cut the batch of a model, and note the best one.

    Parameters
    ----------
    model : Model
        Operators, as `hone.assembling.assemble` takes it.
    target : Target
        A processor whose code runs on this machine.
    threads : int
        Threads of one run.
    budget_s : float
        Seconds. A further way is tried while the mean time of those before is left.
    database : Database
        Where what is found is kept; what was compared before is not compared again.
    compact : bool
        As in `hone.assembling.assemble`.
    progress : Progress
        Told what was faster.

    Returns
    -------
    SliceResult or None
        None where there is nothing to choose, or no time to try it.
    """
    found = options_of(model.module, target, threads=threads)
    if found is None:
        return None
    point, (first, *others) = found
    known = database.tried_lowerings().get(point, set())
    best = database.lowerings().get(point, first)
    untried = [name for name in others[:ALTERNATIVES] if name not in known]
    inputs = random_inputs(model, 0)

    def contender(option: str) -> InProcess:
        slicing = slice_batch(model.module, target, threads=threads, decided={point: option})
        assembled = assemble(
            model, target=target, threads=threads, compact=compact, slicing=slicing
        )
        return InProcess(load(assembled.package).prepare(inputs))

    started = time.monotonic()
    tried: list[str] = []
    kept: InProcess | None = None
    with progress.task("slices of the batch", total=len(untried)) as bar:
        for option in untried:
            elapsed_s = time.monotonic() - started
            if elapsed_s / (len(tried) + 1) > budget_s - elapsed_s:
                break
            kept = contender(best) if kept is None else kept
            other = contender(option)
            measured = measure({best: kept, option: other}, ROUNDS)
            speedup = measured.speedup(option, over=best)
            tried.append(option)
            bar.update(len(tried))
            if speedup.outcome is Outcome.FASTER:
                progress.log(f"batch: {_named(option)} are {speedup.ratio:.2f} times as fast")
                best, kept = option, other
    if not tried:
        return None
    with database.writing():
        database.add_lowering(point, "" if best == first else best, tried=tried)
    return SliceResult(option=best, tried=tuple(tried))


def _named(option: str) -> str:
    return "kernels that all threads share" if option == "whole" else f"slices of {option}"
