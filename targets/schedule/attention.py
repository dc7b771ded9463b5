"""Schedule of attention: a task is a head, or rows of one; a block of rows never leaves the cache.

Inside a task, blocks of rows follow one another: products with all keys tile by tile, each stored
as a score, the softmax of the rows, and products with the values. The keys are turned so that
vectors run along them: in the task where it has a head of its own, else for all heads beforehand.
"""

from __future__ import annotations

import math

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from .blocks import (
    MIN_PARALLEL_MULTIPLY_ADDS,
    extents,
    leaves,
    name_of,
    parallelize,
    start_sums,
    vector_length,
)
from .generic import schedule_elementwise_block
from .machine import Machine, divisors
from .rows import vectorize_contiguous

# Annotation of the scores: rows, and vectors of keys, of a register tile.
TILE = "hone.tile"
# How much longer the slowest thread may take than the average, before rows are cut further.
IMBALANCE = 1.05


def schedule_attention(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule the blocks of ``passes/lower/attention``.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Decides tiles and tasks.
    """
    blocks = {name_of(schedule, block): block for block in leaves(schedule)}
    output = _output(schedule, list(blocks.values()))
    sums, scores, keys = blocks["attn_acc"], blocks["attn_scores"], blocks["attn_keys"]
    batch, heads, long, depth, _ = extents(schedule, sums)
    tile_rows, key_vectors = (int(v) for v in schedule.get(scores).annotations[TILE])
    b, h, m, d, s = schedule.get_loops(sums)
    work = 2 * math.prod(extents(schedule, sums))
    lanes = vector_length(depth, machine.lanes)
    most = max(machine.accumulators // tile_rows, 1)
    vectors = max(v for v in range(1, most + 1) if depth // lanes % v == 0)
    blocks_of_rows = long // tile_rows
    parts = _parts(machine, batch * heads, blocks_of_rows)
    m_part, m_block, m_inner = schedule.split(m, [parts, None, tile_rows])
    d_outer, d_vector, d_lane = schedule.split(d, [None, vectors, lanes])
    schedule.reorder(b, h, m_part, m_block, d_outer, s, m_inner, d_vector, d_lane)
    task = schedule.fuse(b, h, m_part)
    schedule.reverse_compute_at(output, d_outer, preserve_unit_loops=True)
    rows = [block for name, block in blocks.items() if name.startswith("row_")]
    for block in reversed(rows):
        schedule.compute_at(block, m_block, preserve_unit_loops=True)
    schedule.compute_at(scores, m_block, preserve_unit_loops=True)
    products_at = _schedule_scores(schedule, machine, scores, key_vectors)
    schedule.compute_at(blocks["attn_products"], products_at, preserve_unit_loops=True)
    if "attn_bias" in blocks:
        schedule_elementwise_block(schedule, machine, blocks["attn_bias"])
    if parts == 1:
        schedule.compute_at(keys, task, preserve_unit_loops=True)
    else:
        schedule_elementwise_block(schedule, machine, keys)
    # Before the sums are split from their start: a loop that holds both parts is refused.
    parallelize(schedule, task, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    _schedule_products(schedule, machine, blocks["attn_products"])
    for block in rows:
        vectorize_contiguous(schedule, machine, block, outer_loops=5)
    schedule.vectorize(d_lane)
    for loop in (m_inner, d_vector):
        schedule.unroll(loop)
    start_sums(schedule, sums, s, outer_loops=3)
    _finish(schedule, output, lanes)


def _output(schedule: s_tir.Schedule, blocks: list[SBlockRV]) -> SBlockRV:
    """Merge what follows the attention into one block, and return it."""
    names = [name_of(schedule, block) for block in blocks]
    epilogue = blocks[names.index("attn_out") :]
    for block in epilogue[:-1]:
        schedule.compute_inline(block)
    return epilogue[-1]


def _finish(schedule: s_tir.Schedule, output: SBlockRV, lanes: int) -> None:
    *_, d = schedule.get_loops(output)
    d_vector, d_lane = schedule.split(d, [None, lanes])
    schedule.vectorize(d_lane)
    schedule.unroll(d_vector)


def _parts(machine: Machine, heads: int, blocks_of_rows: int) -> int:
    """Choose into how many tasks the rows of a head are cut: the fewest that are balanced."""

    def imbalance(parts: int) -> float:
        tasks = heads * parts
        return -(-tasks // machine.threads) * machine.threads / tasks

    options = divisors(blocks_of_rows)
    balanced = (parts for parts in options if imbalance(parts) <= IMBALANCE)
    return next(balanced, min(options, key=imbalance))


def _schedule_scores(
    schedule: s_tir.Schedule, machine: Machine, scores: SBlockRV, vectors: int
) -> LoopRV:
    """Store the scores tile by tile; returns the loop over tiles."""
    m, k = schedule.get_loops(scores)[-2:]
    k_outer, k_vector, k_lane = schedule.split(k, [None, vectors, machine.lanes])
    schedule.reorder(k_outer, m, k_vector, k_lane)
    schedule.vectorize(k_lane)
    for loop in (m, k_vector):
        schedule.unroll(loop)
    return k_outer


def _schedule_products(schedule: s_tir.Schedule, machine: Machine, products: SBlockRV) -> None:
    """Keep a tile of products in registers."""
    loops = schedule.get_loops(products)
    m, k, d = loops[-3:]
    k_vector, k_lane = schedule.split(k, [None, machine.lanes])
    schedule.reorder(d, m, k_vector, k_lane)
    schedule.vectorize(k_lane)
    for loop in (m, k_vector):
        schedule.unroll(loop)
    start_sums(schedule, products, d, outer_loops=len(loops) - 3)
