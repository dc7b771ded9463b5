"""Chooses how many input channels of a tile of weights pass all pixels at once.

A register tile of few pixels reads its weights faster than memory delivers them: a step of 7 pixels
by 2 vectors takes 7 cycles and 128 bytes, of which a core's share of the stream is 70. As long as
the register tile holds its sums from the first tap to the last, the first pass over a tile of
weights waits for memory while the others find them in L2, which they must fit. In chunks, the sums
of all pixels lie in a small buffer, every pixel takes a chunk before the next one is needed, and
the stream never rests.
"""

from __future__ import annotations

from .machine import (
    FMA_PER_CYCLE,
    L3_BYTES_PER_CYCLE,
    MOST_OPTIONS,
    Machine,
    divisors,
    prefetch_distance,
)

CHUNK = "hone_chunk"
"""Attribute of the block of sums: the chunk that the lowering chose, which knows the model's
weights."""
WHOLE = 0
"""The chunk that stands for all channels of all taps: sums stay in registers to the end."""
# Of the first level that a chunk may take: the next one arrives beside it, and the input streams.
L1_SHARE = 3 / 8
# Shorter passes are mostly their loads and stores of sums.
LEAST_STEPS = 16
# Bytes of sums that stay on the stack, where LLVM sees that nothing else writes them and keeps a
# tile of them in registers; see `hone.passes.lower.promote_accumulators`.
MOST_SUM_BYTES = 16 * 1024
# Cycles of starting and ending one pass of a register tile: a loop that is left is mispredicted
# once, and the last products are waited for.
PASS_CYCLES = 25


def chunk_cycles(
    machine: Machine,
    *,
    sums: int,
    vectors: int,
    passes: int,
    taps: int,
    depth: int,
    weight_bytes: int,
) -> dict[int, float]:
    """Return what a tile of weights costs beside its products, by the chunk that it is read in.

    Whole, the first pass waits, or every one where the tile does not fit a third of L2:
    ``taps x depth x (bytes of a step / a core's share of the stream - cycles of a step)``. In
    chunks each pass loads and stores its sums: ``taps x depth / chunk x passes x (1.5 sums + 25)``.
    For 2048 channels of one tap and 7 passes of 7 x 2 sums that is ``2048 (12.8 - 7) = 11 900``
    cycles and, in chunks of 128, ``16 x 7 x 46 = 5 200``, beside 100 000 of the products.

    Parameters
    ----------
    machine : Machine
        Caches, lanes, threads and the rate of weights.
    sums, vectors : int
        Of the register tile.
    passes : int
        Register tiles that read one tile of weights.
    taps, depth : int
        What is summed.
    weight_bytes : int
        Of all weights of the layer.

    Returns
    -------
    dict of int to float
        Cycles of one core, by the input channels of a chunk, divisors of ``depth``. `WHOLE` is left
        out where it can be: for several vectors whose tile of weights does not fit L2.
    """
    steps, step_bytes = taps * depth, vectors * machine.lanes * 4
    wait = 0.0
    if prefetch_distance(machine, rows=passes * sums // vectors, weight_bytes=weight_bytes):
        rate = machine.weight_bytes_per_cycle / machine.threads
        stream = step_bytes / (max(rate, L3_BYTES_PER_CYCLE) if machine.l3_holds else rate)
        wait = steps * max(stream - sums / FMA_PER_CYCLE, 0)
    costs = {}
    if passes > 1 and passes * sums * machine.lanes * 4 <= MOST_SUM_BYTES:
        for chunk in divisors(depth):
            if chunk >= LEAST_STEPS and chunk * step_bytes <= L1_SHARE * machine.l1_bytes:
                costs[chunk] = steps / chunk * passes * (1.5 * sums + PASS_CYCLES)
    held = steps * step_bytes <= machine.l2_bytes // 3
    if held or vectors == 1 or not costs:
        costs[WHOLE] = wait if held else passes * wait
    return costs


def cheapest_chunk(costs: dict[int, float]) -> int:
    """Return the chunk of the least cycles, `WHOLE` where it is as cheap as another."""
    return min(costs, key=lambda chunk: (costs[chunk], chunk != WHOLE))


def pick_chunk(machine: Machine, noted: int, **layer: int) -> int:
    """Pick the chunk of a kernel: the noted one, unless tuning decided for another.

    Parameters
    ----------
    machine : Machine
        Decides.
    noted : int
        What the lowering chose, see `CHUNK`.
    layer : int
        See `chunk_cycles`.

    Returns
    -------
    int
        A divisor of the depth, or `WHOLE`.
    """
    costs = chunk_cycles(machine.plain, **layer)
    ranked = dict.fromkeys((noted, WHOLE, *sorted(costs, key=lambda chunk: costs[chunk])))
    chunks = [chunk for chunk in ranked if chunk == WHOLE or chunk in costs][: MOST_OPTIONS // 2]
    return machine.pick("chunk", {str(chunk) if chunk else "whole": chunk for chunk in chunks})
