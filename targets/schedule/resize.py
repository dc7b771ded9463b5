"""Schedules of 2-D resizing, and of pooling over NCHW: a task makes one row of the result.

The row that interpolation or pooling joins first (``resize_rows``, ``pool_rows``) stays in the
cache of the task's core. In NHWC the innermost loops are channels, in NCHW columns: an integer
scale makes each phase of its columns run through memory, and what lies outside the input has loops
of its own. Innermost loops stay plain: LLVM makes vectors of them, the remainder included.
"""

from __future__ import annotations

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV

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
lie along one of the input's; how many columns are read before the input, and behind it; how many
columns of the result at its two ends have loops of their own."""

ROWS = ("resize_rows", "pool_rows")
OUT = ("resize_out", "pool_out")
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
    result = next(block for name, block in blocks.items() if name in OUT)
    rows = next((block for name, block in blocks.items() if name in ROWS), None)
    form = schedule.get(result).annotations[FORM]
    channels_last, phases, before, behind, *ends = (int(part) for part in form)
    schedule.unannotate(result, FORM)
    inline_elementwise(schedule, pinned=lambda name: name in ROWS)
    output = only_output(schedule)
    loops = list(schedule.get_loops(output))
    if len(loops) != RANK:
        raise DoesNotFitError("the result is no batch of images")
    work = cycles(schedule, output, machine.lanes)
    task = schedule.fuse(*loops[: 2 if channels_last else 3])
    if rows is not None:
        work += cycles(schedule, rows, machine.lanes)
        schedule.compute_at(rows, task, preserve_unit_loops=True)
        _part(schedule, schedule.get_loops(rows)[-1], before, behind)
    if work >= MIN_PARALLEL_CYCLES:
        schedule.parallel(task)
    if not channels_last and 1 < phases <= MAX_PHASES:
        schedule.unroll(schedule.split(loops[-1], [None, phases])[1])
    elif ends:
        _part(schedule, loops[-1], *ends)


def _part(schedule: s_tir.Schedule, loop: LoopRV, before: int, behind: int) -> None:
    """Give the first and the last turns of a loop loops of their own."""
    if before or behind:
        inside = int(schedule.get(loop).extent) - before - behind
        parts = [part for part in (before, inside, behind) if part]
        if len(parts) > 1:
            schedule.loop_partition(loop, [*parts[:-1], None])
