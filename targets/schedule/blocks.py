"""Questions about the blocks of a TIR schedule, and steps that several schedules share."""

from __future__ import annotations

import math
from collections.abc import Callable

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

# Starting a parallel region on a package's own threads costs about 0.5 us, in which one core does
# some 2**15 multiply-adds of whole vectors or 2**12 steps that touch memory; below twice that a
# second thread never pays (measured on five networks, docs/performance.md).
MIN_PARALLEL_MULTIPLY_ADDS = 1 << 16
MIN_PARALLEL_STEPS = 1 << 13

# The same in cycles of arithmetic, for bodies from a copy to an exponential: two starts of 0.5 us.
MIN_PARALLEL_CYCLES = 1 << 12
# Vector operations that issue in each cycle on the cores in the tables.
OPERATIONS_PER_CYCLE = 2

# Annotation of a loop that streams through weights: how many elements ahead they are requested.
PREFETCH = "hone.prefetch"
# The same where a tile of weights is read in several passes: ``[elements, passes, into]``, the last
# one 3 for the first level of the cache and 2 for the second.
PREFETCH_TILE = "hone.prefetch_tile"
# Annotation of a loop of sums whose epilogue's lines are requested, one after the other:
# ``[first, apart]``, the turn in which the first line is and how many turns later the next one.
PREFETCH_EPILOGUE = "hone.prefetch_epilogue"
# Steps of a sum from one line to the next, the best first: a step takes up to 14 cycles, and a line
# from memory some 50 where two cores read it.
REQUEST_STEPS = (4, 2)
# Steps behind the last request, in which its line arrives.
LAST_STEPS = 8
# Bytes that one request brings.
LINE_BYTES = 64
# The same where several loops, one behind the other, read a slab of weights, each ``passes`` times:
# ``[elements, passes]``.
PREFETCH_SLAB = "hone.prefetch_slab"

REDUCE = 2  # tirx.IterVar.CommReduce
SPATIAL = 0  # tirx.IterVar.DataPar


class DoesNotFitError(Exception):
    """A function is not of the form that a template schedules; the message says why."""


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


def item_bytes(schedule: s_tir.Schedule, block: SBlockRV, index: int) -> int:
    """Return the bytes of an element of the tensor that the block reads at a position."""
    source = schedule.get(block).reads[index].source
    return int(tvm.runtime.DataType(str(source.dtype)).itemsize)


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


def prefetch_ahead(schedule: s_tir.Schedule, loop: LoopRV, distance: int) -> None:
    """Mark a loop whose vectors are to be requested so many elements ahead; 0 marks nothing."""
    if distance:
        schedule.annotate(loop, PREFETCH, distance)


def prefetch_epilogue(
    schedule: s_tir.Schedule,
    output: SBlockRV,
    loop: LoopRV,
    *,
    pixels: int,
    channels: int,
    l2_bytes: int,
) -> None:
    """Mark a loop of sums so that what the epilogue touches for each pixel is requested during it.

    14 pixels of two vectors are 28 lines. In a sum of 64 steps every second step requests one more,
    in one of 512 every fourth of the last 120. The steps between ask for the same line again: to
    cut the loop into turns of two, which LLVM unrolls and then spills, took 2.3 times as long.
    Results below a quarter of L2 stay in the core that writes them, and are not requested.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    output : SBlockRV
        The epilogue.
    loop : LoopRV
        All of the sum, or the outer part of it.
    pixels, channels : int
        Of the register tile.
    l2_bytes : int
        Cache of one core.
    """
    result = schedule.get(output).writes[0].source
    size = tvm.runtime.DataType(str(result.dtype)).itemsize
    if pixels == 1 or math.prod(int(extent) for extent in result.shape) * size * 4 < l2_bytes:
        return
    lines = pixels * -(-channels * size // LINE_BYTES)
    steps = int(schedule.get(loop).extent)
    apart = next((count for count in REQUEST_STEPS if steps // count >= lines), 1)
    first = max(steps - lines * apart - LAST_STEPS, 0)
    schedule.annotate(loop, PREFETCH_EPILOGUE, [first, apart])


def prefetch_tile(
    schedule: s_tir.Schedule, loop: LoopRV, *, elements: int, passes: int, l1_bytes: int
) -> None:
    """Mark a loop that reads one tile of weights in each of several passes.

    The next tile is requested during them: into the first level where it leaves most of it free.
    """
    into = 3 if elements * 4 <= l1_bytes * 3 // 8 else 2
    schedule.annotate(loop, PREFETCH_TILE, [elements, passes, into])


def parallelize(schedule: s_tir.Schedule, loop: LoopRV, *, work: int, least: int) -> None:
    """Run a loop in parallel if its work pays for starting the threads."""
    if work >= least:
        schedule.parallel(loop)


def is_scheduled(func: tirx.PrimFunc) -> bool:
    """Say whether a function was scheduled before (by a tuning record)."""
    return bool(func.attrs and func.attrs.get("tirx.is_scheduled", False))


def _operations(expression: tirx.Expr, seen: set[int]) -> int:
    """Return how many operations and loads an expression needs, shared ones counted once."""
    key = expression.__chandle__()
    if key in seen:
        return 0
    seen.add(key)
    parts: list[tirx.Expr] = []
    if isinstance(expression, tvm.ir.expr.TensorLoad):
        return 1
    if isinstance(expression, tirx.Let):
        return sum(_operations(part, seen) for part in (expression.value, expression.body))
    if isinstance(expression, tvm.ir.Call):
        parts = list(expression.args)
    elif isinstance(expression, tirx.Select):
        parts = [expression.condition, expression.true_value, expression.false_value]
    elif isinstance(expression, tirx.Cast):
        parts = [expression.value]
    elif hasattr(expression, "a") and hasattr(expression, "b"):
        parts = [expression.a, expression.b]
    else:
        return 0
    return 1 + sum(_operations(part, seen) for part in parts)


def cycles(schedule: s_tir.Schedule, block: SBlockRV, lanes: int) -> int:
    """Return about how many cycles a block takes on one core, in vectors."""
    body = schedule.get(block).body
    if not isinstance(body, tirx.BufferStore):
        raise DoesNotFitError(f"{name_of(schedule, block)} stores more than one value")
    operations = 1 + _operations(body.value, set())
    return math.prod(extents(schedule, block)) * operations // (lanes * OPERATIONS_PER_CYCLE)


def only_output(schedule: s_tir.Schedule) -> SBlockRV:
    """Return the one block that writes the function's result.

    Raises
    ------
    DoesNotFitError
        There are several.
    """
    blocks = list(schedule.get_output_blocks(schedule.get_sblock("root")))
    if len(blocks) != 1:
        raise DoesNotFitError(f"the function has {len(blocks)} results")
    return blocks[0]


def inline_elementwise(schedule: s_tir.Schedule, *, pinned: Callable[[str], bool]) -> None:
    """Inline every elementwise block that one other block reads, except outputs.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    pinned : callable
        Says by its name that a block keeps its own loops.
    """
    outputs = {
        name_of(schedule, block)
        for block in schedule.get_output_blocks(schedule.get_sblock("root"))
    }
    for block in leaves(schedule):
        name = name_of(schedule, block)
        if name in outputs or pinned(name) or is_reduction(schedule, block):
            continue
        if len(schedule.get_consumers(block)) != 1:
            continue
        try:
            schedule.compute_inline(block)
        except s_tir.ScheduleError:
            # Not invertible or a partial write: the block keeps its own loops.
            continue


def _ends_with(
    region: list[tirx.Expr], shape: list[int], suffix: list[tirx.Var], extents: list[int]
) -> bool:
    """Say whether an access runs through its buffer as the suffix's loops do, or ignores them."""
    inside = [any(at.same_as(variable) for variable in suffix) for at in region]
    if not any(inside):
        # An index that is computed from the loops would still depend on them.
        return all(isinstance(at, tirx.Var | tirx.IntImm) for at in region)
    tail = region[-len(suffix) :]
    return len(tail) == len(suffix) and all(
        at.same_as(variable) and extent in (None, size)
        for at, variable, extent, size in zip(
            tail, suffix, [None, *extents[1:]], shape[-len(suffix) :], strict=True
        )
    )


def fuse_contiguous(schedule: s_tir.Schedule, block: SBlockRV, loops: list[LoopRV]) -> list[LoopRV]:
    """Fuse the innermost loops of an elementwise block that run through memory as one.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    block : SBlockRV
        Its last iteration variables belong to the loops, one each.
    loops : list of LoopRV
        The block's innermost loops.

    Returns
    -------
    list of LoopRV
        The loops, the last ones fused where every access allows it.
    """
    statement = schedule.get(block)
    variables = [axis.var for axis in statement.iter_vars][-len(loops) :]
    accesses = [
        (
            [axis.min for axis in region.region],
            [int(extent) for extent in region.source.shape],
        )
        for region in [*statement.reads, *statement.writes]
    ]
    sizes = [int(schedule.get(loop).extent) for loop in loops]
    count = 1
    while count < len(loops) and all(
        _ends_with(region, shape, variables[-count - 1 :], sizes[-count - 1 :])
        for region, shape in accesses
    ):
        count += 1
    if count == 1:
        return loops
    return [*loops[:-count], schedule.fuse(*loops[-count:])]
