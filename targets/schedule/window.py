"""Schedule of depthwise convolution and pooling over NHWC: no sum over channels."""

from __future__ import annotations

import math

import tvm
from tvm import s_tir
from tvm.s_tir.schedule import SBlockRV

from .blocks import (
    MIN_PARALLEL_STEPS,
    extents,
    finish_output,
    name_of,
    output_block,
    parallelize,
    read_shape,
    start_sums,
    vector_length,
)
from .machine import MOST_OPTIONS, Machine, divisors

# Output columns of one register tile: enough to hide the latency of a sum, few enough that the
# unrolled window stays small (measured on 112x112 depthwise layers).
MAX_COLUMNS = 8
# Images of up to 7x7 follow convolutions that split channels across threads, larger ones
# convolutions that split rows; splitting the same axis keeps data in the core's own cache.
SMALL_IMAGE = 7 * 7
# Where a pixel has no more vectors of channels than this, pooling takes them together: lines are
# read one behind the other (112x112x64 in 20 us for 24). With twelve of them it lost (11 for 10).
POOLED_VECTORS = 4
# Taps of a window that pooling takes so at most: all of them are unrolled for each vector.
POOLED_TAPS = 9
# Ends the name of a padded copy that holds two rows in each word.
PAIRED = "_words"


def column_tiles(width: int) -> list[int]:
    """Return the columns that a register tile of a window may have, best first."""
    return sorted((d for d in divisors(width) if d <= MAX_COLUMNS), reverse=True)


def schedule_window(
    schedule: s_tir.Schedule,
    machine: Machine,
    anchor: SBlockRV,
    padding: SBlockRV | None,
    blocks: list[SBlockRV],
) -> None:
    """Schedule a window sum or maximum with loops ``n, h, w, c, r, s``.

    The padding is inlined, not copied; its bounds are marked likely, so that loop partitioning
    frees the inner tiles of them. Words of two rows are copied for each task, which fit L1.
    """
    output = output_block(schedule, anchor, blocks)
    copied = padding is not None and name_of(schedule, padding).endswith(PAIRED)
    if padding is not None and not copied:
        schedule.compute_inline(padding)
    n, h, w, c, r, s = schedule.get_loops(anchor)
    batch, height, width, channels, taps_h, taps_w = extents(schedule, anchor)
    # A maximum of bytes has four times as many in a vector as a sum.
    itemsize = tvm.runtime.DataType(str(schedule.get(anchor).writes[0].source.dtype)).itemsize
    vector = machine.lanes * 4 // itemsize
    lanes = vector_length(channels, vector)
    columns = machine.pick("pixels", {f"1x{d}": d for d in column_tiles(width)})
    w_outer, w_inner = schedule.split(w, [None, columns])
    c_outer, c_lane = schedule.split(c, [None, lanes])
    in_height, in_width = read_shape(schedule, anchor, 0)[1:3]
    # Of words a row of them is two rows of the image.
    stride = max(in_height * (2 if copied else 1) // height, 1)
    share = 1
    if height % machine.threads == 0 and in_height * in_width > SMALL_IMAGE:
        share = machine.threads
    shared = [d for d in divisors(height) if d % share == 0]
    # Pooling has no weights that stay for all pixels of a channel: it may take pixels as they lie.
    pools = (
        len(schedule.get(anchor).reads) == 1
        and channels // lanes <= POOLED_VECTORS
        and taps_h * taps_w <= POOLED_TAPS
    )
    # What is copied is written and read again; it leaves a quarter of L1 to what it is made of.
    held = machine.l1_bytes * 3 // 4 if copied else machine.l1_bytes * 3 // 2

    def read_bytes(rows: int) -> int:
        before = (rows - 1) * stride // (2 if copied else 1)
        return int((before + taps_h) * in_width * lanes * itemsize)

    in_l1 = (d for d in shared if read_bytes(height // d) <= held)
    parts = height if pools else next(in_l1, height)
    # Tuning tries the numbers of rows next to that one.
    near = sorted(shared, key=lambda d: abs(math.log(d / parts)))[:MOST_OPTIONS]
    parts = machine.pick("parts", {str(d): d for d in dict.fromkeys((parts, *near))})
    h_part, h_block = schedule.split(h, [parts, None])
    if pools:
        schedule.reorder(n, h_part, h_block, w_outer, c_outer, r, s, w_inner, c_lane)
        tasks, tile, outer_loops = schedule.fuse(n, h_part), c_outer, 4
        schedule.unroll(c_outer)
    else:
        schedule.reorder(n, h_part, c_outer, h_block, w_outer, r, s, w_inner, c_lane)
        tasks, tile, outer_loops = schedule.fuse(n, h_part, c_outer), w_outer, 3
    schedule.reverse_compute_at(output, tile, preserve_unit_loops=True)
    if padding is not None and copied:
        schedule.compute_at(padding, tasks, preserve_unit_loops=True)
        schedule.vectorize(schedule.get_loops(padding)[-1])
    work = batch * height * width * channels * taps_h * taps_w
    parallelize(schedule, tasks, work=work, least=MIN_PARALLEL_STEPS)
    schedule.vectorize(c_lane)
    for loop in (r, s, w_inner):
        schedule.unroll(loop)
    start_sums(schedule, anchor, r, outer_loops=outer_loops)
    finish_output(schedule, output, outer_loops=outer_loops, lanes=vector)
