"""Schedules of pooling over NCHW: a task makes one row of the result.

The rows of its windows, joined (``pool_rows``), stay in the first level of the cache. Loops along a
row are vectors: as many whole ones as there are, then halves of them. What lies outside the image,
and windows that lie partly outside, have loops of their own.
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

FORM = "hone.pooling"
"""Annotation of a result: how many columns the joined rows have before the image, and behind it;
how many columns of the result at its two ends have windows that lie partly outside; how many
columns apart windows are."""

ROWS, OUT = "pool_rows", "pool_out"
# Axes of a batch of images.
RANK = 4
# Vectors shorter than this are no faster than their elements.
LEAST_LANES = 4
# Each vector of a row is code of its own; longer rows are plain loops.
MOST_VECTORS = 32


def schedule_pooling(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule a function that pools images.

    Raises
    ------
    DoesNotFitError
        The result is no batch of images.
    """
    blocks = {name_of(schedule, block): block for block in leaves(schedule)}
    before, behind, first, last, stride = (
        int(part) for part in schedule.get(blocks[OUT]).annotations[FORM]
    )
    schedule.unannotate(blocks[OUT], FORM)
    inline_elementwise(schedule, pinned=lambda name: name == ROWS)
    output = only_output(schedule)
    loops = list(schedule.get_loops(output))
    if len(loops) != RANK:
        raise DoesNotFitError("the result is no batch of images")
    rows = blocks[ROWS]
    work = cycles(schedule, output, machine.lanes) + cycles(schedule, rows, machine.lanes)
    task = schedule.fuse(*loops[:-1])
    schedule.compute_at(rows, task, preserve_unit_loops=True)
    if work >= MIN_PARALLEL_CYCLES:
        schedule.parallel(task)
    _in_vectors(schedule, machine, schedule.get_loops(rows)[-1], before, behind)
    # Elements that are not neighbours make no vector: LLVM shuffles what it can.
    _in_vectors(schedule, machine, loops[-1], first, last, plain=stride > 1)


def _in_vectors(
    schedule: s_tir.Schedule,
    machine: Machine,
    loop: LoopRV,
    before: int,
    behind: int,
    *,
    plain: bool = False,
) -> None:
    """Make vectors of a loop but for its first and last turns, one piece of it each.

    (A piece does not begin at 0, so that it cannot be split any more.)
    """
    rest = int(schedule.get(loop).extent) - before - behind
    vectors: list[int] = []
    lanes = machine.lanes
    if not plain and rest // lanes <= MOST_VECTORS:
        vectors = [lanes] * (rest // lanes)
        while lanes > LEAST_LANES:
            lanes //= 2
            if rest & lanes:
                vectors.append(lanes)
    rest -= sum(vectors)
    parts = [part for part in (before, *vectors, rest, behind) if part]
    pieces = [loop]
    if len(parts) > 1:
        pieces = list(schedule.loop_partition(loop, [*parts[:-1], None]))
    first = 1 if before else 0
    for piece in pieces[first : first + len(vectors)]:
        schedule.vectorize(piece)
