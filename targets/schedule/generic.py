"""Schedules for functions without a template: reductions, elementwise chains, anything else.

The one rule: reductions are decomposed, outer loops are fused and run in parallel, the innermost
contiguous loop is vectorized.
"""

from __future__ import annotations

import math

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from .blocks import (
    MIN_PARALLEL_STEPS,
    REDUCE,
    SPATIAL,
    extents,
    is_reduction,
    kinds,
    leaves,
    vector_length,
)
from .machine import Machine


def _inline_injective(schedule: s_tir.Schedule) -> None:
    """Inline every elementwise block that one other block reads, except outputs."""
    for block in leaves(schedule)[:-1]:
        if is_reduction(schedule, block) or len(schedule.get_consumers(block)) != 1:
            continue
        if schedule.get_output_blocks(schedule.get_sblock("root")) and any(
            schedule.get(block) == schedule.get(output)
            for output in schedule.get_output_blocks(schedule.get_sblock("root"))
        ):
            continue
        producers_reduce = any(is_reduction(schedule, p) for p in schedule.get_producers(block))
        consumer = schedule.get_consumers(block)[0]
        if producers_reduce and is_reduction(schedule, consumer):
            continue
        try:
            schedule.compute_inline(block)
        except s_tir.ScheduleError:
            # Not invertible or a partial write: the block keeps its own loops.
            continue


def _parallelize(schedule: s_tir.Schedule, loops: list[LoopRV], steps: int) -> None:
    if loops and steps >= MIN_PARALLEL_STEPS:
        schedule.parallel(schedule.fuse(*loops) if len(loops) > 1 else loops[0])


def _writes_last_axis_contiguously(schedule: s_tir.Schedule, block: SBlockRV) -> bool:
    region = schedule.get(block).writes[0].region
    if not region:
        return False
    last_spatial = [v for v in schedule.get(block).iter_vars if int(v.iter_type) == SPATIAL]
    return bool(last_spatial) and region[-1].min.same_as(last_spatial[-1].var)


def schedule_elementwise_block(schedule: s_tir.Schedule, machine: Machine, block: SBlockRV) -> None:
    """Parallelize the outer loops of an elementwise block and vectorize its innermost."""
    loops = schedule.get_loops(block)
    if not loops:
        return
    sizes = extents(schedule, block)
    steps = math.prod(sizes)
    lanes = vector_length(sizes[-1], machine.lanes)
    outer = list(loops[:-1])
    rest, inner = loops[-1], None
    if lanes > 1 and _writes_last_axis_contiguously(schedule, block):
        rest, inner = schedule.split(loops[-1], [None, lanes])
    outer.append(rest)
    if inner is not None:
        schedule.vectorize(inner)
        _parallelize(schedule, outer, steps)
    else:
        _parallelize(schedule, outer[:-1] or outer, steps)


def _last_axis_is_reduced(schedule: s_tir.Schedule, block: SBlockRV) -> bool:
    """Say whether the input's contiguous axis is one that is summed over."""
    statement = schedule.get(block)
    reduced = [v.var for v in statement.iter_vars if int(v.iter_type) == REDUCE]
    for region in statement.reads:
        if region.region and any(region.region[-1].min.same_as(var) for var in reduced):
            return True
    return False


def schedule_reduction_block(schedule: s_tir.Schedule, machine: Machine, block: SBlockRV) -> None:
    """Decompose a reduction; parallelize spatial loops; vectorize the contiguous axis.

    Where the contiguous axis is summed, partial sums of ``lanes`` elements are kept in a vector
    (rfactor) and added at the end.
    """
    loops = list(schedule.get_loops(block))
    sizes = extents(schedule, block)
    steps = math.prod(sizes)
    axis_kinds = kinds(schedule, block)
    spatial = [loop for loop, kind in zip(loops, axis_kinds, strict=True) if kind == SPATIAL]
    reduced = [loop for loop, kind in zip(loops, axis_kinds, strict=True) if kind == REDUCE]
    if _last_axis_is_reduced(schedule, block):
        extent = int(schedule.get(reduced[-1]).extent)
        lanes = vector_length(extent, machine.lanes)
        # Without a spatial loop rfactor fails inside TVM; such a sum is short or rare.
        if spatial and lanes > 1 and extent > lanes:
            outer, inner = schedule.split(reduced[-1], [None, lanes])
            partial = schedule.rfactor(inner, factor_axis=len(spatial))
            _schedule_partial_sums(schedule, partial, block, len(spatial), steps)
            return
        schedule.reorder(*spatial, *reduced)
        _parallelize(schedule, spatial, steps)
        schedule.decompose_reduction(block, schedule.get_loops(block)[-len(reduced)])
        return
    if not spatial:
        return
    lanes = vector_length(int(schedule.get(spatial[-1]).extent), machine.lanes)
    outer, lane = schedule.split(spatial[-1], [None, lanes])
    schedule.reorder(*spatial[:-1], outer, *reduced, lane)
    if lanes > 1:
        schedule.vectorize(lane)
    if steps >= MIN_PARALLEL_STEPS:
        schedule.parallel(schedule.fuse(*spatial[:-1], outer))
    first = schedule.get_loops(block)[-len(reduced) - 1]
    zeros = schedule.decompose_reduction(block, first)
    if lanes > 1:
        schedule.vectorize(schedule.get_loops(zeros)[-1])


def _schedule_partial_sums(
    schedule: s_tir.Schedule, partial: SBlockRV, total: SBlockRV, spatial: int, steps: int
) -> None:
    """Schedule the two halves of an rfactored sum, the partial ones inside the total's row."""
    loops = list(schedule.get_loops(total))
    row = None
    if spatial:
        row = schedule.fuse(*loops[:spatial])
        schedule.compute_at(partial, row, preserve_unit_loops=True)
        if steps >= MIN_PARALLEL_STEPS:
            schedule.parallel(row)
    inner = list(schedule.get_loops(partial))[1 if row is not None else 0 :]
    partial_kinds = kinds(schedule, partial)
    reduced = [
        loop
        for loop, kind in zip(inner[-len(partial_kinds) :], partial_kinds, strict=False)
        if kind == REDUCE
    ]
    if not reduced:
        return
    lane = next(
        loop
        for loop, kind in reversed(
            list(zip(inner[-len(partial_kinds) :], partial_kinds, strict=False))
        )
        if kind == SPATIAL
    )
    schedule.reorder(*reduced, lane)
    schedule.vectorize(lane)
    zeros = schedule.decompose_reduction(partial, reduced[0])
    schedule.vectorize(schedule.get_loops(zeros)[-1])
    last = schedule.get_loops(total)[1 if row is not None else 0 :]
    if last:
        schedule.decompose_reduction(total, last[0])


def schedule_generic(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule a function of any shape, block by block. See the module's rule."""
    _inline_injective(schedule)
    for block in leaves(schedule):
        if is_reduction(schedule, block):
            schedule_reduction_block(schedule, machine, block)
        else:
            schedule_elementwise_block(schedule, machine, block)
