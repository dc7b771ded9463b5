"""Schedule of a Winograd convolution whose weights are transformed along one axis only.

Each step of a sum transforms a vector of weights along the other axis, in registers, right before
it is multiplied with all tiles: a third or less of the weights' bytes come from memory. A task is a
part of the output channels, and meets no other between input and output::

    parallel(parts of the channels) > transform of the input
        > blocks of channels
            > rows of points > points of a row > tiles > {sums in registers}
            > tiles > transform of the sums, output
"""

from __future__ import annotations

import math

from tvm import s_tir

from .blocks import (
    MIN_PARALLEL_MULTIPLY_ADDS,
    PREFETCH_SLAB,
    extents,
    parallelize,
    read_shape,
    start_sums,
    vector_length,
)
from .contraction import split_sum
from .machine import Machine
from .tile_model import choose_pixels
from .winograd import finish_columns, schedule_input, spread, tile_output


def schedule_winograd_rows(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule ``wino_row_acc`` and the stages around it, which are those of `schedule_winograd`.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Decides tiles and tasks.
    """
    columns, output = tile_output(schedule, machine)
    n, h_outer, w_outer, k_outer, h_inner, w_inner, k_lane = schedule.get_loops(output)
    sums = schedule.get_sblock("wino_row_acc")
    side, _, tiles, channels, depth = extents(schedule, sums)
    pack = read_shape(schedule, sums, 1)[-1]
    lanes = vector_length(pack, machine.lanes)
    count = int(schedule.get(k_outer).extent)
    vectors = math.gcd(count, pack // lanes)
    parts = math.gcd(count // vectors, machine.threads)
    part, k_block, k_vector = schedule.split(k_outer, [parts, None, vectors])
    schedule.reorder(part, k_block, n, h_outer, w_outer, k_vector, h_inner, w_inner, k_lane)
    schedule.compute_at(columns, k_vector, preserve_unit_loops=True)
    finish_columns(schedule, columns)
    for loop in (h_inner, w_inner):
        schedule.unroll(loop)
    schedule.vectorize(k_lane)

    stored = schedule.cache_write(sums, 0, "global")
    schedule.compute_at(stored, k_block, preserve_unit_loops=True)
    x, y, p, k = schedule.get_loops(stored)[-4:]
    _, rows = choose_pixels(
        machine, height=1, width=tiles, channels=channels, depth=depth, taps=1, vectors=vectors
    )
    p_outer, p_inner = schedule.split(p, [None, rows])
    k_chain, k_stored = schedule.split(k, [None, lanes])
    schedule.reorder(x, y, p_outer, p_inner, k_chain, k_stored)
    schedule.compute_at(sums, p_outer, preserve_unit_loops=True)
    outer_loops = len(schedule.get_loops(sums)) - 3
    *_, p_sum, k_sum, c = schedule.get_loops(sums)
    chain, lane = schedule.split(k_sum, [None, lanes])
    c, steps = split_sum(schedule, machine, c, depth)
    schedule.reorder(c, *steps, p_sum, chain, lane)
    spread(schedule, stored)
    for loop in (y, *steps, p_sum, chain, p_inner, k_chain):
        schedule.unroll(loop)
    schedule.vectorize(lane)
    schedule.vectorize(k_stored)

    slab = 3 * depth * pack
    if machine.pick("ahead", {"yes": True, "no": False}):
        schedule.annotate(c, PREFETCH_SLAB, [slab, tiles // rows])

    shared = machine.pick("input", {"own": False, "shared": True})
    schedule_input(schedule, machine, None if shared else part)
    # Before the sums are split from their start: a loop that holds both parts is refused.
    work = side * side * tiles * channels * depth
    parallelize(schedule, part, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    start_sums(schedule, sums, c, outer_loops=outer_loops)
