"""Schedule of a depthwise convolution and the 1x1 one that reads it, some rows at a time.

A task is a band of output rows of one image: for some rows of it the windows over all channels,
then the products with what they left, which is still in the core's L2. Nothing is computed twice.
"""

from __future__ import annotations

import math

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from .blocks import (
    MIN_PARALLEL_MULTIPLY_ADDS,
    DoesNotFitError,
    extents,
    finish_output,
    name_of,
    output_block,
    parallelize,
    read_shape,
    start_sums,
    vector_length,
)
from .contraction import UNROLLED_DEPTH, split_sum
from .machine import L2_BYTES_PER_CYCLE, MOST_OPTIONS, WEIGHT_BYTES_PER_CYCLE, Machine, divisors
from .tile_model import choose_pixels
from .window import column_tiles

# Rows whose windows are computed before their products: with one row the windows of all channels
# read more than the first cache keeps for the next row (docs/performance.md).
MOST_ROWS = 8


def projects(machine: Machine, shape: tuple[int, int, int, int], channels: int) -> bool:
    """Say whether one kernel computes a depthwise convolution and the 1x1 one that reads it.

    Apart, what lies between is written and read through the cache that the cores share, as far as a
    core's share of it exceeds half of its L2: of 112 x 112 x 32, 1.6 MB, 160 000 cycles at 20 bytes
    per cycle. Joined, each row of products reads the weights again, 2 KB for 16 channels from L2,
    and the rows of what lies between must fit half of it.

    Parameters
    ----------
    machine : Machine
        Caches and threads; may have decided otherwise.
    shape : tuple of int
        What lies between, ``(N, H, W, C)``.
    channels : int
        Of the result.
    """
    batch, height, width, depth = shape
    if MOST_ROWS * width * depth * 4 > machine.l2_bytes // 2:
        return False
    held = math.prod(shape) * 4
    apart = (
        2 * held / WEIGHT_BYTES_PER_CYCLE if held > machine.threads * machine.l2_bytes // 2 else 0
    )
    again = (height - 1) * batch * depth * channels * 4 / (L2_BYTES_PER_CYCLE * machine.threads)
    point = f"rows {height}x{width}x{depth} to {channels}"
    order = ("joined", "apart") if again < apart else ("apart", "joined")
    return machine.pick(point, {name: name == "joined" for name in order})


def schedule_projection(schedule: s_tir.Schedule, machine: Machine, blocks: list[SBlockRV]) -> None:
    """Schedule ``dw_acc`` with its epilogue, then ``conv_acc`` with its own.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Decides tiles and tasks.
    blocks : list of SBlockRV
        All blocks of the function in order.

    Raises
    ------
    DoesNotFitError
        No stage stands between the two sums.
    """
    names = [name_of(schedule, block) for block in blocks]
    first, second = names.index("dw_acc"), names.index("conv_acc")
    if second - first < 2:
        raise DoesNotFitError("nothing is stored between the windows and the products")
    window, product = blocks[first], blocks[second]
    output = output_block(schedule, product, blocks[second:])
    for block in (*blocks[:first], *blocks[first + 1 : second - 1]):
        schedule.compute_inline(block)
    stored = blocks[second - 1]
    n, h, w, k, r, s, c = schedule.get_loops(product)
    batch, height, width, channels, _, _, depth = extents(schedule, product)
    pack = read_shape(schedule, product, 1)[-1]
    lanes = vector_length(pack, machine.lanes)
    _, columns = choose_pixels(
        machine,
        height=1,
        width=width,
        channels=channels,
        depth=depth,
        taps=1,
        vectors=pack // lanes,
    )
    ranked = sorted(divisors(height), key=lambda d: ((batch * d) % machine.threads > 0, d))
    parts = machine.pick("parts", {str(d): d for d in ranked[:MOST_OPTIONS]})
    rows = max(d for d in divisors(height // parts) if d <= MOST_ROWS)
    h_part, h_mid, h_block = schedule.split(h, [parts, None, rows])
    w_outer, w_inner = schedule.split(w, [None, columns])
    k_outer, k_vector, k_lane = schedule.split(k, [None, pack // lanes, lanes])
    c, steps = split_sum(schedule, machine, c, depth, whole=depth <= UNROLLED_DEPTH)
    schedule.reorder(
        n, h_part, h_mid, h_block, k_outer, w_outer, r, s, c, *steps, w_inner, k_vector, k_lane
    )
    task = schedule.fuse(n, h_part)
    schedule.reverse_compute_at(output, w_outer, preserve_unit_loops=True)
    taps = _schedule_windows(schedule, machine, window, stored, at=h_mid)
    work = batch * height * width * depth * channels
    parallelize(schedule, task, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    schedule.vectorize(k_lane)
    for loop in (*steps, w_inner, k_vector):
        schedule.unroll(loop)
    if depth <= UNROLLED_DEPTH:
        schedule.unroll(c)
    start_sums(schedule, product, r, outer_loops=5)
    start_sums(schedule, window, taps, outer_loops=6)
    finish_output(schedule, output, outer_loops=5, lanes=machine.lanes)


def _schedule_windows(
    schedule: s_tir.Schedule,
    machine: Machine,
    window: SBlockRV,
    stored: SBlockRV,
    *,
    at: LoopRV,
) -> LoopRV:
    """Compute some rows of windows at a loop; returns the outermost loop over what is summed."""
    schedule.compute_at(stored, at, preserve_unit_loops=True)
    *_, h, w, c = schedule.get_loops(stored)
    *_, width, channels = extents(schedule, stored)
    columns = machine.pick("columns", {f"1x{d}": d for d in column_tiles(width)})
    w_outer, w_inner = schedule.split(w, [None, columns])
    c_outer, c_lane = schedule.split(c, [None, vector_length(channels, machine.lanes)])
    schedule.reorder(c_outer, h, w_outer, w_inner, c_lane)
    schedule.compute_at(window, w_outer, preserve_unit_loops=True)
    *_, w, c, r, s = schedule.get_loops(window)
    schedule.reorder(r, s, w, c)
    for lane in (c_lane, c):
        schedule.vectorize(lane)
    for loop in (w_inner, r, s, w):
        schedule.unroll(loop)
    return r
