"""Schedule of a Winograd convolution: transform, one matrix product for each point, transform.

Where the weights fit a core's cache, a task is a row of tiles from input to output, and what lies
between never leaves the cache. Where the image is tiny, a task is a part of the output channels,
and each transforms the whole image. Else there are three parallel loops: all threads split the
tiles of the image alike; where the weights are larger than the data, they split the points of the
transformed tile instead, so that each reads its part of the weights only.
"""

from __future__ import annotations

import math

import tvm
from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from .blocks import (
    MIN_PARALLEL_CYCLES,
    MIN_PARALLEL_MULTIPLY_ADDS,
    cycles,
    extents,
    leaves,
    name_of,
    output_block,
    parallelize,
    prefetch_ahead,
    prefetch_tile,
    read_shape,
    start_sums,
    vector_length,
)
from .contraction import split_sum
from .machine import Machine, divisors, prefetch_distance
from .tile_model import choose_pixels

# Bytes after which addresses share a set of the first level again, and of its lines.
SET_BYTES = 4096
LINE_BYTES = 64
# Ways in which each thread takes a part of the output channels: of all images, of one, of one row
# of tiles.
PARTED = ("channels", "images", "cells")


def schedule_winograd(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule the blocks ``wino_rows``, ``wino_in``, ``wino_acc``, ``wino_cols`` and the output.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Decides tiles and tasks.
    """
    columns, output = tile_output(schedule, machine)
    n, h_outer, w_outer, k_outer, h_inner, w_inner, k_lane = schedule.get_loops(output)
    work = cycles(schedule, columns, machine.lanes)
    schedule.compute_at(columns, k_outer, preserve_unit_loops=True)
    across = int(schedule.get(w_outer).extent)
    down, images = int(schedule.get(h_outer).extent), int(schedule.get(n).extent)
    all_tiles = images * down * across
    way = machine.pick("way", _ways(schedule, machine, across=across, down=down, images=images))
    if way in PARTED:
        part, k_outer = schedule.split(k_outer, [machine.threads, None])
        outer, inside = {
            "channels": ([part], [n, h_outer]),
            "images": ([n, part], [h_outer]),
            "cells": ([n, h_outer, part], []),
        }[way]
        schedule.reorder(*outer, *inside, w_outer, k_outer)
        tiles = {"channels": all_tiles, "images": down * across, "cells": across}[way]
        _schedule_task(schedule, machine, schedule.fuse(*outer), tiles)
    elif way == "rows":
        _schedule_task(schedule, machine, schedule.fuse(n, h_outer), across)
    else:
        schedule_input(schedule, machine, None)
        _schedule_products(schedule, machine)
        tiles = schedule.fuse(n, h_outer, w_outer)
        parallelize(schedule, tiles, work=work, least=MIN_PARALLEL_CYCLES)
    finish_columns(schedule, columns)
    for loop in (h_inner, w_inner):
        schedule.unroll(loop)
    schedule.vectorize(k_lane)


def tile_output(schedule: s_tir.Schedule, machine: Machine) -> tuple[SBlockRV, SBlockRV]:
    """Split the loops of the output into tiles and vectors of channels, the epilogue inlined.

    Returns
    -------
    tuple of SBlockRV
        The stage ``wino_cols``, and the output with loops ``n``, rows and columns of tiles, vectors
        of channels, rows and columns of a tile, channels of a vector.
    """
    blocks = leaves(schedule)
    by_name = {name_of(schedule, block): block for block in blocks}
    columns = by_name["wino_cols"]
    if name_of(schedule, blocks[-1]) == "wino_out":
        output = blocks[-1]
    else:
        schedule.compute_inline(by_name["wino_out"])
        output = output_block(schedule, columns, leaves(schedule))
    m = extents(schedule, columns)[4] - 2
    n, h, w, k = schedule.get_loops(output)
    lanes = vector_length(extents(schedule, output)[-1], machine.lanes)
    h_outer, h_inner = schedule.split(h, [None, m])
    w_outer, w_inner = schedule.split(w, [None, m])
    k_outer, k_lane = schedule.split(k, [None, lanes])
    schedule.reorder(n, h_outer, w_outer, k_outer, h_inner, w_inner, k_lane)
    return columns, output


def finish_columns(schedule: s_tir.Schedule, columns: SBlockRV) -> None:
    """Unroll and vectorize the columns of a tile that is transformed back."""
    *_, i, y, lane = schedule.get_loops(columns)
    schedule.reorder(y, i)
    for loop in (i, y):
        schedule.unroll(loop)
    schedule.vectorize(lane)


def _ways(
    schedule: s_tir.Schedule, machine: Machine, *, across: int, down: int, images: int
) -> dict[str, str]:
    """Return the ways that a layer can go, the best first."""
    sums = schedule.get_sblock("wino_acc")
    _, _, rounded, channels, _ = extents(schedule, sums)
    shared = channels % (machine.lanes * machine.threads) == 0
    possible = ["loops"]
    if rounded % across == 0:
        possible = ["rows", *(["cells"] if shared else []), *possible]
    if shared and rounded % (down * across) == 0:
        possible += ["images"]
    if _is_tiny(schedule, machine, images * down * across):
        first = "channels"
    elif _in_words(schedule):
        first = _way_of_words(schedule, machine, possible, across=across, down=down, images=images)
    elif "rows" in possible and _fits_by_rows(schedule, machine, across):
        first = "rows"
    else:
        first = "loops"
    return {way: way for way in (first, *possible)}


def _way_of_words(
    schedule: s_tir.Schedule,
    machine: Machine,
    possible: list[str],
    *,
    across: int,
    down: int,
    images: int,
) -> str:
    """Choose the way of sums of int16, whose transforms are cheap: each thread may repeat them."""
    sums = schedule.get_sblock("wino_acc")
    side, _, _, channels, depth = extents(schedule, sums)
    weight_bytes = math.prod(read_shape(schedule, sums, 1)) * 4
    balanced = images * down % machine.threads == 0
    if "rows" in possible and balanced and weight_bytes <= machine.l2_bytes:
        return "rows"
    if "cells" in possible and weight_bytes <= machine.threads * machine.l2_bytes:
        return "cells"
    # Weights that exceed the caches are read once for an image.
    image = side * side * down * across * 4 * (depth + channels // machine.threads)
    if "images" in possible and image <= machine.l2_bytes:
        return "images"
    return "loops"


def _in_words(schedule: s_tir.Schedule) -> bool:
    """Say whether the transformed data is int16, two channels to a lane of the products."""
    rows = schedule.get_sblock("wino_rows")
    return str(schedule.get(rows).writes[0].source.dtype) == "int16"


def _fits_by_rows(schedule: s_tir.Schedule, machine: Machine, across: int) -> bool:
    """Say whether register tiles are full in a row, and the weights fit a core's L2."""
    sums = schedule.get_sblock("wino_acc")
    _, _, _, channels, depth = extents(schedule, sums)
    weight = read_shape(schedule, sums, 1)
    rows = _tile_rows(machine, across, channels, depth, weight[-1])
    enough = rows * (weight[-1] // machine.lanes) * 2 >= machine.accumulators
    return enough and math.prod(weight) * 4 <= machine.l2_bytes


def _is_tiny(schedule: s_tir.Schedule, machine: Machine, tiles: int) -> bool:
    """Say whether each thread may transform the whole image, for its part of the channels.

    The threads then meet once instead of three times, and hand nothing over in between.
    """
    sums = schedule.get_sblock("wino_acc")
    side, _, rounded, channels, depth = extents(schedule, sums)
    shared = channels % (machine.lanes * machine.threads) == 0
    small = side * side * tiles * depth * 4 <= machine.l1_bytes
    return machine.threads > 1 and shared and small and rounded == tiles


def _tile_rows(machine: Machine, tiles: int, channels: int, depth: int, pack: int) -> int:
    vectors = pack // vector_length(pack, machine.lanes)
    _, rows = choose_pixels(
        machine, height=1, width=tiles, channels=channels, depth=depth, taps=1, vectors=vectors
    )
    return rows


def spread(schedule: s_tir.Schedule, block: SBlockRV) -> None:
    """Keep the points of a tile, which lie one behind the other, out of one set of a cache.

    The stage is ``[m + 2, m + 2, ...]``; a point takes what the block's loops behind those run
    through.
    """
    dtype = str(schedule.get(block).writes[0].source.dtype)
    itemsize = tvm.runtime.DataType(dtype).itemsize
    *_, tiles, channels = extents(schedule, block)
    if tiles * channels * itemsize % SET_BYTES == 0:
        schedule.storage_align(block, 0, 1, SET_BYTES // itemsize, LINE_BYTES // itemsize)


def _schedule_task(schedule: s_tir.Schedule, machine: Machine, task: LoopRV, count: int) -> None:
    """Compute transform and products of some tiles and channels inside the output's task."""
    sums = schedule.get_sblock("wino_acc")
    side, _, tiles, channels, depth = extents(schedule, sums)
    stored = schedule.cache_write(sums, 0, "global")
    schedule.compute_at(stored, task, preserve_unit_loops=True)
    x, y, p, k = schedule.get_loops(stored)[-4:]
    pack = math.gcd(read_shape(schedule, sums, 1)[-1], int(schedule.get(k).extent))
    lanes = vector_length(pack, machine.lanes)
    rows = _tile_rows(machine, count, channels, depth, pack)
    p_outer, p_inner = schedule.split(p, [None, rows])
    k_outer, k_vector, k_lane = schedule.split(k, [None, pack // lanes, lanes])
    schedule.reorder(x, y, k_outer, p_outer, p_inner, k_vector, k_lane)
    schedule.compute_at(sums, p_outer, preserve_unit_loops=True)
    outer_loops = len(schedule.get_loops(sums)) - 5
    spread(schedule, stored)
    *_, p_sum, k_sum, c = schedule.get_loops(sums)
    chain, lane = schedule.split(k_sum, [None, lanes])
    c, steps = split_sum(schedule, machine, c, depth)
    schedule.reorder(c, *steps, p_sum, chain, lane)
    weight_bytes = math.prod(read_shape(schedule, sums, 1)) * 4
    distance = prefetch_distance(machine, rows=tiles, weight_bytes=weight_bytes)
    prefetch_ahead(schedule, c, machine.pick("ahead", {"yes": distance, "no": 0}))
    for loop in (*steps, p_sum, chain, p_inner, k_vector):
        schedule.unroll(loop)
    schedule.vectorize(lane)
    schedule.vectorize(k_lane)
    schedule_input(schedule, machine, task)
    # Before the sums are split from their start: a loop that holds both parts is refused.
    work = side * side * tiles * channels * depth
    parallelize(schedule, task, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    start_sums(schedule, sums, c, outer_loops=outer_loops)


def schedule_input(schedule: s_tir.Schedule, machine: Machine, task: LoopRV | None) -> None:
    """Schedule the transform of the input, in a loop of its own or inside a task."""
    points = schedule.get_sblock("wino_in")
    if task is not None:
        schedule.compute_at(points, task, preserve_unit_loops=True)
    x, y, p, c = schedule.get_loops(points)[-4:]
    rows = schedule.get_sblock("wino_rows")
    lanes = machine.lanes * (2 if _in_words(schedule) else 1)
    lanes = vector_length(extents(schedule, points)[-1], lanes)
    c_outer, c_lane = schedule.split(c, [None, lanes])
    schedule.reorder(p, c_outer, x, y, c_lane)
    work = cycles(schedule, rows, machine.lanes)
    schedule.compute_at(rows, c_outer, preserve_unit_loops=True)
    spread(schedule, points)
    if task is None:
        parallelize(schedule, p, work=work, least=MIN_PARALLEL_CYCLES)
    *_, row, column, lane = schedule.get_loops(rows)
    schedule.reorder(column, row)
    for loop in (x, y, row, column):
        schedule.unroll(loop)
    schedule.vectorize(lane)
    schedule.vectorize(c_lane)


def _schedule_products(schedule: s_tir.Schedule, machine: Machine) -> None:
    sums = schedule.get_sblock("wino_acc")
    stored = schedule.cache_write(sums, 0, "global")
    x, y, p, k, c = schedule.get_loops(sums)
    side, _, tiles, channels, depth = extents(schedule, sums)
    weight = read_shape(schedule, sums, 1)
    lanes = vector_length(weight[-1], machine.lanes)
    vectors = weight[-1] // lanes
    _, rows = choose_pixels(
        machine, height=1, width=tiles, channels=channels, depth=depth, taps=1, vectors=vectors
    )
    p_outer, p_inner = schedule.split(p, [None, rows])
    k_outer, k_vector, k_lane = schedule.split(k, [None, vectors, lanes])
    by_points = math.prod(weight) > side * side * tiles * depth
    split = {"points": True, "tiles": False} if by_points else {"tiles": False, "points": True}
    by_points = machine.pick("split", split)
    parts = 1
    if not by_points:
        groups = tiles // rows
        parts = next((d for d in divisors(groups) if d % machine.threads == 0), 1)
    p_part, p_block = schedule.split(p_outer, [parts, None])
    c, steps = split_sum(schedule, machine, c, depth)
    body = (c, *steps, p_inner, k_vector, k_lane)
    if parts > 1:
        schedule.reorder(p_part, x, y, k_outer, p_block, *body)
        tasks = p_part
    else:
        schedule.reorder(x, y, k_outer, p_part, p_block, *body)
        tasks = schedule.fuse(x, y, k_outer)
    schedule.reverse_compute_at(stored, p_block, preserve_unit_loops=True)
    work = side * side * tiles * channels * depth
    parallelize(schedule, tasks, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    outer_loops = len(schedule.get_loops(sums)) - 4
    distance = prefetch_distance(machine, rows=tiles, weight_bytes=math.prod(weight) * 4)
    if distance:
        passes = int(schedule.get(p_block).extent)
        elements = weight[-1] * depth
        prefetch_tile(schedule, c, elements=elements, passes=passes, l1_bytes=machine.l1_bytes)
    schedule.vectorize(k_lane)
    for loop in (*steps, p_inner, k_vector):
        schedule.unroll(loop)
    start_sums(schedule, sums, c, outer_loops=outer_loops)
    copied = schedule.get_loops(stored)[outer_loops:]
    rest, lane = schedule.split(copied[-1], [None, lanes])
    schedule.vectorize(lane)
    for loop in (*copied[:-1], rest):
        schedule.unroll(loop)
