"""Candidates from hone's own templates, best first by the model that the untuned path asks once.

The analytic model ranks register tiles and partitions into tasks; the untuned schedule is its first
choice of both. Here the next ones follow, then the same templates decided for slightly different
machines: narrower vectors, fewer accumulators, other caches. A few candidates that are all near
the best one, before the general search begins; each takes some milliseconds to make, so they are
made when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import tvm
import tvm_ffi
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms

from hone.targets.schedule.cpu import trace
from hone.targets.schedule.machine import Machine

RANKS = 4
"""Ranks of tiles and partitions go up to so many together: 15 pairs."""

SERIAL_RANKS = 1
"""Up to this rank a schedule is tried on one thread too: waking the others takes 2 us."""

CACHE_FACTORS = (8.0, 0.125)
"""Steps that gave other schedules of the reference networks' kernels."""


def machines(base: Machine) -> Iterator[Machine]:
    """Yield machines like the given one, itself first.

    Parameters
    ----------
    base : Machine
        The real one.
    """
    for rank in range(RANKS + 1):
        for pixels in range(rank, -1, -1):
            yield replace(base, pixel_rank=pixels, task_rank=rank - pixels)
    narrow = replace(base, lanes=max(base.lanes // 2, 1))
    others = [narrow, replace(base, accumulators=max(base.accumulators // 2, 4))]
    others += [replace(narrow, pixel_rank=1), replace(base, threads=2 * base.threads)]
    for factor in CACHE_FACTORS:
        others.append(replace(base, l2_bytes=max(int(base.l2_bytes * factor), 1)))
        others.append(replace(base, l1_bytes=max(int(base.l1_bytes * factor), 1)))
    yield from (other for other in dict.fromkeys(others) if other != base)


def _serial(schedule: s_tir.Schedule, workload: tvm.IRModule) -> s_tir.Schedule | None:
    """Return a schedule without its parallel loops; None when it has none."""
    steps = schedule.trace.insts
    kept = [step for step in steps if step.kind.name != "Parallel"]
    if len(kept) == len(steps):
        return None
    serial = s_tir.Schedule(workload)
    s_tir.schedule.Trace(kept, schedule.trace.decisions).apply_to_schedule(
        serial, remove_postproc=False
    )
    return serial


def template_candidates(workload: tvm.IRModule, base: Machine) -> Iterator[ms.MeasureCandidate]:
    """Yield the distinct schedules that a kernel's template gives.

    Parameters
    ----------
    workload : IRModule
        One unscheduled function ``main``.
    base : Machine
        The real machine.

    Yields
    ------
    MeasureCandidate
        The analytic model's own choice first: its record says that the kernel was tried, even
        where nothing else can be.
    """
    arguments = ms.arg_info.ArgInfo.from_entry_func(workload)
    seen: dict[int, Machine] = {}
    # Ranks beyond the last choice give it again: nothing is to be had from still higher ones.
    last_pixels = last_tasks = RANKS
    for machine in machines(base):
        if machine.pixel_rank > last_pixels or machine.task_rank > last_tasks:
            continue
        schedule, _, _ = trace(workload["main"], machine)
        if schedule is None:
            continue
        key = tvm_ffi.structural_hash(schedule.mod)
        if key in seen:
            if machine == replace(seen[key], pixel_rank=machine.pixel_rank):
                last_pixels = min(last_pixels, machine.pixel_rank)
            if machine == replace(seen[key], task_rank=machine.task_rank):
                last_tasks = min(last_tasks, machine.task_rank)
            continue
        seen[key] = machine
        yield ms.MeasureCandidate(schedule, arguments)
        if machine.pixel_rank + machine.task_rank <= SERIAL_RANKS:
            serial = _serial(schedule, workload)
            if serial is not None:
                seen.setdefault(tvm_ffi.structural_hash(serial.mod), base)
                yield ms.MeasureCandidate(serial, arguments)
