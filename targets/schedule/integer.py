"""Schedules of integer convolutions and matrix products whose weights are packed in groups.

The loops are those of `contraction`, with one step for a group of input channels instead of one
channel, and the innermost two (lanes, group) given to one tensor intrinsic. A group takes the four
bytes of a float, so the tile model of `machine` holds as it is, with groups for channels.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from hone.targets.dot_intrinsics import LANES, intrinsic_name
from hone.targets.integer_dot import IntegerDot

from .blocks import (
    MIN_PARALLEL_MULTIPLY_ADDS,
    extents,
    finish_output,
    output_block,
    parallelize,
    read_shape,
    start_sums,
    vector_length,
)
from .machine import RESERVED_REGISTERS, Machine, choose_tasks
from .tile_model import Tile, choose_pixels, pick_tile, ranked_tiles

# Up to this many groups their loop is unrolled; beyond, LLVM moves loads so far ahead that sums are
# spilled (6 groups of 28 sums: 204 us instead of 142).
UNROLLED_GROUPS = 4
# One instruction does four times as many products of bytes as of floats.
MIN_PARALLEL_PRODUCTS = 4 * MIN_PARALLEL_MULTIPLY_ADDS
# Registers of the widened form beside those of a float kernel: two halves of a weight vector in
# place of one, two of the levels, and a product that waits for its addition.
WIDENED_REGISTERS = 4
BYTES_PER_LANE = 4
# Loops of a padding stage whose rows are runs of bytes: task, image, row, byte.
JOINED_LOOPS = 4


def _most_sums(machine: Machine, vectors: int) -> int:
    """Return how many accumulators leave room for ``vectors`` of weights and for the levels.

    Unlike a float kernel's, the instruction takes its broadcast operand from a register. One vector
    too many, and a sum goes through memory in every step: 7 x 4 sums took 217 us where 7 x 2 take
    115.
    """
    if machine.integer_dot == IntegerDot.VPMADDWD:
        return max(machine.accumulators - WIDENED_REGISTERS, 4)
    return min(machine.accumulators, machine.accumulators + RESERVED_REGISTERS - vectors - 1)


def choose_dot_tile(machine: Machine, **shape: int) -> Tile:
    """Choose the register tile as `choose_tile` does, within the registers of integer sums."""
    fitting: tuple[Tile, ...] = (Tile(rows=1, columns=1, vectors=1),)
    for most in range(machine.accumulators, 0, -1):
        tiles = ranked_tiles(replace(machine.plain, accumulators=most), **shape)
        if _fits(machine, tiles[0]):
            fitting = tuple(tile for tile in tiles if _fits(machine, tile))
            break
    return pick_tile(machine, fitting, **shape)


def _fits(machine: Machine, tile: Tile) -> bool:
    return tile.rows * tile.columns * tile.vectors <= _most_sums(machine, tile.vectors)


def _choose_pixels(machine: Machine, *, vectors: int, **shape: int) -> tuple[int, int]:
    """Choose rows and columns as `choose_pixels` does, within the registers of integer sums."""
    most = max(_most_sums(machine, vectors), 1)
    return choose_pixels(
        replace(machine, accumulators=most), vectors=vectors, point="pixels", **shape
    )


def _lanes(machine: Machine, dot: IntegerDot, tile_channels: int) -> int:
    """Return the longest vector of the instruction that fits the machine and the weights."""
    return max(n for n in LANES[dot] if n <= max(machine.lanes, 4) and tile_channels % n == 0)


def _dot(machine: Machine) -> IntegerDot:
    if machine.integer_dot is None:
        raise ValueError("this machine has no integer dot product, but its weights are packed so")
    return IntegerDot(machine.integer_dot).vector


def copy_padding(schedule: s_tir.Schedule, machine: Machine, block: SBlockRV, at: LoopRV) -> None:
    """Compute the padded input inside a task: pixels in vectors of bytes, whole rows as copies."""
    schedule.compute_at(block, at, preserve_unit_loops=True)
    if len(extents(schedule, block)) == JOINED_LOOPS:
        return
    last = schedule.get_loops(block)[-1]
    lanes = vector_length(int(schedule.get(last).extent), machine.lanes * BYTES_PER_LANE)
    if lanes > 1:
        schedule.vectorize(schedule.split(last, [None, lanes])[1])


def schedule_dot_conv2d(
    schedule: s_tir.Schedule,
    machine: Machine,
    anchor: SBlockRV,
    padding: SBlockRV | None,
    blocks: list[SBlockRV],
) -> None:
    """Schedule a convolution of levels with weights ``[K / tk, R, S, C / 4, tk, 4]``.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Decides instruction, tiles and tasks.
    anchor : SBlockRV
        The sum, with loops ``n, h, w, k, r, s, group, byte``.
    padding : SBlockRV or None
        The stage that pads the input; computed for each parallel task.
    blocks : list of SBlockRV
        All blocks of the function in order.
    """
    dot = _dot(machine)
    output = output_block(schedule, anchor, blocks)
    n, h, w, k, r, s, group, byte = schedule.get_loops(anchor)
    batch, height, width, channels, taps_h, taps_w, groups, _ = extents(schedule, anchor)
    tile_channels = read_shape(schedule, anchor, 1)[-2]
    lanes = _lanes(machine, dot, tile_channels)
    vectors = tile_channels // lanes
    rows, columns = _choose_pixels(
        machine,
        height=height,
        width=width,
        channels=channels,
        depth=groups,
        taps=taps_h * taps_w,
        vectors=vectors,
    )
    h_outer, h_inner = schedule.split(h, [None, rows])
    w_outer, w_inner = schedule.split(w, [None, columns])
    k_outer, k_vector, k_lane = schedule.split(k, [None, vectors, lanes])
    weight_bytes = math.prod(read_shape(schedule, anchor, 1))
    input_bytes = math.prod(read_shape(schedule, anchor, 0))
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
    order = (n, k_part, h_part) if weight_bytes > input_bytes else (n, h_part, k_part)
    inside = machine.pick("inner", {"rows": (k_block, h_block), "weights": (h_block, k_block)})
    schedule.reorder(
        *order, *inside, w_outer, r, s, group, h_inner, w_inner, k_vector, k_lane, byte
    )
    tasks = schedule.fuse(*order)
    schedule.reverse_compute_at(output, w_outer, preserve_unit_loops=True)
    if padding is not None:
        copy_padding(schedule, machine, padding, tasks)
    work = batch * height * width * channels * taps_h * taps_w * groups
    parallelize(schedule, tasks, work=work, least=MIN_PARALLEL_PRODUCTS)
    for loop in (h_inner, w_inner, k_vector):
        schedule.unroll(loop)
    if groups <= UNROLLED_GROUPS:
        schedule.unroll(group)
    start_sums(schedule, anchor, r, outer_loops=4)
    schedule.tensorize(k_lane, intrinsic_name(dot, lanes))
    finish_output(schedule, output, outer_loops=4, lanes=machine.lanes)


def schedule_dot_dense(
    schedule: s_tir.Schedule,
    machine: Machine,
    anchor: SBlockRV,
    padding: SBlockRV | None,
    blocks: list[SBlockRV],
) -> None:
    """Schedule ``[M, C] x [K / tk, C / 4, tk, 4]``; loops ``m, k, group, byte``."""
    dot = _dot(machine)
    output = output_block(schedule, anchor, blocks)
    m, k, group, byte = schedule.get_loops(anchor)
    rows, channels, groups, _ = extents(schedule, anchor)
    tile_channels = read_shape(schedule, anchor, 1)[-2]
    lanes = _lanes(machine, dot, tile_channels)
    vectors = tile_channels // lanes
    _, tile_rows = _choose_pixels(
        machine,
        height=1,
        width=rows,
        channels=channels,
        depth=groups,
        taps=1,
        vectors=vectors,
    )
    m_outer, m_inner = schedule.split(m, [None, tile_rows])
    k_outer, k_vector, k_lane = schedule.split(k, [None, vectors, lanes])
    weight_bytes = math.prod(read_shape(schedule, anchor, 1))
    input_bytes = math.prod(read_shape(schedule, anchor, 0))
    row_parts, channel_parts = choose_tasks(
        machine,
        batch=1,
        row_tiles=rows // tile_rows,
        channel_tiles=channels // tile_channels,
        weight_bytes=weight_bytes,
        input_bytes=input_bytes,
        row_bytes=tile_rows * input_bytes // rows,
    )
    m_part, m_block = schedule.split(m_outer, [row_parts, None])
    k_part, k_block = schedule.split(k_outer, [channel_parts, None])
    order = (k_part, m_part) if weight_bytes > input_bytes else (m_part, k_part)
    inside = machine.pick("inner", {"rows": (k_block, m_block), "weights": (m_block, k_block)})
    schedule.reorder(*order, *inside, group, m_inner, k_vector, k_lane, byte)
    tasks = schedule.fuse(*order)
    schedule.reverse_compute_at(output, inside[1], preserve_unit_loops=True)
    if padding is not None:
        copy_padding(schedule, machine, padding, tasks)
    work = rows * channels * groups
    parallelize(schedule, tasks, work=work, least=MIN_PARALLEL_PRODUCTS)
    for loop in (m_inner, k_vector):
        schedule.unroll(loop)
    start_sums(schedule, anchor, group, outer_loops=3)
    schedule.tensorize(k_lane, intrinsic_name(dot, lanes))
    finish_output(schedule, output, outer_loops=3, lanes=machine.lanes)
