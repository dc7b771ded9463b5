"""Schedules of convolutions and matrix products with packed weights.

The loops of a convolution become::

    parallel(batch, row parts, channel parts) > channel tiles > row tiles > column tiles
        > taps > input channels > {rows, columns, vectors unrolled} > lanes vectorized

The epilogue (bias, residual, activation) is computed where a register tile is finished, so that
it stores straight from the accumulators.
"""

from __future__ import annotations

import math

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from .blocks import (
    MIN_PARALLEL_MULTIPLY_ADDS,
    extents,
    finish_output,
    item_bytes,
    name_of,
    output_block,
    parallelize,
    prefetch_ahead,
    prefetch_epilogue,
    prefetch_tile,
    read_shape,
    start_sums,
    vector_length,
)
from .machine import Machine, choose_tasks, divisors, prefetch_distance, unroll_depth
from .tile_model import choose_pixels
from .weight_chunks import CHUNK, WHOLE, pick_chunk

# Below this many input channels the channel loop is unrolled too: the loop would cost more
# than its body (the first convolution of an image network).
UNROLLED_DEPTH = 4
# Ends the name of a padded copy whose rows stay plain loops: partitioning frees them of their
# bounds, which a vector would test for each lane, and LLVM makes vectors of them.
PLAIN_ROWS = "_rows"
# Parts that tuning may cut the rows of one product of two activations into.
MOST_PARTS = 8


def split_sum(
    schedule: s_tir.Schedule, machine: Machine, loop: LoopRV, depth: int, *, whole: bool = False
) -> tuple[LoopRV, tuple[LoopRV, ...]]:
    """Return a loop over ``depth`` summed channels, and the steps of one turn to be unrolled.

    No steps where one turn is one channel, or ``whole``: the loop itself will be unrolled.
    """
    count = 1 if whole else unroll_depth(machine, depth)
    if count == 1:
        return loop, ()
    outer, inner = schedule.split(loop, [None, count])
    return outer, (inner,)


def schedule_conv2d(
    schedule: s_tir.Schedule,
    machine: Machine,
    anchor: SBlockRV,
    padding: SBlockRV | None,
    blocks: list[SBlockRV],
) -> None:
    """Schedule a convolution over NHWC with weights ``[K / tk, R, S, C, tk]``.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Decides tiles and tasks.
    anchor : SBlockRV
        The sum, with loops ``n, h, w, k, r, s, c``.
    padding : SBlockRV or None
        The stage that pads the input; computed for each parallel task.
    blocks : list of SBlockRV
        All blocks of the function in order.
    """
    output = output_block(schedule, anchor, blocks)
    n, h, w, k, r, _s, c = schedule.get_loops(anchor)
    batch, height, width, channels, taps_h, taps_w, depth = extents(schedule, anchor)
    tile_channels = read_shape(schedule, anchor, 1)[-1]
    lanes = vector_length(tile_channels, machine.lanes)
    vectors = tile_channels // lanes
    rows, columns = choose_pixels(
        machine,
        height=height,
        width=width,
        channels=channels,
        depth=depth,
        taps=taps_h * taps_w,
        vectors=vectors,
    )
    h_outer, h_inner = schedule.split(h, [None, rows])
    w_outer, w_inner = schedule.split(w, [None, columns])
    k_outer, k_vector, k_lane = schedule.split(k, [None, vectors, lanes])
    itemsize = item_bytes(schedule, anchor, 1)
    weight_bytes = math.prod(read_shape(schedule, anchor, 1)) * itemsize
    input_bytes = math.prod(read_shape(schedule, anchor, 0)) * 4
    row_parts, channel_parts = choose_tasks(
        machine,
        batch=batch,
        row_tiles=height // rows,
        channel_tiles=channels // tile_channels,
        weight_bytes=weight_bytes,
        input_bytes=input_bytes,
        row_bytes=rows * input_bytes // height,
    )
    h_part, h_block = schedule.split(h_outer, [row_parts, None])
    k_part, k_block = schedule.split(k_outer, [channel_parts, None])
    # Each thread gets one contiguous range of tasks, so the order of tasks is the partition.
    order = (n, k_part, h_part) if weight_bytes > input_bytes else (n, h_part, k_part)
    # Either a tile of weights stays in L1 while rows pass, or a row while tiles of weights do.
    inside = machine.pick("inner", {"rows": (k_block, h_block), "weights": (h_block, k_block)})
    passes = height // rows // row_parts * (width // columns)
    chunk = pick_chunk(
        machine,
        int(schedule.get(anchor).annotations.get(CHUNK, WHOLE)),
        sums=rows * columns * vectors,
        vectors=vectors,
        passes=passes,
        taps=taps_h * taps_w,
        depth=depth,
        weight_bytes=weight_bytes,
    )
    outer: tuple[LoopRV, ...] = (*inside, w_outer, r, _s)
    # The loop that holds a finished register tile; in chunks, all those of a tile of weights.
    finished = w_outer
    if chunk != WHOLE:
        chunks, c = schedule.split(c, [None, chunk])
        outer, finished = (k_block, r, _s, chunks, h_block, w_outer), k_block
    c, steps = split_sum(schedule, machine, c, chunk or depth, whole=depth <= UNROLLED_DEPTH)
    schedule.reorder(*order, *outer, c, *steps, h_inner, w_inner, k_vector, k_lane)
    tasks = schedule.fuse(*order)
    schedule.reverse_compute_at(output, finished, preserve_unit_loops=True)
    if padding is not None:
        schedule.compute_at(padding, tasks, preserve_unit_loops=True)
        last = schedule.get_loops(padding)[-1]
        pad_lanes = vector_length(int(schedule.get(last).extent), machine.lanes)
        if pad_lanes > 1 and not name_of(schedule, padding).endswith(PLAIN_ROWS):
            schedule.vectorize(schedule.split(last, [None, pad_lanes])[1])
    work = batch * height * width * channels * taps_h * taps_w * depth
    parallelize(schedule, tasks, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    schedule.vectorize(k_lane)
    for loop in (*steps, h_inner, w_inner, k_vector):
        schedule.unroll(loop)
    if depth <= UNROLLED_DEPTH:
        schedule.unroll(c)
    elif taps_h * taps_w == 1 and chunk == WHOLE:
        prefetch_epilogue(
            schedule,
            output,
            c,
            pixels=rows * columns,
            channels=tile_channels,
            l2_bytes=machine.l2_bytes,
        )
    distance = prefetch_distance(
        machine, rows=batch * height * width, weight_bytes=weight_bytes, itemsize=itemsize
    )
    if chunk == WHOLE:
        prefetch_ahead(schedule, c, distance)
    elif distance:
        elements = tile_channels * chunk
        prefetch_tile(schedule, c, elements=elements, passes=passes, l1_bytes=machine.l1_bytes)
    start_sums(schedule, anchor, r, outer_loops=4)
    finish_output(schedule, output, outer_loops=4, lanes=machine.lanes)


def schedule_dense(
    schedule: s_tir.Schedule,
    machine: Machine,
    anchor: SBlockRV,
    blocks: list[SBlockRV],
) -> None:
    """Schedule ``[..., M, C] x packed [K / tk, C, tk]``; loops ``..., m, k, c``."""
    output = output_block(schedule, anchor, blocks)
    *outer, m, k, c = schedule.get_loops(anchor)
    *batch, rows, channels, depth = extents(schedule, anchor)
    tile_channels = read_shape(schedule, anchor, 1)[-1]
    lanes = vector_length(tile_channels, machine.lanes)
    vectors = tile_channels // lanes
    _, tile_rows = choose_pixels(
        machine, height=1, width=rows, channels=channels, depth=depth, taps=1, vectors=vectors
    )
    m_outer, m_inner = schedule.split(m, [None, tile_rows])
    k_outer, k_vector, k_lane = schedule.split(k, [None, vectors, lanes])
    itemsize = item_bytes(schedule, anchor, 1)
    weight_bytes = channels * depth * itemsize
    input_bytes = math.prod(batch) * rows * depth * 4
    row_parts, channel_parts = choose_tasks(
        machine,
        batch=math.prod(batch),
        row_tiles=rows // tile_rows,
        channel_tiles=channels // tile_channels,
        weight_bytes=weight_bytes,
        input_bytes=input_bytes,
        row_bytes=tile_rows * depth * 4,
    )
    m_part, m_block = schedule.split(m_outer, [row_parts, None])
    k_part, k_block = schedule.split(k_outer, [channel_parts, None])
    order = (k_part, m_part) if weight_bytes > input_bytes else (m_part, k_part)
    inside = machine.pick("inner", {"rows": (k_block, m_block), "weights": (m_block, k_block)})
    c, steps = split_sum(schedule, machine, c, depth)
    schedule.reorder(*outer, *order, *inside, c, *steps, m_inner, k_vector, k_lane)
    tasks = schedule.fuse(*outer, *order)
    schedule.reverse_compute_at(output, inside[1], preserve_unit_loops=True)
    work = math.prod(batch) * rows * channels * depth
    parallelize(schedule, tasks, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    schedule.vectorize(k_lane)
    for loop in (*steps, m_inner, k_vector):
        schedule.unroll(loop)
    prefetch_epilogue(
        schedule,
        output,
        c,
        pixels=tile_rows,
        channels=tile_channels,
        l2_bytes=machine.l2_bytes,
    )
    prefetch_ahead(
        schedule,
        c,
        prefetch_distance(
            machine, rows=math.prod(batch) * rows, weight_bytes=weight_bytes, itemsize=itemsize
        ),
    )
    start_sums(schedule, anchor, c, outer_loops=3)
    finish_output(schedule, output, outer_loops=3, lanes=machine.lanes)


def schedule_batch_matmul(
    schedule: s_tir.Schedule,
    machine: Machine,
    anchor: SBlockRV,
    padding: SBlockRV | None,
    blocks: list[SBlockRV],
) -> None:
    """Schedule ``[..., M, C] x [..., C, K]`` of two activations; loops ``..., m, k, c``.

    The right matrix is read as it lies, or from its padded copy, which each matrix of the batch
    makes once: a vector of ``k`` is contiguous.
    """
    output = output_block(schedule, anchor, blocks)
    *outer, m, k, c = schedule.get_loops(anchor)
    *batch, rows, channels, depth = extents(schedule, anchor)
    lanes = vector_length(channels, machine.lanes)
    most = max(machine.accumulators // 4, 1)
    fitting = [v for v in range(most, 0, -1) if (channels // lanes) % v == 0]
    vectors = machine.pick("vectors", {str(v): v for v in fitting})
    _, tile_rows = choose_pixels(
        machine, height=1, width=rows, channels=channels, depth=depth, taps=1, vectors=vectors
    )
    m_outer, m_inner = schedule.split(m, [None, tile_rows])
    k_outer, k_vector, k_lane = schedule.split(k, [None, vectors, lanes])
    # With fewer matrices than threads, the rows of one are shared out too.
    parts = 1
    if math.prod(batch) % machine.threads:
        parts = math.gcd(rows // tile_rows, machine.threads)
    others = [d for d in divisors(rows // tile_rows) if d <= MOST_PARTS]
    parts = machine.pick("parts", {str(d): d for d in dict.fromkeys((parts, *others))})
    m_part, m_block = schedule.split(m_outer, [parts, None])
    c, steps = split_sum(schedule, machine, c, depth)
    inside = machine.pick("inner", {"rows": (k_outer, m_block), "weights": (m_block, k_outer)})
    schedule.reorder(*outer, m_part, *inside, c, *steps, m_inner, k_vector, k_lane)
    tasks = schedule.fuse(*outer, m_part)
    schedule.reverse_compute_at(output, inside[1], preserve_unit_loops=True)
    if padding is not None:
        schedule.compute_at(padding, tasks, preserve_unit_loops=True)
    work = math.prod(batch) * rows * channels * depth
    parallelize(schedule, tasks, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    schedule.vectorize(k_lane)
    for loop in (*steps, m_inner, k_vector):
        schedule.unroll(loop)
    start_sums(schedule, anchor, c, outer_loops=3)
    finish_output(schedule, output, outer_loops=3, lanes=machine.lanes)
