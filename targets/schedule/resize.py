"""Schedules of 2-D resizing: a task makes one row of the result.

The row that interpolation sums up first (``resize_rows``) stays in the cache of the task's core. In
NHWC the innermost loops are channels, in NCHW columns: an integer scale makes each phase of its
columns run through memory, and what lies outside the input has loops of its own. Innermost loops
stay plain: LLVM makes vectors of them, the remainder included.
"""

from __future__ import annotations

from tvm import s_tir

from .blocks import (
    MIN_PARALLEL_CYCLES,
    DoesNotFitError,
    cycles,
    inline_elementwise,
    leaves,
    name_of,
    only_output,
)
from .machine import Machine

FORM = "hone.resize"
"""Annotation of a result: whether channels are last; how many of its columns, one for each phase,
lie along one of the input's; how many columns are read before the input, and behind it."""

_ROWS, _OUT = "resize_rows", "resize_out"
# Axes of a batch of images.
RANK = 4
# The most phases that are written out.
MAX_PHASES = 8


def schedule_resize(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule a function that resizes images.

    Raises
    ------
    DoesNotFitError
        The result is no batch of images.
    """
    blocks = {name_of(schedule, block): block for block in leaves(schedule)}
    form = schedule.get(blocks[_OUT]).annotations[FORM]
    channels_last, phases, before, behind = (int(part) for part in form)
    schedule.unannotate(blocks[_OUT], FORM)
    inline_elementwise(schedule, pinned=lambda name: name == _ROWS)
    output = only_output(schedule)
    loops = list(schedule.get_loops(output))
    if len(loops) != RANK:
        raise DoesNotFitError("the result is no batch of images")
    work = cycles(schedule, output, machine.lanes)
    task = schedule.fuse(*loops[: 2 if channels_last else 3])
    if _ROWS in blocks:
        work += cycles(schedule, blocks[_ROWS], machine.lanes)
        schedule.compute_at(blocks[_ROWS], task, preserve_unit_loops=True)
        if before or behind:
            row = schedule.get_loops(blocks[_ROWS])[-1]
            inside = int(schedule.get(row).extent) - before - behind
            parts = [part for part in (before, inside, behind) if part]
            schedule.loop_partition(row, [*parts[:-1], None])
    if work >= MIN_PARALLEL_CYCLES:
        schedule.parallel(task)
    if not channels_last and 1 < phases <= MAX_PHASES:
        schedule.unroll(schedule.split(loops[-1], [None, phases])[1])
