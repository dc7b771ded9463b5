"""Questions about the blocks of a TIR schedule, and steps that several schedules share."""

from __future__ import annotations

import math

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

# Starting a parallel region costs about 2 us, in which one core does some 2**17 multiply-adds of
# whole vectors or 2**14 steps that touch memory; below twice that a second thread never pays.
MIN_PARALLEL_MULTIPLY_ADDS = 1 << 18
MIN_PARALLEL_STEPS = 1 << 15

REDUCE = 2  # tirx.IterVar.CommReduce
SPATIAL = 0  # tirx.IterVar.DataPar


def leaves(schedule: s_tir.Schedule) -> list[SBlockRV]:
    """Return the blocks below the root, in program order."""
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def name_of(schedule: s_tir.Schedule, block: SBlockRV) -> str:
    """Return the block's name."""
    return str(schedule.get(block).name_hint)


def extents(schedule: s_tir.Schedule, block: SBlockRV) -> list[int]:
    """Return the extents of the block's loops, outermost first."""
    return [int(schedule.get(loop).extent) for loop in schedule.get_loops(block)]


def kinds(schedule: s_tir.Schedule, block: SBlockRV) -> list[int]:
    """Return the kind of each of the block's iteration variables."""
    return [int(variable.iter_type) for variable in schedule.get(block).iter_vars]


def is_reduction(schedule: s_tir.Schedule, block: SBlockRV) -> bool:
    """Say whether the block sums (or takes a maximum) over an axis."""
    return REDUCE in kinds(schedule, block)


def read_shape(schedule: s_tir.Schedule, block: SBlockRV, index: int) -> list[int]:
    """Return the shape of the tensor that the block reads at a position."""
    return [int(extent) for extent in schedule.get(block).reads[index].source.shape]


def vector_length(extent: int, lanes: int) -> int:
    """Return the largest power of two up to ``lanes`` that divides the extent."""
    return math.gcd(extent, lanes)


def output_block(schedule: s_tir.Schedule, anchor: SBlockRV, blocks: list[SBlockRV]) -> SBlockRV:
    """Merge the epilogue into one block, and return it.

    All elementwise stages after the anchor are inlined into the last one. Without an epilogue a
    copy stage is made, so that partial sums live in a small local buffer in every case.
    """
    names = [name_of(schedule, block) for block in blocks]
    epilogue = blocks[names.index(name_of(schedule, anchor)) + 1 :]
    if not epilogue:
        return schedule.cache_write(anchor, 0, "global")
    for block in epilogue[:-1]:
        schedule.compute_inline(block)
    return epilogue[-1]


def finish_output(
    schedule: s_tir.Schedule, block: SBlockRV, *, outer_loops: int, lanes: int
) -> None:
    """Unroll and vectorize the stage that stores a finished register tile."""
    loops = schedule.get_loops(block)[outer_loops:]
    extent = int(schedule.get(loops[-1]).extent)
    outer, inner = schedule.split(loops[-1], [None, vector_length(extent, lanes)])
    schedule.vectorize(inner)
    for loop in [*loops[:-1], outer]:
        schedule.unroll(loop)


def start_sums(schedule: s_tir.Schedule, anchor: SBlockRV, at: LoopRV, *, outer_loops: int) -> None:
    """Split the zeroing of a register tile off the reduction; unroll and vectorize it."""
    loops = schedule.get_loops(schedule.decompose_reduction(anchor, at))
    schedule.vectorize(loops[-1])
    for loop in loops[outer_loops:-1]:
        schedule.unroll(loop)


def parallelize(schedule: s_tir.Schedule, loop: LoopRV, *, work: int, least: int) -> None:
    """Run a loop in parallel if its work pays for starting the threads."""
    if work >= least:
        schedule.parallel(loop)


def is_scheduled(func: tirx.PrimFunc) -> bool:
    """Say whether a function was scheduled before (by a tuning record)."""
    return bool(func.attrs and func.attrs.get("tirx.is_scheduled", False))
