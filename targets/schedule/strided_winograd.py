"""Schedule of a 3x3 convolution of stride 2 by its two phases.

A task is a part of the rows of tiles, or a part of the output channels, from input to output: data
that one core made and another reads costs more than making it twice. Inside, the points of the
input first, then tile by tile of output channels nine sums and what is made of them.
"""

from __future__ import annotations

import math

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from .blocks import (
    MIN_PARALLEL_MULTIPLY_ADDS,
    extents,
    leaves,
    name_of,
    output_block,
    parallelize,
    prefetch_ahead,
    read_shape,
    start_sums,
    vector_length,
)
from .contraction import split_sum
from .machine import Machine, prefetch_distance
from .strided_winograd_model import TILE, choose_parts
from .tile_model import choose_pixels

PREFIX = "swino_acc_"
# The order in which the sums read the weights of a tile: nine units of time read one new tap each.
ORDER = (
    "first_first",
    "first_shared",
    "shared_first",
    "shared_shared",
    "first_second",
    "shared_second",
    "second_first",
    "second_shared",
    "second_second",
)
# Sums that request the next tile of weights while they read from the second level: all of its taps
# but the first, in 12 of the 16 units of time in which no tap is new.
REQUESTING = ("first_second", "second_first", "second_second")
# How far ahead of its use the others request a weight, in elements.
AHEAD = 2048
# Elements between the points of neighbouring tiles, which else might share a set of a cache.
GAP = 16


def schedule_strided_winograd(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule the blocks ``swino_rows``, ``swino_in``, nine ``swino_acc`` and the output.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Decides tiles and tasks.
    """
    blocks = leaves(schedule)
    by_name = {name_of(schedule, block): block for block in blocks}
    output = blocks[-1]
    if name_of(schedule, output) != "swino_out":
        schedule.compute_inline(by_name["swino_out"])
        last_sum = next(name for name in reversed(by_name) if name.startswith(PREFIX))
        output = output_block(schedule, by_name[last_sum], leaves(schedule))
    points = by_name["swino_in"]
    _, _, batch, down, across, depth = extents(schedule, points)
    sums = by_name[PREFIX + "shared_shared"]
    weight = read_shape(schedule, sums, 1)
    n, h, w, k = schedule.get_loops(output)
    channels = extents(schedule, output)[-1]
    lanes = vector_length(weight[-1], machine.lanes)
    row_parts, channel_parts = choose_parts(
        machine,
        batch=batch,
        height=extents(schedule, output)[1],
        channel_tiles=channels // weight[-1],
        weight_bytes=math.prod(weight) * 4,
        point_bytes=math.prod(extents(schedule, points)) * 4 // batch,
    )
    h_outer, h_inner = schedule.split(h, [None, TILE])
    w_outer, w_inner = schedule.split(w, [None, TILE])
    h_part, h_block = schedule.split(h_outer, [row_parts, None])
    k_part, k_tile, k_vector, k_lane = schedule.split(
        k, [channel_parts, None, weight[-1] // lanes, lanes]
    )
    order = (n, k_part, h_part)
    body = (h_inner, w_inner, k_vector, k_lane)
    schedule.reorder(*order, k_tile, h_block, w_outer, *body)
    task = schedule.fuse(*order)
    distance = prefetch_distance(
        machine, rows=batch * down * across * TILE**2, weight_bytes=math.prod(weight) * 4
    )
    started = []
    for name in ORDER:
        ahead = math.prod(weight[1:]) if name in REQUESTING else AHEAD
        block = by_name[PREFIX + name]
        start = _schedule_sums(schedule, machine, block, k_tile, ahead=ahead if distance else 0)
        started.append((block, *start))
    _schedule_input(schedule, machine, points, task)
    work = batch * down * across * depth * channels
    # Before the sums are split from their start: a loop that holds both parts is refused.
    parallelize(schedule, task, work=work * len(ORDER), least=MIN_PARALLEL_MULTIPLY_ADDS)
    for block, loop, outer_loops in started:
        start_sums(schedule, block, loop, outer_loops=outer_loops)
    for loop in body[:-1]:
        schedule.unroll(loop)
    schedule.vectorize(k_lane)


def _schedule_sums(
    schedule: s_tir.Schedule, machine: Machine, block: SBlockRV, at: LoopRV, *, ahead: int
) -> tuple[LoopRV, int]:
    """Compute one of the nine sums for the tiles of a task, register tile by register tile.

    Returns the outermost loop over what is summed and the number of loops around it.
    """
    weight = read_shape(schedule, block, 1)
    stored = schedule.cache_write(block, 0, "global")
    schedule.compute_at(stored, at, preserve_unit_loops=True)
    a, b, k = schedule.get_loops(stored)[-3:]
    lanes = vector_length(weight[-1], machine.lanes)
    depth = extents(schedule, block)[-1]
    height, width = (int(schedule.get(loop).extent) for loop in (a, b))
    rows, columns = choose_pixels(
        machine,
        height=height,
        width=width,
        channels=int(schedule.get(k).extent),
        depth=depth,
        taps=1,
        vectors=weight[-1] // lanes,
        # Odd images have fewer sums of partners, in other register tiles.
        point=f"pixels {height}x{width}",
    )
    a_outer, a_inner = schedule.split(a, [None, rows])
    b_outer, b_inner = schedule.split(b, [None, columns])
    k_vector, k_lane = schedule.split(k, [None, lanes])
    schedule.reorder(a_outer, b_outer, a_inner, b_inner, k_vector, k_lane)
    schedule.compute_at(block, b_outer, preserve_unit_loops=True)
    *outer, a_sum, b_sum, k_sum, t, u, c = schedule.get_loops(block)
    chain, lane = schedule.split(k_sum, [None, lanes])
    c, steps = split_sum(schedule, machine, c, depth)
    schedule.reorder(t, u, c, *steps, a_sum, b_sum, chain, lane)
    prefetch_ahead(schedule, c, ahead)
    for loop in (*steps, a_sum, b_sum, chain, a_inner, b_inner, k_vector):
        schedule.unroll(loop)
    for loop in (lane, k_lane):
        schedule.vectorize(loop)
    return t, len(outer)


def _schedule_input(
    schedule: s_tir.Schedule, machine: Machine, points: SBlockRV, task: LoopRV
) -> None:
    """Make the points of a task's tiles, a vector of channels of a tile at a time."""
    rows = schedule.get_sblock("swino_rows")
    schedule.compute_at(points, task, preserve_unit_loops=True)
    x, y, n, a, b, c = schedule.get_loops(points)[-6:]
    depth = int(schedule.get(c).extent)
    lanes = vector_length(depth, machine.lanes)
    c_outer, c_lane = schedule.split(c, [None, lanes])
    schedule.reorder(n, a, b, c_outer, x, y, c_lane)
    schedule.compute_at(rows, c_outer, preserve_unit_loops=True)
    schedule.storage_align(points, 0, 4, depth, GAP)
    row, n, a, b, column, lane = schedule.get_loops(rows)[-6:]
    schedule.reorder(n, a, b, column, row, lane)
    for loop in (x, y, row, column):
        schedule.unroll(loop)
    for loop in (lane, c_lane):
        schedule.vectorize(loop)
