"""Schedule of a 1x1 convolution and the depthwise one that reads it, by bands of rows.

A task is a band of output rows and a tile of channels of one image: first those channels of the
rows that its windows read, then the windows. What lies between never leaves the core's L2. The rows
that the windows of two bands share are computed by both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from .blocks import (
    MIN_PARALLEL_MULTIPLY_ADDS,
    extents,
    finish_output,
    leaves,
    name_of,
    output_block,
    parallelize,
    read_shape,
    start_sums,
    vector_length,
)
from .contraction import UNROLLED_DEPTH, split_sum
from .machine import FMA_PER_CYCLE, MOST_OPTIONS, WEIGHT_BYTES_PER_CYCLE, Machine, divisors
from .projection import schedule_projection
from .tile_model import choose_pixels
from .window import column_tiles


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The geometry of a 1x1 convolution and the depthwise convolution that reads it.

    Parameters
    ----------
    shape : tuple of int
        What lies between, ``(N, H, W, C)``.
    depth : int
        Input channels, the products of one element of it.
    pack : int
        Channels of one tile of the first weights.
    taps : tuple of int
        Of the depthwise convolution, ``(height, width)``.
    output : tuple of int
        ``(height, width)`` of its result.
    """

    shape: tuple[int, int, int, int]
    depth: int
    pack: int
    taps: tuple[int, int]
    output: tuple[int, int]

    def rows(self, parts: int) -> int:
        """Return the rows of what lies between that one of so many bands reads, at most."""
        height = self.output[0]
        stride = max(self.shape[1] // height, 1)
        return min((height // parts - 1) * stride + self.taps[0], self.shape[1])

    def tile_bytes(self, parts: int) -> int:
        """Return the bytes of what lies between that one task holds."""
        return self.rows(parts) * self.shape[2] * self.pack * 4


def joins(machine: Machine, chain: Chain) -> bool:
    """Say whether one kernel computes both convolutions.

    Apart, what lies between is written and read through the cache that the cores share, as far as a
    core's share of it exceeds half of its L2; joined, some of its rows are computed twice. Of 112 x
    112 x 96, 4.8 MB, that is 482 000 cycles of writing and reading at 20 bytes per cycle; in four
    bands for a window of stride 2, 4 of 112 rows are computed again, 690 000 multiply-adds in
    11 000 cycles of two cores of 16 lanes.

    Parameters
    ----------
    machine : Machine
        Caches, lanes and threads; may have decided otherwise.
    chain : Chain
        Geometry.
    """
    parts = _ranked_parts(machine, chain)
    if not parts:
        return False
    batch, height, width, channels = chain.shape
    held = batch * height * width * channels * 4
    apart = 0.0
    if held > machine.threads * machine.l2_bytes // 2:
        apart = 2 * held / WEIGHT_BYTES_PER_CYCLE
    again = max(chain.rows(parts[0]) * parts[0] - height, 0) * batch * width * channels
    joined = again * chain.depth / (machine.lanes * FMA_PER_CYCLE * machine.threads)
    point = f"rows {height}x{width}x{channels} of {chain.depth}, {chain.taps[0]}x{chain.taps[1]}"
    order = ("joined", "apart") if joined < apart else ("apart", "joined")
    return machine.pick(point, {name: name == "joined" for name in order})


def _ranked_parts(machine: Machine, chain: Chain) -> list[int]:
    """Return into how many bands an image may be cut, best first; what lies between must fit L2.

    Few bands compute few rows twice. They are shared out evenly, as rows where those divide, which
    is how neighbouring kernels share them.
    """
    batch, _, _, channels = chain.shape
    tiles = channels // chain.pack

    def uneven(parts: int) -> tuple[bool, bool]:
        return (batch * parts * tiles) % machine.threads > 0, (batch * parts) % machine.threads > 0

    fitting = [d for d in divisors(chain.output[0]) if chain.tile_bytes(d) <= machine.l2_bytes // 2]
    return sorted(fitting, key=lambda d: (*uneven(d), d))


def schedule_bands(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule ``conv_acc`` with its epilogue, then ``dw_acc`` with its own, or these first.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Decides tiles and tasks.
    """
    blocks = leaves(schedule)
    by_name = {name_of(schedule, block): block for block in blocks}
    pointwise, window = by_name["conv_acc"], by_name["dw_acc"]
    first, second = (list(by_name).index(name) for name in ("conv_acc", "dw_acc"))
    if second < first:
        schedule_projection(schedule, machine, blocks)
        return
    output = output_block(schedule, window, blocks[second:])
    stored = _stored(schedule, blocks[first + 1 : second])
    n, h, w, c, r, s = schedule.get_loops(window)
    batch, height, width, channels, *taps = extents(schedule, window)
    *_, depth = extents(schedule, pointwise)
    _, in_height, in_width, _ = extents(schedule, stored)
    pack = read_shape(schedule, pointwise, 1)[-1]
    chain = Chain(
        shape=(batch, in_height, in_width, channels),
        depth=depth,
        pack=pack,
        taps=(taps[0], taps[1]),
        output=(height, width),
    )
    lanes = vector_length(pack, machine.lanes)
    ranked = _ranked_parts(machine, chain) or [height]
    parts = machine.pick("parts", {str(d): d for d in ranked[:MOST_OPTIONS]})
    h_part, h_block = schedule.split(h, [parts, None])
    columns = machine.pick("columns", {f"1x{d}": d for d in column_tiles(width)})
    w_outer, w_inner = schedule.split(w, [None, columns])
    c_tile, c_vector, c_lane = schedule.split(c, [None, pack // lanes, lanes])
    schedule.reorder(n, h_part, c_tile, c_vector, h_block, w_outer, r, s, w_inner, c_lane)
    task = schedule.fuse(n, h_part, c_tile)
    schedule.reverse_compute_at(output, w_outer, preserve_unit_loops=True)
    schedule.compute_at(stored, task, preserve_unit_loops=True)
    tile = _schedule_stored(schedule, machine, stored, chain)
    schedule.compute_at(pointwise, tile, preserve_unit_loops=True)
    step = _schedule_sums(schedule, machine, pointwise, lanes)
    work = (
        math.prod(chain.shape) * chain.depth + math.prod(taps) * batch * height * width * channels
    )
    # Before the sums are split from their start: a loop that holds both parts is refused.
    parallelize(schedule, task, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    schedule.vectorize(c_lane)
    for loop in (r, s, w_inner):
        schedule.unroll(loop)
    start_sums(schedule, pointwise, step, outer_loops=4)
    start_sums(schedule, window, r, outer_loops=4)
    finish_output(schedule, output, outer_loops=4, lanes=machine.lanes)


def _stored(schedule: s_tir.Schedule, between: list[SBlockRV]) -> SBlockRV:
    """Merge what stands between the sums into one block, and return it."""
    *epilogue, last = between
    if name_of(schedule, last) == "dw_pad":
        schedule.compute_inline(last)
        *epilogue, last = epilogue
    for block in epilogue:
        schedule.compute_inline(block)
    return last


def _schedule_stored(
    schedule: s_tir.Schedule, machine: Machine, stored: SBlockRV, chain: Chain
) -> LoopRV:
    """Store what lies between register tile by register tile; returns the loop over tiles."""
    lanes = vector_length(chain.pack, machine.lanes)
    _, _, width, channels = chain.shape
    _, columns = choose_pixels(
        machine,
        height=1,
        width=width,
        channels=channels,
        depth=chain.depth,
        taps=1,
        vectors=chain.pack // lanes,
    )
    *_, w, k = schedule.get_loops(stored)
    w_outer, w_inner = schedule.split(w, [None, columns])
    k_vector, k_lane = schedule.split(k, [None, lanes])
    schedule.vectorize(k_lane)
    for loop in (w_inner, k_vector):
        schedule.unroll(loop)
    return w_outer


def _schedule_sums(
    schedule: s_tir.Schedule, machine: Machine, pointwise: SBlockRV, lanes: int
) -> LoopRV:
    """Keep a tile of sums in registers; returns the outermost loop over what is summed."""
    *_, w, k, r, s, c = schedule.get_loops(pointwise)
    depth = int(schedule.get(c).extent)
    k_vector, k_lane = schedule.split(k, [None, lanes])
    c, steps = split_sum(schedule, machine, c, depth, whole=depth <= UNROLLED_DEPTH)
    schedule.reorder(r, s, c, *steps, w, k_vector, k_lane)
    schedule.vectorize(k_lane)
    for loop in (*steps, w, k_vector):
        schedule.unroll(loop)
    if depth <= UNROLLED_DEPTH:
        schedule.unroll(c)
    return r
