"""Schedules of integer convolutions and matrix products by small matrices (ARM's ``usmmla``).

The stages are those of `hone.passes.quantize.matrix_kernels`: ``matrix_pad`` (optional),
``matrix_left``, ``matrix_acc`` and ``requantize``. The loops are those of `integer`, with two
pixels for one, vectors of two channels and groups of eight bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from hone.targets.integer_dot import MATRIX_GROUP, SIDE, IntegerDot
from hone.targets.matrix_intrinsics import NAME

from .blocks import (
    MIN_PARALLEL_MULTIPLY_ADDS,
    DoesNotFitError,
    extents,
    finish_output,
    name_of,
    output_block,
    parallelize,
    read_shape,
)
from .integer import UNROLLED_GROUPS, copy_padding
from .machine import (
    FMA_LATENCY,
    FMA_PER_CYCLE,
    L2_BYTES_PER_CYCLE,
    MOST_OPTIONS,
    Machine,
    choose_tasks,
    divisors,
)
from .tile_model import Tile, least_cycles, pick_tile

# Products of matrices must be modelled this much faster: the model of neither is exact.
MATRIX_GAIN = 1.2
# Registers that hold sums, weights and levels of a step; one more waits for the second pixel.
REGISTERS = 30
REGISTER_BYTES = 16
# Vectors of two channels each: even, so that the epilogue's vectors of four channels are whole.
_VECTORS = (2, 4, 6, 8)


def _most_pairs(vectors: int) -> int:
    """Return how many pairs of pixels leave room for their levels and for weights and sums."""
    return (REGISTERS - vectors) // (vectors + 1)


def _cycles(pairs: int, vectors: int, *, from_l2: bool) -> float:
    """Return the cycles of a step: its products, and an insertion for each pair's second pixel."""
    operations = pairs * (vectors + 1)
    loads = SIDE * pairs + vectors
    stream = vectors * REGISTER_BYTES / L2_BYTES_PER_CYCLE if from_l2 else 0
    return max(operations / FMA_PER_CYCLE, loads / 2, FMA_LATENCY, stream) + 0.5


def _pixels(height: int, width: int, vectors: int) -> Iterator[tuple[int, int]]:
    """Yield the rows and columns, in pairs of pixels, that a register tile may have."""
    most = _most_pairs(vectors)
    for columns in range(1, min(width, most) + 1):
        for rows in divisors(height):
            if rows * columns <= most and (rows == 1 or columns >= width):
                yield rows, columns


@cache
def ranked_matrix_tiles(
    machine: Machine, *, height: int, width: int, channels: int, depth: int, taps: int
) -> tuple[tuple[float, Tile], ...]:
    """Return the best register tile of each number of vectors with its modelled cycles, best first.

    A step is a group of eight bytes. Worked number: 3 pairs of pixels by 6 vectors are 18 products
    and 3 insertions, 10.5 cycles at two in each, for 576 multiplications; ``usdot`` does 448 with
    28 sums in 14.

    Parameters
    ----------
    machine : Machine
        Caches.
    height, width : int
        Output image, in pixels.
    channels : int
        Output channels.
    depth, taps : int
        Groups of eight bytes in a run, runs of the kernel.
    """
    ranked = []
    pairs = -(-width // SIDE)
    for vectors in _VECTORS:
        if vectors > _VECTORS[0] and SIDE * (vectors - SIDE) >= channels:
            continue
        weight_bytes = vectors * REGISTER_BYTES * depth * taps
        if vectors > _VECTORS[0] and weight_bytes > machine.l2_bytes // 3:
            continue
        from_l2 = weight_bytes > machine.l1_bytes // 2
        best = min(
            (
                (height // rows)
                * -(-pairs // columns)
                * (
                    _cycles(rows * columns, vectors, from_l2=from_l2) * depth * taps
                    + rows * columns * vectors
                ),
                -rows * columns,
                rows,
                columns,
            )
            for rows, columns in _pixels(height, pairs, vectors)
        )
        cost = best[0] * -(-channels // (SIDE * vectors))
        ranked.append((cost, Tile(rows=best[2], columns=best[3], vectors=vectors)))
    return tuple(sorted(ranked, key=lambda pair: pair[0]))


def choose_matrix_tile(
    machine: Machine,
    *,
    height: int,
    width: int,
    channels: int,
    matrix: tuple[int, int],
    vector: tuple[int, int],
) -> Tile | None:
    """Choose the register tile of a layer in matrices, None where vectors are modelled as fast.

    Parameters
    ----------
    machine : Machine
        Says whether it has the instruction.
    height, width : int
        Output image; a matrix product has its rows as ``width``.
    channels : int
        Output channels.
    matrix, vector : tuple of int
        Groups of a run and runs of the kernel, in groups of eight and of four bytes.

    Returns
    -------
    Tile or None
        ``columns`` counts pairs of pixels, ``vectors`` pairs of channels.
    """
    if machine.integer_dot != IntegerDot.USMMLA:
        return None
    shape = {"height": height, "width": width, "channels": channels}
    ranked = ranked_matrix_tiles(machine.plain, **shape, depth=matrix[0], taps=matrix[1])
    vectors = least_cycles(machine, **shape, depth=vector[0], taps=vector[1])
    names = [str(IntegerDot.USMMLA), str(IntegerDot.USDOT)]
    if ranked[0][0] * MATRIX_GAIN > vectors:
        names.reverse()
    point = f"matrices {height}x{width}x{vector[0]}x{vector[1]} to {channels}"
    if machine.pick(point, {name: name for name in names}) != IntegerDot.USMMLA:
        return None
    tiles = tuple(tile for _, tile in ranked)
    return pick_tile(machine, tiles, **shape, depth=matrix[0], taps=matrix[1])


def _choose_pixels(machine: Machine, *, height: int, width: int, vectors: int) -> tuple[int, int]:
    """Choose rows and columns, in pairs of pixels, that divide the image; see `choose_pixels`."""
    options = [
        (rows, columns) for rows, columns in _pixels(height, width, vectors) if width % columns == 0
    ]
    ranked = sorted(
        options,
        key=lambda option: (
            _cycles(math.prod(option), vectors, from_l2=False) / math.prod(option),
            option[::-1],
        ),
    )[:MOST_OPTIONS]
    return machine.pick("pixels", {f"{r}x{c}": (r, c) for r, c in ranked})


def _flatten(schedule: s_tir.Schedule, output: SBlockRV) -> None:
    """Give the epilogue of a matrix product the axes of the sums: image, row, pixel, channel."""
    shape = extents(schedule, output)

    def flat(*index: tirx.Var) -> tuple[tirx.Expr, ...]:
        pixel = zero = tirx.const(0, "int32")
        for extent, at in zip(shape[:-1], index[:-1], strict=True):
            pixel = pixel * extent + at
        return zero, zero, pixel, index[-1]

    schedule.transform_block_layout(output, tirx.IndexMap.from_func(flat, ndim=len(shape)))


def schedule_matrices(schedule: s_tir.Schedule, machine: Machine, blocks: list[SBlockRV]) -> None:
    """Schedule a convolution or matrix product in small matrices.

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
        The stages are not complete.
    """
    by_name = {name_of(schedule, block): block for block in blocks}
    anchor, left = by_name.get("matrix_acc"), by_name.get("matrix_left")
    padding = by_name.get("matrix_pad")
    if anchor is None or left is None or blocks[-1] is anchor:
        raise DoesNotFitError("the stages of a product of matrices are not complete")
    output = output_block(schedule, anchor, blocks)
    n, h, w, k, pixel, channel, r, s, group, byte = schedule.get_loops(anchor)
    batch, height, width, channels, _, _, taps_h, taps_w, groups, _ = extents(schedule, anchor)
    if batch == height == 1:
        _flatten(schedule, output)
    vectors = read_shape(schedule, anchor, 1)[-3]
    rows, columns = _choose_pixels(machine, height=height, width=width, vectors=vectors)
    h_outer, h_inner = schedule.split(h, [None, rows])
    w_outer, w_inner = schedule.split(w, [None, columns])
    k_outer, k_vector = schedule.split(k, [None, vectors])
    weight_bytes = math.prod(read_shape(schedule, anchor, 1))
    input_bytes = math.prod(read_shape(schedule, left, 0))
    row_parts, channel_parts = choose_tasks(
        machine,
        batch=batch,
        row_tiles=height // rows,
        channel_tiles=channels // vectors,
        weight_bytes=weight_bytes,
        input_bytes=input_bytes,
        row_bytes=rows * input_bytes // height,
    )
    h_part, h_block = schedule.split(h_outer, [row_parts, None])
    k_part, k_block = schedule.split(k_outer, [channel_parts, None])
    order = (n, k_part, h_part) if weight_bytes > input_bytes else (n, h_part, k_part)
    inside = machine.pick("inner", {"rows": (k_block, h_block), "weights": (h_block, k_block)})
    tile = (h_inner, w_inner, k_vector)
    schedule.reorder(*order, *inside, w_outer, r, s, group, *tile, pixel, channel, byte)
    tasks = schedule.fuse(*order)
    schedule.reverse_compute_at(output, w_outer, preserve_unit_loops=True)
    schedule.compute_at(left, group, preserve_unit_loops=True)
    if padding is not None:
        copy_padding(schedule, machine, padding, tasks)
    work = math.prod((batch, height, width, channels, taps_h, taps_w, groups)) * SIDE
    parallelize(schedule, tasks, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    for loop in tile:
        schedule.unroll(loop)
    if groups <= UNROLLED_GROUPS:
        schedule.unroll(group)
    _load_pairs(schedule, left)
    started = schedule.get_loops(schedule.decompose_reduction(anchor, r))
    schedule.vectorize(schedule.fuse(*started[-2:]))
    for loop in started[4:-2]:
        schedule.unroll(loop)
    schedule.tensorize(pixel, NAME)
    finish_output(schedule, output, outer_loops=4, lanes=machine.lanes)


def _load_pairs(schedule: s_tir.Schedule, left: SBlockRV) -> None:
    """Load the eight bytes of each pixel as one vector; two of them are a register."""
    loops = schedule.get_loops(left)
    if int(schedule.get(loops[-1]).extent) == MATRIX_GROUP:
        schedule.vectorize(loops[-1])
    for loop in loops[-8:-1]:
        schedule.unroll(loop)
