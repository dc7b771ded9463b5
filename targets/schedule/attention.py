"""Schedule of attention: a task is a head, or rows of one; a block of rows never leaves the cache.

Inside a task, blocks of rows follow one another, and for each the blocks of keys: products tile by
tile, each stored as a score, the softmax of the rows, and products with the values. The keys are
turned so that vectors run along them: in the task where it has a head of its own, else for all
heads beforehand. Where a row sees no key behind it, loops along keys are marked, so that
`hone.passes.lower.skip_hidden_keys` ends them at the last key that their block of rows sees; tasks
take blocks of rows in turn, so that each has as many keys.
"""

from __future__ import annotations

import math

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from hone.targets.transpose_intrinsics import SIDES, intrinsic_name

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
# Annotation of the scores: that row m sees the keys up to so many more.
CAUSAL = "hone.causal"
# Annotation of a loop of which the first row of a block depends: ``(loop % n) * step`` is added to
# it, ``[n, step]``.
ROWS = "hone.rows"
# Annotation of a loop along keys: ``[wide, turns, more]``, so many turns for each ``wide`` keys, of
# which it needs ``first row + more``.
KEYS = "hone.keys"
# How much longer the slowest thread may take than the average, before rows are cut further.
IMBALANCE = 1.05
# Blocks that are computed for all heads, before the tasks or in one that has a head of its own.
_BEFOREHAND = ("attn_keys", "attn_rows", "attn_bias", "attn_cover", "attn_values")


def schedule_attention(schedule: s_tir.Schedule, machine: Machine) -> None:
    """Schedule the blocks of ``passes/lower/attention_kernel``.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Decides tiles and tasks.
    """
    output = _output(schedule)
    blocks = {name_of(schedule, block): block for block in leaves(schedule)}
    mean, scores = blocks["attn_mean"], blocks["attn_scores0"]
    count = sum(name.startswith("attn_acc") for name in blocks)
    if count == 1:
        schedule.compute_inline(blocks.pop("attn_run0"))
    tile_rows, key_vectors = (int(v) for v in schedule.get(scores).annotations[TILE])
    batch, heads, long, channels = extents(schedule, mean)
    *_, depth = extents(schedule, blocks["attn_products0"])
    *_, block_keys = extents(schedule, scores)
    shared = heads // extents(schedule, blocks["attn_keys"])[1]
    tile = _Tile(machine, tile_rows, channels)
    parts = _parts(machine, batch * heads, long // tile_rows)
    b, h, m, c = schedule.get_loops(mean)
    m_block, m_part, m_inner = schedule.split(m, [None, parts, tile_rows])
    c_outer, c_inner = schedule.split(c, [None, tile.vectors * tile.lanes])
    schedule.reorder(b, h, m_part, m_block, c_outer, m_inner, c_inner)
    task = schedule.fuse(b, h, m_part)
    hidden = _Hidden(schedule, scores, tile_rows)
    hidden.mark_rows(task, parts, tile_rows)
    hidden.mark_rows(m_block, long // tile_rows // parts, parts * tile_rows)
    schedule.reverse_compute_at(output, c_outer, preserve_unit_loops=True)
    sums = {}
    rows, products = [], []
    runs = {"attn_acc0": c_outer} if count == 1 else {}
    own = [name for name in blocks if name not in ("attn_mean", name_of(schedule, output))]
    for name in reversed(own):
        block = blocks[name]
        if name.startswith(_BEFOREHAND):
            continue
        if name.startswith("attn_acc"):
            schedule.compute_at(block, runs[name], preserve_unit_loops=True)
            sums[name] = block
        elif name.startswith("attn_products"):
            schedule.compute_at(block, runs[name], preserve_unit_loops=True)
            products.append(block)
        elif name.startswith("attn_run"):
            schedule.compute_at(block, m_block, preserve_unit_loops=True)
            runs[name.replace("run", "acc")] = tile.split(schedule, block)
        elif name.startswith("attn_scores"):
            schedule.compute_at(block, m_block, preserve_unit_loops=True)
            at = _schedule_scores(schedule, machine, block, key_vectors)
            hidden.mark_keys(block, at, wide=key_vectors * machine.lanes, turns=1)
            runs[name.replace("scores", "products")] = at
        else:
            schedule.compute_at(block, m_block, preserve_unit_loops=True)
            rows.append(block)
    _schedule_keys(schedule, machine, blocks, task if parts == shared == 1 else None)
    for name in ("attn_bias", "attn_cover", "attn_values"):
        if name in blocks:
            schedule_elementwise_block(schedule, machine, blocks[name])
    # Before the sums are split from their start: a loop that holds both parts is refused.
    work = batch * heads * long * block_keys * count * (depth + channels)
    parallelize(schedule, task, work=work, least=MIN_PARALLEL_MULTIPLY_ADDS)
    for block in products:
        _schedule_products(schedule, machine, block)
    for block in rows:
        vectorize_contiguous(schedule, machine, block, outer_loops=5)
        hidden.mark_row(block, wide=key_vectors * machine.lanes)
    for block in sums.values():
        hidden.mark_keys(block, tile.schedule_sums(schedule, block), wide=1, turns=1)
    tile.finish(schedule, [m_inner], c_inner)
    tile.finish(schedule, [], schedule.get_loops(output)[-1])


class _Tile:
    """The register tile of the products with the values: rows, and vectors of channels."""

    def __init__(self, machine: Machine, rows: int, channels: int) -> None:
        self.rows = rows
        self.lanes = vector_length(channels, machine.lanes)
        most = max(machine.accumulators // rows, 1)
        self.vectors = max(v for v in range(1, most + 1) if channels // self.lanes % v == 0)

    def split(self, schedule: s_tir.Schedule, block: SBlockRV) -> LoopRV:
        """Cut an elementwise block of a row block into tiles; returns the loop over them."""
        m, c = schedule.get_loops(block)[-2:]
        c_outer, c_inner = schedule.split(c, [None, self.vectors * self.lanes])
        schedule.reorder(c_outer, m, c_inner)
        self.finish(schedule, [m], c_inner)
        return c_outer

    def finish(self, schedule: s_tir.Schedule, rows: list[LoopRV], channels: LoopRV) -> None:
        """Unroll a tile and vectorize its channels."""
        vector, lane = schedule.split(channels, [None, self.lanes])
        schedule.vectorize(lane)
        for loop in (*rows, vector):
            schedule.unroll(loop)

    def schedule_sums(self, schedule: s_tir.Schedule, block: SBlockRV) -> LoopRV:
        """Keep a tile of sums in registers; returns the loop along keys."""
        loops = schedule.get_loops(block)
        m, c, s = loops[-3:]
        c_vector, c_lane = schedule.split(c, [None, self.lanes])
        schedule.reorder(s, m, c_vector, c_lane)
        schedule.vectorize(c_lane)
        for loop in (m, c_vector):
            schedule.unroll(loop)
        start_sums(schedule, block, s, outer_loops=len(loops) - 3)
        return s


class _Hidden:
    """Marks loops along keys, of which a block of rows may see only the first ones."""

    def __init__(self, schedule: s_tir.Schedule, scores: SBlockRV, rows: int) -> None:
        self._schedule = schedule
        self._keys = extents(schedule, scores)[-1]
        causal = schedule.get(scores).annotations.get(CAUSAL)
        # Keys that the last row of the first block sees.
        self._more = None if causal is None else int(causal) + rows

    def mark_rows(self, loop: LoopRV, count: int, step: int) -> None:
        """Mark a loop of which the first row depends."""
        if self._more is not None:
            self._schedule.annotate(loop, ROWS, [count, step])

    def mark_keys(self, block: SBlockRV, loop: LoopRV, *, wide: int, turns: int) -> None:
        """Mark a loop along keys that makes so many turns for so many keys."""
        if self._more is not None:
            more = self._more - self._index(block) * self._keys
            self._schedule.annotate(loop, KEYS, [wide, turns, more])

    def mark_row(self, block: SBlockRV, *, wide: int) -> None:
        """Mark the loop along keys of a scheduled step of the softmax, where it has one."""
        name = name_of(self._schedule, block)
        loops = self._schedule.get_loops(block)
        along = {"row_exp": -2, "row_par": -3}.get(name[:7])
        if along is not None:
            turns = int(self._schedule.get(loops[along]).extent) * wide // self._keys
            self.mark_keys(block, loops[along], wide=wide, turns=turns)

    def _index(self, block: SBlockRV) -> int:
        """Return which block of keys a block of the schedule belongs to."""
        name = name_of(self._schedule, block)
        if name.startswith("attn_"):
            return int(
                name.removesuffix("_update").removeprefix("attn_scores").removeprefix("attn_acc")
            )
        before = {name_of(self._schedule, b): b for b in self._schedule.get_producers(block)}
        reads = (b for n, b in before.items() if n.startswith(("attn_scores", "row_exp")))
        return self._index(next(reads))


def _output(schedule: s_tir.Schedule) -> SBlockRV:
    """Merge what follows the attention into one block, and return it."""
    blocks = leaves(schedule)
    names = [name_of(schedule, block) for block in blocks]
    epilogue = blocks[names.index("attn_out") :]
    for block in epilogue[:-1]:
        schedule.compute_inline(block)
    return epilogue[-1]


def _parts(machine: Machine, heads: int, blocks_of_rows: int) -> int:
    """Choose into how many tasks the rows of a head are cut: the fewest that are balanced."""

    def imbalance(parts: int) -> float:
        tasks = heads * parts
        return -(-tasks // machine.threads) * machine.threads / tasks

    options = divisors(blocks_of_rows)
    balanced = (parts for parts in options if imbalance(parts) <= IMBALANCE)
    return next(balanced, min(options, key=imbalance))


def _schedule_keys(
    schedule: s_tir.Schedule,
    machine: Machine,
    blocks: dict[str, SBlockRV],
    task: LoopRV | None,
) -> None:
    """Turn the keys square by square, in a task or in a loop of its own."""
    keys, rows = blocks["attn_keys"], blocks["attn_rows"]
    sizes = extents(schedule, keys)
    if task is not None:
        schedule.compute_at(keys, task, preserve_unit_loops=True)
    side = vector_length(math.gcd(sizes[-1], sizes[-2]), machine.lanes)
    if side not in SIDES:
        schedule.compute_inline(rows)
        if task is None:
            schedule_elementwise_block(schedule, machine, keys)
        return
    *outer, d, s = schedule.get_loops(keys)
    s_outer, s_inner = schedule.split(s, [None, side])
    d_outer, d_inner = schedule.split(d, [None, side])
    schedule.reorder(s_outer, d_outer, d_inner, s_inner)
    if task is None:
        outer = [schedule.fuse(*outer, s_outer)]
        schedule.parallel(outer[0])
        s_outer = outer[0]
    schedule.compute_at(rows, s_outer, preserve_unit_loops=True)
    vectorize_contiguous(schedule, machine, rows, outer_loops=len(schedule.get_loops(rows)) - 1)
    schedule.tensorize(d_inner, intrinsic_name(side))


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
