"""Schedule of one row times few channels: chains of sums side by side in registers, then added."""

from __future__ import annotations

from tvm import s_tir

from .blocks import leaves, name_of, start_sums, vector_length
from .machine import Machine


def schedule_single_row(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule the blocks of ``chained_row`` in ``passes/lower/dense``, on one thread.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Lanes.
    """
    blocks = leaves(schedule)
    names = [name_of(schedule, block) for block in blocks]
    for block in blocks[names.index("mmrow_out") : -1]:
        schedule.compute_inline(block)
    sums, total = (schedule.get_sblock(name) for name in ("mmrow_acc", "mmrow_total"))
    chain, k, c = schedule.get_loops(sums)
    k_vector, k_lane = schedule.split(k, [None, machine.lanes])
    schedule.reorder(c, chain, k_vector, k_lane)
    schedule.vectorize(k_lane)
    for loop in (chain, k_vector):
        schedule.unroll(loop)
    start_sums(schedule, sums, c, outer_loops=0)
    (k,) = schedule.get_loops(total)
    k_vector, k_lane = schedule.split(k, [None, machine.lanes])
    schedule.vectorize(k_lane)
    schedule.unroll(k_vector)
    *_, last = schedule.get_loops(blocks[-1])
    lanes = vector_length(int(schedule.get(last).extent), machine.lanes)
    if lanes > 1:
        schedule.vectorize(schedule.split(last, [None, lanes])[1])
