"""Candidates from hone's own templates: the same schedule, decided for slightly different machines.

The untuned path asks an analytic model for one tile; here the model is asked again with fewer
registers, narrower vectors, other caches and thread counts, and every distinct answer is measured.
A handful of candidates that are all near the best one, before the general search begins.
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

LEAST_ACCUMULATORS = 4
ACCUMULATOR_STEP = 4
CACHE_FACTORS = (1.0, 8.0, 0.125)
"""Steps that gave every distinct schedule of the reference networks' kernels (2 to 12 each)."""


def machines(base: Machine) -> Iterator[Machine]:
    """Yield machines like the given one, itself first.

    Parameters
    ----------
    base : Machine
        The real one.
    """
    for threads in dict.fromkeys((base.threads, 1, 2 * base.threads)):
        for lanes in dict.fromkeys((base.lanes, max(base.lanes // 2, 1))):
            for factor in CACHE_FACTORS:
                for sums in range(base.accumulators, LEAST_ACCUMULATORS - 1, -ACCUMULATOR_STEP):
                    yield replace(
                        base,
                        threads=threads,
                        lanes=lanes,
                        accumulators=sums,
                        l2_bytes=max(int(base.l2_bytes * factor), 1),
                    )


def template_candidates(workload: tvm.IRModule, base: Machine) -> list[ms.MeasureCandidate]:
    """Return the distinct schedules that a kernel's template gives.

    Parameters
    ----------
    workload : IRModule
        One unscheduled function ``main``.
    base : Machine
        The real machine.

    Returns
    -------
    list of MeasureCandidate
        The analytic model's own choice first: its record says that the kernel was tried, even
        where nothing else can be.
    """
    arguments = ms.arg_info.ArgInfo.from_entry_func(workload)
    distinct: dict[int, s_tir.Schedule] = {}
    for machine in machines(base):
        schedule, _, _ = trace(workload["main"], machine)
        if schedule is None:
            continue
        distinct.setdefault(tvm_ffi.structural_hash(schedule.mod), schedule)
    return [ms.MeasureCandidate(schedule, arguments) for schedule in distinct.values()]
