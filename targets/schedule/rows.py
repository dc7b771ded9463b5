"""Schedules of softmax, normalizations and reductions: one task holds all that a row needs.

A function fits when all its blocks share the leading axes of the output. With ``row_...`` blocks
(see ``passes/lower/reductions``) a task is a row: partial results run along it in vectors, and its
temporaries never leave the core's cache. With ``col_...`` blocks, the contiguous axis is kept: a
task is a strip of whole vectors of it. Loops whose extent no vector divides stay plain: LLVM
vectorizes them, their remainder included, better than a guarded vector loop.
"""

from __future__ import annotations

import math

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from .blocks import (
    MIN_PARALLEL_CYCLES,
    REDUCE,
    SPATIAL,
    DoesNotFitError,
    cycles,
    extents,
    fuse_contiguous,
    inline_elementwise,
    is_reduction,
    kinds,
    leaves,
    name_of,
    only_output,
    vector_length,
)
from .machine import Machine

# Vectors that one strip of a column reduction holds, so that several sums are in flight and whole
# cache lines are read.
STRIP_VECTORS = (4, 2, 1)


def _pinned(name: str) -> bool:
    return name.startswith(("row_", "col_"))


def _others(schedule: s_tir.Schedule, output: SBlockRV) -> list[SBlockRV]:
    result = name_of(schedule, output)
    return [block for block in leaves(schedule) if name_of(schedule, block) != result]


def _volume(schedule: s_tir.Schedule, block: SBlockRV) -> int:
    return math.prod(extents(schedule, block))


def _move(schedule: s_tir.Schedule, output: SBlockRV, task: LoopRV, tasks: int) -> None:
    """Compute all other blocks inside a task; together the tasks must compute nothing twice."""
    for block in reversed(_others(schedule, output)):
        volume = _volume(schedule, block)
        schedule.compute_at(block, task, preserve_unit_loops=True)
        inside = math.prod(extents(schedule, block)[1:])
        if tasks * inside > volume:
            raise DoesNotFitError(
                f"{name_of(schedule, block)} would be computed again for each task"
            )


def _fuse_leading(schedule: s_tir.Schedule, output: SBlockRV, leading: list[int]) -> LoopRV:
    """Fuse the output's first loops, as many as the leading axes need; loops that run once ignored.

    The last leading axis may be a part of an axis of the output (the groups of its channels).
    """
    loops = list(schedule.get_loops(output))
    sizes = extents(schedule, output)
    wanted = list(leading)
    for position, size in enumerate(sizes):
        if size == 1:
            continue
        first = wanted.pop(0)
        if not wanted and size != first and size % first == 0:
            loops[position] = schedule.split(loops[position], [first, None])[0]
        elif size != first:
            break
        if not wanted:
            return schedule.fuse(*loops[: position + 1])
    raise DoesNotFitError("the output does not begin with the axes that are kept")


def vectorize_contiguous(
    schedule: s_tir.Schedule, machine: Machine, block: SBlockRV, *, outer_loops: int
) -> None:
    """Vectorize the contiguous axis of a block; reductions keep it inside the reduced axes."""
    loops = list(schedule.get_loops(block))[outer_loops:]
    if not loops:
        return
    axis_kinds = kinds(schedule, block)[-len(loops) :]
    spatial = [loop for loop, kind in zip(loops, axis_kinds, strict=True) if kind == SPATIAL]
    reduced = [loop for loop, kind in zip(loops, axis_kinds, strict=True) if kind == REDUCE]
    if not reduced:
        spatial = fuse_contiguous(schedule, block, spatial)
    lanes = vector_length(int(schedule.get(spatial[-1]).extent), machine.lanes) if spatial else 1
    lane = None
    if lanes >= min(machine.lanes, 4) or (reduced and lanes > 1):
        chain, lane = schedule.split(spatial[-1], [None, lanes])
        if reduced:
            schedule.reorder(*spatial[:-1], *reduced, chain, lane)
            if int(schedule.get(chain).extent) <= max(STRIP_VECTORS):
                schedule.unroll(chain)
        schedule.vectorize(lane)
    elif reduced and spatial:
        schedule.reorder(*spatial[:-1], *reduced, spatial[-1])
    if reduced:
        start = schedule.decompose_reduction(block, reduced[0])
        if lane is not None:
            schedule.vectorize(schedule.get_loops(start)[-1])


def schedule_rows(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule a function whose reductions run along rows.

    Raises
    ------
    DoesNotFitError
        The output does not begin with the axes that the reductions keep.
    """
    inline_elementwise(schedule, pinned=_pinned)
    blocks = leaves(schedule)
    output = only_output(schedule)
    totals = [b for b in blocks if name_of(schedule, b).startswith("row_total")]
    shapes = {tuple(int(e) for e in schedule.get(b).writes[0].source.shape) for b in totals}
    if len(shapes) != 1:
        raise DoesNotFitError("the reductions of the function keep different axes")
    shape = shapes.pop()
    units = len(shape)
    leading = [extent for extent in shape if extent > 1]
    if not leading:
        for block in blocks:
            vectorize_contiguous(schedule, machine, block, outer_loops=_unit_loops(schedule, block))
        return
    work = sum(cycles(schedule, block, machine.lanes) for block in blocks)
    row = _fuse_leading(schedule, output, leading)
    _move(schedule, output, row, math.prod(leading))
    if work >= MIN_PARALLEL_CYCLES:
        schedule.parallel(row)
    for block in _others(schedule, output):
        vectorize_contiguous(schedule, machine, block, outer_loops=1 + units)
    vectorize_contiguous(schedule, machine, output, outer_loops=1)


def _unit_loops(schedule: s_tir.Schedule, block: SBlockRV) -> int:
    """Return how many outer loops of a block run once."""
    sizes = extents(schedule, block)
    return next((i for i, size in enumerate(sizes) if size > 1), len(sizes))


def _lead_of(schedule: s_tir.Schedule, block: SBlockRV) -> int:
    """Return how many axes of what a reduction reads come before the first that is reduced."""
    statement = schedule.get(block)
    reduced = [v.var for v in statement.iter_vars if int(v.iter_type) == REDUCE]
    for region in statement.reads:
        for position, axis in enumerate(region.region):
            if any(axis.min.same_as(variable) for variable in reduced):
                return position
    raise DoesNotFitError("the reduced axis is not an axis of the input")


def schedule_columns(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule a function whose reductions keep the contiguous axis.

    Raises
    ------
    DoesNotFitError
        The function's blocks do not share their leading axes and the last one.
    """
    inline_elementwise(schedule, pinned=_pinned)
    output = only_output(schedule)
    if is_reduction(schedule, output):
        output = schedule.cache_write(output, 0, "global")
    blocks = leaves(schedule)
    reductions = [b for b in blocks if is_reduction(schedule, b)]
    leads = {_lead_of(schedule, block) for block in reductions}
    widths = {int(schedule.get(b).writes[0].source.shape[-1]) for b in reductions}
    loops = list(schedule.get_loops(output))
    sizes = extents(schedule, output)
    if len(leads) != 1 or widths != {sizes[-1]}:
        raise DoesNotFitError("the reductions of the function keep different axes")
    lead = leads.pop()
    work = sum(cycles(schedule, block, machine.lanes) for block in blocks)
    lanes = vector_length(sizes[-1], machine.lanes)
    strips = 1
    if lanes >= min(machine.lanes, 4):
        outer = math.prod(sizes[:lead])
        vectors = next(
            v
            for v in STRIP_VECTORS
            if (sizes[-1] // lanes) % v == 0
            and (v == 1 or outer * sizes[-1] // (lanes * v) >= machine.threads)
        )
        strips = sizes[-1] // (lanes * vectors)
    strip, inside = schedule.split(loops[-1], [strips, None])
    schedule.reorder(*loops[:lead], strip, *loops[lead:-1], inside)
    task = schedule.fuse(*loops[:lead], strip)
    tasks = math.prod(sizes[:lead]) * strips
    _move(schedule, output, task, tasks)
    if work >= MIN_PARALLEL_CYCLES:
        schedule.parallel(task)
    for block in leaves(schedule):
        vectorize_contiguous(schedule, machine, block, outer_loops=1)
