"""Schedules of matrix products whose weights are packed levels of few bits.

The loops are those of `contraction.schedule_dense` with the sum cut into words: one load brings the
levels of several steps, which are unrolled and take their level out of it by shifts. Where groups
are scaled at their end, the sums of a group live in registers beside the totals::

    parallel(channel parts, row parts) > channel tiles > row tiles
        > groups > words > {levels, rows, vectors unrolled} > lanes vectorized
"""

from __future__ import annotations

import math

from tvm import DataType, s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from .blocks import (
    MIN_PARALLEL_MULTIPLY_ADDS,
    extents,
    finish_output,
    leaves,
    name_of,
    output_block,
    parallelize,
    start_sums,
    vector_length,
)
from .machine import Machine, choose_tasks
from .tile_model import choose_pixels

# Multiply-adds in the unrolled body of one word; beyond, LLVM moves loads far ahead, and spills.
UNROLLED_BODY = 256


# Sums of activations, in the order in which they depend on each other, last first.
CORRECTIONS = ("wonly_total", "wonly_offset", "wonly_fields")


def schedule_weight_only_dense(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule ``[M, C] x packed [K / tk, words, tk]``.

    Parameters
    ----------
    schedule : Schedule
        Changed in place. Its sum is ``wonly_acc`` with loops ``m, k, c``; or ``wgroup_acc`` over
        groups, ``m, k, g``, of ``wgroup_part``, the sum of one, ``m, k, g, c``. ``wonly_pad``, and
        what corrects the sums, are computed by each task.
    machine : Machine
        Decides tiles and tasks.
    """
    blocks = leaves(schedule)
    by_name = {name_of(schedule, block): block for block in blocks}
    part, padding = by_name.get("wgroup_part"), by_name.get("wonly_pad")
    anchor = by_name["wonly_acc" if part is None else "wgroup_acc"]
    output = output_block(schedule, anchor, blocks)
    inner = anchor if part is None else part
    m, k, steps = schedule.get_loops(anchor)
    rows, channels, *sums = extents(schedule, inner)
    depth = math.prod(sums)
    weights = schedule.get(inner).reads[1].source
    weight_shape = [int(extent) for extent in weights.shape]
    tile_channels = weight_shape[-1]
    held = depth // weight_shape[-2]
    lanes = vector_length(tile_channels, machine.lanes)
    vectors = tile_channels // lanes
    _, tile_rows = choose_pixels(
        machine, height=1, width=rows, channels=channels, depth=depth, taps=1, vectors=vectors
    )
    m_outer, m_inner = schedule.split(m, [None, tile_rows])
    k_outer, k_vector, k_lane = schedule.split(k, [None, vectors, lanes])
    weight_bytes = math.prod(weight_shape) * DataType(str(weights.dtype)).bits // 8
    input_bytes = rows * depth * 4
    row_parts, channel_parts = choose_tasks(
        machine,
        batch=1,
        row_tiles=rows // tile_rows,
        channel_tiles=channels // tile_channels,
        weight_bytes=weight_bytes,
        input_bytes=input_bytes,
        row_bytes=tile_rows * depth * 4,
    )
    m_part, m_block = schedule.split(m_outer, [row_parts, None])
    k_part, k_block = schedule.split(k_outer, [channel_parts, None])
    order = (k_part, m_part) if weight_bytes > input_bytes else (m_part, k_part)
    body = tile_rows * vectors * held
    if part is None:
        word, level = schedule.split(steps, [None, held])
        schedule.reorder(*order, k_block, m_block, word, level, m_inner, k_vector, k_lane)
        _unroll_level(schedule, level, body)
    else:
        schedule.reorder(*order, k_block, m_block, steps, m_inner, k_vector, k_lane)
    tasks = schedule.fuse(*order)
    schedule.reverse_compute_at(output, m_block, preserve_unit_loops=True)
    parallelize(schedule, tasks, work=rows * channels * depth, least=MIN_PARALLEL_MULTIPLY_ADDS)
    if part is not None:
        _schedule_part(schedule, part, steps, held=held, lanes=lanes, body=body)
    for name in CORRECTIONS:
        if name in by_name:
            schedule.compute_at(by_name[name], tasks, preserve_unit_loops=True)
    if CORRECTIONS[-1] in by_name:
        _schedule_fields(schedule, by_name[CORRECTIONS[-1]])
    if padding is not None:
        schedule.compute_at(padding, tasks, preserve_unit_loops=True)
    schedule.vectorize(k_lane)
    for loop in (m_inner, k_vector):
        schedule.unroll(loop)
    start_sums(schedule, anchor, word if part is None else steps, outer_loops=3)
    finish_output(schedule, output, outer_loops=3, lanes=machine.lanes)


def _schedule_part(
    schedule: s_tir.Schedule,
    part: SBlockRV,
    group: LoopRV,
    *,
    held: int,
    lanes: int,
    body: int,
) -> None:
    """Sum one group of a register tile, inside the loop over groups."""
    schedule.compute_at(part, group, preserve_unit_loops=True)
    *_, m, k, _one, c = schedule.get_loops(part)
    k_vector, k_lane = schedule.split(k, [None, lanes])
    word, level = schedule.split(c, [None, held])
    schedule.reorder(word, level, m, k_vector, k_lane)
    _unroll_level(schedule, level, body)
    schedule.vectorize(k_lane)
    for loop in (m, k_vector):
        schedule.unroll(loop)
    loops = schedule.get_loops(schedule.decompose_reduction(part, word))
    schedule.vectorize(loops[-1])
    for loop in loops[-3:-1]:
        schedule.unroll(loop)


def _schedule_fields(schedule: s_tir.Schedule, block: SBlockRV) -> None:
    """Sum the activations of each field in lanes of one vector."""
    *_, place, word = schedule.get_loops(block)
    schedule.reorder(word, place)
    schedule.vectorize(place)
    schedule.vectorize(schedule.get_loops(schedule.decompose_reduction(block, word))[-1])


def _unroll_level(schedule: s_tir.Schedule, level: LoopRV, body: int) -> None:
    if body <= UNROLLED_BODY:
        schedule.unroll(level)
