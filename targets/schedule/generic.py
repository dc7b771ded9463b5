"""Schedules for functions without a template: elementwise chains, copies, any other reduction.

Elementwise blocks whose accesses all run through memory as one are one long loop, whatever their
extents; outer loops run in parallel where the work pays, a copy's by whole rows. Innermost loops
are vectors where they divide, else they stay plain, which LLVM vectorizes with their remainder. A
copy that transposes goes tile by tile. Reductions are decomposed, over whole vectors where their
contiguous axis is kept.
"""

from __future__ import annotations

import math
import operator

from tvm import s_tir, tirx
from tvm.ir.expr import TensorLoad
from tvm.s_tir.schedule import LoopRV, SBlockRV

from .blocks import (
    MIN_PARALLEL_CYCLES,
    REDUCE,
    SPATIAL,
    cycles,
    extents,
    fuse_contiguous,
    inline_elementwise,
    is_reduction,
    kinds,
    leaves,
    vector_length,
)
from .machine import Machine

# Elements of a side of a tile of a transposition: a cache line of float32.
TILE = 16
# With so many rows, a copy's tasks are whole ones: where a row lies is computed once for each.
ROWS_PER_THREAD = 4
# The fewest elements of the innermost loop of one task of a long flat loop.
MIN_CHUNK = 256


def _parallelize(schedule: s_tir.Schedule, loops: list[LoopRV], work: int) -> None:
    if loops and work >= MIN_PARALLEL_CYCLES:
        schedule.parallel(schedule.fuse(*loops) if len(loops) > 1 else loops[0])


def _value(expression: tirx.Expr, values: dict[str, int]) -> int | None:
    """Return the value of an index at a point, None where it takes more than arithmetic."""
    if isinstance(expression, tirx.IntImm):
        return int(expression)
    if isinstance(expression, tirx.Var):
        return values.get(expression.name)
    for kind, operation in (
        (tirx.Add, operator.add),
        (tirx.Sub, operator.sub),
        (tirx.Mul, operator.mul),
        (tirx.FloorDiv, operator.floordiv),
        (tirx.FloorMod, operator.mod),
    ):
        if isinstance(expression, kind):
            left, right = _value(expression.a, values), _value(expression.b, values)
            return None if left is None or right is None else int(operation(left, right))
    return None


def _step(
    indices: list[tirx.Expr], shape: list[int], variables: list[str], axis: int
) -> int | None:
    """Return by how many elements an access moves at the first step of an axis."""
    offsets = []
    for at in (0, 1):
        point = dict.fromkeys(variables, 0) | {variables[axis]: at}
        offset = 0
        for index, extent in zip(indices, shape, strict=True):
            value = _value(index, point)
            if value is None:
                return None
            offset = offset * extent + value
        offsets.append(offset)
    return offsets[1] - offsets[0]


def _transposed_axis(schedule: s_tir.Schedule, block: SBlockRV) -> int | None:
    """Return the output axis that runs along memory where the block reads it; None for the last.

    Only for an input of as many elements as the output: a broadcast costs no cache lines.
    """
    statement = schedule.get(block)
    sizes = [int(axis.dom.extent) for axis in statement.iter_vars]
    names = [axis.var.name for axis in statement.iter_vars]
    for read in statement.reads:
        shape = [int(extent) for extent in read.source.shape]
        if math.prod(shape) < math.prod(sizes) or not shape:
            continue
        indices = [region.min for region in read.region]
        if _step(indices, shape, names, len(sizes) - 1) in (0, 1, None):
            continue
        for axis in range(len(sizes) - 1):
            if sizes[axis] > 1 and _step(indices, shape, names, axis) == 1:
                return axis
    return None


def _is_copy(schedule: s_tir.Schedule, block: SBlockRV) -> bool:
    body = schedule.get(block).body
    return isinstance(body, tirx.BufferStore) and isinstance(body.value, TensorLoad)


def _tile(
    schedule: s_tir.Schedule, machine: Machine, loops: list[LoopRV], axis: int
) -> list[LoopRV]:
    """Tile a transposition: both lines of a tile stay in the cache. Returns the outer loops."""
    sides = []
    for loop in (loops[axis], loops[-1]):
        extent = int(schedule.get(loop).extent)
        side = max(d for d in range(1, TILE + 1) if extent % d == 0)
        sides.append(schedule.split(loop, [None, side]))
    (read_outer, read_inner), (write_outer, write_inner) = sides
    outer = [*loops[:axis], read_outer, *loops[axis + 1 : -1], write_outer]
    schedule.reorder(*outer, read_inner, write_inner)
    if int(schedule.get(write_inner).extent) in (machine.lanes // 2, machine.lanes, TILE):
        schedule.vectorize(write_inner)
    return outer


def schedule_elementwise_block(schedule: s_tir.Schedule, machine: Machine, block: SBlockRV) -> None:
    """Schedule one elementwise block. See the module."""
    loops = list(schedule.get_loops(block))
    if not loops:
        return
    simple = isinstance(schedule.get(block).body, tirx.BufferStore)
    lanes = machine.lanes
    axis = _transposed_axis(schedule, block) if simple else None
    # What is gathered or scattered takes a step for each element.
    work = cycles(schedule, block, 1 if axis is not None else lanes) if simple else 0
    if axis is not None:
        _parallelize(schedule, _tile(schedule, machine, loops, axis), work)
        return
    loops = [loop for loop in loops if int(schedule.get(loop).extent) > 1] or loops[-1:]
    if simple and len(loops) == len(schedule.get_loops(block)):
        loops = fuse_contiguous(schedule, block, loops)
    *outer, last = loops
    extent = int(schedule.get(last).extent)
    lanes = vector_length(extent, lanes)
    if lanes >= min(machine.lanes, 4):
        rest, lane = schedule.split(last, [None, lanes])
        schedule.vectorize(lane)
        rows = math.prod(int(schedule.get(loop).extent) for loop in outer)
        if not (_is_copy(schedule, block) and rows >= ROWS_PER_THREAD * machine.threads):
            outer.append(rest)
    elif not outer and work >= MIN_PARALLEL_CYCLES:
        # One long loop that no vector divides: tasks by a divisor, or else with a guard.
        parts = next(
            (d for d in range(machine.threads, 16 * machine.threads) if extent % d == 0),
            machine.threads,
        )
        outer = [schedule.split(last, [parts, None])[0]]
    _parallelize(schedule, outer, work)


def _last_axis_is_reduced(schedule: s_tir.Schedule, block: SBlockRV) -> bool:
    """Say whether the input's contiguous axis is one that is reduced."""
    statement = schedule.get(block)
    reduced = [v.var for v in statement.iter_vars if int(v.iter_type) == REDUCE]
    for region in statement.reads:
        if region.region and any(region.region[-1].min.same_as(var) for var in reduced):
            return True
    return False


def schedule_reduction_block(schedule: s_tir.Schedule, machine: Machine, block: SBlockRV) -> None:
    """Decompose a reduction; parallelize its outer loops; vectorize the axis that it keeps."""
    loops = list(schedule.get_loops(block))
    steps = math.prod(extents(schedule, block))
    axis_kinds = kinds(schedule, block)
    spatial = [loop for loop, kind in zip(loops, axis_kinds, strict=True) if kind == SPATIAL]
    reduced = [loop for loop, kind in zip(loops, axis_kinds, strict=True) if kind == REDUCE]
    if not spatial:
        return
    lanes = 1
    if not _last_axis_is_reduced(schedule, block):
        lanes = vector_length(int(schedule.get(spatial[-1]).extent), machine.lanes)
    outer, lane = schedule.split(spatial[-1], [None, lanes])
    outside = [*spatial[:-1], outer]
    schedule.reorder(*outside, *reduced, lane)
    if lanes > 1:
        schedule.vectorize(lane)
    _parallelize(schedule, outside, steps // lanes)
    zeros = schedule.decompose_reduction(block, reduced[0])
    if lanes > 1:
        schedule.vectorize(schedule.get_loops(zeros)[-1])


def schedule_generic(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule a function of any shape, block by block. See the module's rule."""
    inline_elementwise(schedule, pinned=lambda _: False)
    for block in leaves(schedule):
        if is_reduction(schedule, block):
            schedule_reduction_block(schedule, machine, block)
        else:
            schedule_elementwise_block(schedule, machine, block)
