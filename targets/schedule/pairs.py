"""Schedule of 1x1 convolutions by products of sums of two operands (`hone.passes.lower.pairs`).

The loops are those of `contraction.schedule_conv2d`; a step of the sum is two input channels, and
each task first computes what its pixels' own products add up to.
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
    prefetch_epilogue,
    read_shape,
    start_sums,
)
from .machine import MOST_OPTIONS, Machine, choose_tasks, divisors

# Vectors of output channels of a register tile. With two, the last use of a broadcast input is the
# addition that a multiply-adder makes, which overwrites it; that is one addition in four, and keeps
# all units busy. One vector waits for loads, three and four measured slower.
VECTORS = 2
# Pixels of a register tile: 8 x 2 sums, four vectors of weights, two inputs and their sums are 26
# registers. Fewer than 5 wait for loads, of which a step has 4 and 2 for each pixel.
MOST_PIXELS, LEAST_PIXELS = 8, 5
# Input channels that pay for the products of a pixel's own channels and for the longer epilogue.
LEAST_DEPTH = 32


def pixel_tiles(height: int, width: int) -> list[tuple[int, int]]:
    """Return ``(rows, columns)`` of register tiles, the largest first; several rows only whole."""
    fitting = [
        (rows, columns)
        for columns in divisors(width)
        for rows in divisors(height)
        if LEAST_PIXELS <= rows * columns <= MOST_PIXELS and (rows == 1 or columns == width)
    ]
    return sorted(fitting, key=lambda tile: (-tile[0] * tile[1], tile[0]))


def applies(machine: Machine, *, height: int, width: int, channels: int, depth: int) -> bool:
    """Say whether a 1x1 convolution is computed by products of sums.

    Parameters
    ----------
    machine : Machine
        Units and registers; may have decided otherwise.
    height, width : int
        Of the image.
    channels, depth : int
        Output and input channels.
    """
    fits = (
        machine.separate_adders
        and machine.lanes == 16
        and depth % 2 == 0
        and depth >= LEAST_DEPTH
        and channels % (VECTORS * machine.lanes) == 0
        and bool(pixel_tiles(height, width))
        # Larger tiles of weights wait for memory, while direct forms read them in chunks: 7x7x2048
        # to 512 took 1.13 of the direct time.
        and depth * VECTORS * machine.lanes * 4 < machine.l2_bytes // 4
    )
    if not fits:
        return False
    return machine.pick(
        f"pairs {height}x{width}x{depth} to {channels}", {"pairs": True, "direct": False}
    )


def schedule_pairs(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule ``pair_acc``, its epilogue, and ``pair_lanes`` and ``pair_own`` before it.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Decides tiles and tasks.
    """
    blocks = leaves(schedule)
    by_name = {name_of(schedule, block): block for block in blocks}
    anchor, parts, own = (by_name[name] for name in ("pair_acc", "pair_lanes", "pair_own"))
    others = [b for name, b in by_name.items() if name not in ("pair_lanes", "pair_own")]
    output = output_block(schedule, anchor, others)
    *outer, w, k = schedule.get_loops(output)
    *sizes, width, channels = extents(schedule, output)
    *_, half = extents(schedule, anchor)
    image = len(outer) > 1 and sizes[-1] > 1
    tiles = pixel_tiles(sizes[-1] if image else 1, width)[:MOST_OPTIONS] or [(1, 1)]
    rows, columns = machine.pick("pixels", {f"{r}x{d}": (r, d) for r, d in tiles})
    if image:
        h, height = outer.pop(), sizes.pop()
    else:
        # The rows of a matrix, of which threads take some: each register tile is a row of pixels.
        h, w = schedule.split(w, [None, columns])
        height, width = width // columns, columns
    batch = math.prod(sizes)
    pack = read_shape(schedule, anchor, 1)[-1]
    h_outer, h_inner = schedule.split(h, [None, rows])
    w_outer, w_inner = schedule.split(w, [None, columns])
    k_outer, k_vector, k_lane = schedule.split(k, [None, pack // machine.lanes, machine.lanes])
    weight_bytes = math.prod(read_shape(schedule, anchor, 1)) * 4
    input_bytes = math.prod(read_shape(schedule, anchor, 0)) * 4
    row_parts, channel_parts = choose_tasks(
        machine,
        batch=batch,
        row_tiles=height // rows,
        channel_tiles=channels // pack,
        weight_bytes=weight_bytes,
        input_bytes=input_bytes,
        row_bytes=rows * input_bytes // height,
    )
    h_part, h_block = schedule.split(h_outer, [row_parts, None])
    k_part, k_block = schedule.split(k_outer, [channel_parts, None])
    order = (k_part, h_part) if weight_bytes > input_bytes else (h_part, k_part)
    inside = machine.pick("inner", {"rows": (k_block, h_block), "weights": (h_block, k_block)})
    schedule.reorder(*outer, *order, *inside, w_outer, h_inner, w_inner, k_vector, k_lane)
    task = schedule.fuse(*outer, *order)
    schedule.compute_at(anchor, w_outer, preserve_unit_loops=True)
    for block in (own, parts):
        schedule.compute_at(block, task, preserve_unit_loops=True)
    work = batch * height * width * channels * half * 2
    parallelize(schedule, task, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    for loop in (h_inner, w_inner, k_vector):
        schedule.unroll(loop)
    schedule.vectorize(k_lane)
    *pixels, k, c = schedule.get_loops(anchor)[4:]
    k_vector, k_lane = schedule.split(k, [None, machine.lanes])
    schedule.reorder(c, *pixels, k_vector, k_lane)
    for loop in (*pixels, k_vector):
        schedule.unroll(loop)
    schedule.vectorize(k_lane)
    prefetch_epilogue(
        schedule, output, c, pixels=rows * columns, channels=pack, l2_bytes=machine.l2_bytes
    )
    start_sums(schedule, anchor, c, outer_loops=4)
    _schedule_own(schedule, parts, own)


def _schedule_own(schedule: s_tir.Schedule, parts: SBlockRV, own: SBlockRV) -> None:
    """Sum the products of a pixel's own channels in one vector, then its lanes."""
    *_, lane, step = schedule.get_loops(parts)
    schedule.reorder(step, lane)
    schedule.vectorize(lane)
    start: list[LoopRV] = schedule.get_loops(schedule.decompose_reduction(parts, step))
    schedule.vectorize(start[-1])
    *_, last = schedule.get_loops(own)
    schedule.unroll(last)
    schedule.decompose_reduction(own, last)
