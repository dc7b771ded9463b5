"""The model that chooses register tiles of convolutions and matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from .machine import (
    FMA_LATENCY,
    FMA_PER_CYCLE,
    L2_BYTES_PER_CYCLE,
    MOST_OPTIONS,
    RESERVED_REGISTERS,
    Machine,
    divisors,
    prefetch_distance,
)
from .weight_chunks import WHOLE, cheapest_chunk, chunk_cycles

# Share of a cycle that each load of a step takes beside the products, and loads that a request of a
# weight ahead of its use counts for. For these numbers see docs/performance.md, "Register tiles".
LOAD_CYCLES = 0.02
REQUEST_LOADS = 4
# Cycles until a sum takes its next product: the latency of one, and one for what comes late.
SUM_CYCLES = FMA_LATENCY + 1
# Sums that are finished while the next tile begins, and the cycles that each one beyond them takes:
# an epilogue of 28 vectors is longer than what a core executes out of order. Not so in matrix
# products (Winograd's too), of which 27 sums measured best where 18 are modelled as fast.
HIDDEN_SUMS = 16
EXPOSED_CYCLES = 4
# A width that is no multiple of the tile costs a copy with extra columns.
RAGGED = 1.03
# Tiles that round the width to something else are offered to tuning where they are modelled this
# close to the best one.
CLOSE = 1.1


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The register tile of a convolution or matrix product.

    Parameters
    ----------
    rows, columns : int
        Output pixels of the tile; for a matrix product, ``rows`` is 1 and ``columns`` counts rows
        of the left matrix.
    vectors : int
        Vectors of output channels.
    """

    rows: int
    columns: int
    vectors: int


def most_sums(machine: Machine, vectors: int) -> int:
    """Return how many sums fit the registers beside a step's weights and one broadcast input.

    Of 32 registers 28 may hold sums, but 7 x 4 of them with 4 weight vectors and the input need 33:
    two sums then go through memory in every step.
    """
    return min(machine.accumulators, machine.accumulators + RESERVED_REGISTERS - vectors - 1)


def _tile_cycles(
    machine: Machine,
    tile: Tile,
    *,
    steps: int,
    requests: bool,
    image: bool,
    in_chunks: bool = False,
) -> float:
    """Return the cycles of one register tile.

    Parameters
    ----------
    machine : Machine
        Registers, lanes and caches.
    tile : Tile
        Pixels and vectors.
    steps : int
        Products that each sum is made of.
    requests : bool
        Whether weights are requested ahead of their use.
    image : bool
        Whether it is a tile of an image, not of a matrix product.
    in_chunks : bool
        Whether its weights are read in chunks, which lie in L1.
    """
    pixels = tile.rows * tile.columns
    sums, loads = pixels * tile.vectors, pixels + tile.vectors
    step_bytes = tile.vectors * machine.lanes * 4
    from_l2 = not in_chunks and step_bytes * steps > machine.l1_bytes // 2
    stream = step_bytes / L2_BYTES_PER_CYCLE if from_l2 else 0
    beside = loads + (REQUEST_LOADS * tile.vectors if requests else 0)
    busy = sums / FMA_PER_CYCLE + LOAD_CYCLES * beside
    exposed = EXPOSED_CYCLES * max(sums - HIDDEN_SUMS, 0) if image else 0
    return max(busy, loads / 2, SUM_CYCLES, stream) * steps + sums + exposed


def choose_tile(
    machine: Machine,
    *,
    height: int,
    width: int,
    channels: int,
    depth: int,
    taps: int,
    chunks: bool = False,
) -> Tile:
    """Choose the register tile with the least modelled cycles.

    A step of a tile, one input channel of one tap, takes ``max(fma / 2 + loads / 50, loads / 2,
    latency, weight bytes / L2 rate)`` cycles; its end takes one for each sum, and of an image four
    more for each beyond 16. ``rows x columns x vectors`` accumulators must fit the registers, and
    two weight tiles must share two thirds of L2, so that the next one can arrive while one is in
    use. Threads share the tiles, and wait for the one that has most.

    Worked number: 8 pixels by 2 vectors take ``8 + 0.2`` cycles for 16 products, 0.513 each; 14 by
    2 take ``14 + 0.32`` for 28, 0.511. Over 64 channels, their ends included, it is 0.528 and
    0.554, over 1024 0.513 and 0.514.

    Parameters
    ----------
    machine : Machine
        Registers, lanes and caches.
    height, width : int
        Output image; a matrix product has ``height=1`` and its rows as ``width``.
    channels : int
        Output channels.
    depth : int
        Input channels that are summed.
    taps : int
        Kernel positions, ``R x S``.
    chunks : bool
        The schedule may read a tile of weights in chunks (`chunk_of`), which need not fit L2; then
        what either way costs beside the products is counted too.

    Returns
    -------
    Tile
        ``columns`` need not divide ``width``: the caller rounds the width up.
    """
    shape = {"height": height, "width": width, "channels": channels, "depth": depth, "taps": taps}
    tiles = ranked_tiles(machine.plain, **shape, chunks=chunks)
    return pick_tile(machine, tiles, **shape)


def chunk_of(
    machine: Machine,
    tile: Tile,
    *,
    height: int,
    width: int,
    channels: int,
    depth: int,
    taps: int,
) -> int:
    """Return the chunk of input channels that a tile's weights are read in, see `weight_chunks`.

    Parameters
    ----------
    machine : Machine
        Registers, lanes and caches.
    tile : Tile
        Of registers; the other parameters are those of `choose_tile`.

    Returns
    -------
    int
        A divisor of ``depth``, or `WHOLE`.
    """
    shape = {"height": height, "width": width, "channels": channels, "depth": depth, "taps": taps}
    return cheapest_chunk(_beside(machine, tile, **shape))


def _beside(
    machine: Machine,
    tile: Tile,
    *,
    height: int,
    width: int,
    channels: int,
    depth: int,
    taps: int,
) -> dict[int, float]:
    return chunk_cycles(
        machine,
        sums=tile.rows * tile.columns * tile.vectors,
        vectors=tile.vectors,
        passes=height // tile.rows * -(-width // tile.columns),
        taps=taps,
        depth=depth,
        weight_bytes=channels * depth * taps * 4,
    )


def pick_tile(
    machine: Machine,
    tiles: tuple[Tile, ...],
    *,
    height: int,
    width: int,
    channels: int,
    depth: int,
    taps: int,
) -> Tile:
    """Take one of several tiles of a layer; the point is named after the layer's geometry."""
    point = f"pack {height}x{width}x{depth}x{taps} to {channels}"
    names = [f"{tile.rows}x{tile.columns}x{tile.vectors}" for tile in tiles]
    return machine.pick(point, dict(zip(names, tiles, strict=True)))


def ranked_tiles(machine: Machine, **shape: int) -> tuple[Tile, ...]:
    """Return register tiles, best first; see `choose_tile`.

    The best one of each number of vectors, and those close to the best of all whose columns round
    the width to something else.
    """
    return tuple(tile for _, tile in _ranked_tiles(machine, **shape))


def least_cycles(machine: Machine, **shape: int) -> float:
    """Return the modelled cycles, on one core, of the tile that `choose_tile` finds best."""
    return _ranked_tiles(machine.plain, **shape)[0][0]


@cache
def _ranked_tiles(
    machine: Machine,
    *,
    height: int,
    width: int,
    channels: int,
    depth: int,
    taps: int,
    chunks: bool = False,
) -> tuple[tuple[float, Tile], ...]:
    shape = {"height": height, "width": width, "channels": channels, "depth": depth, "taps": taps}
    requests = _requests(machine, pixels=height * width, weights=channels * depth * taps)
    best: dict[tuple[int, int], tuple[float, int, Tile]] = {}
    for vectors in range(1, 9):
        lanes = machine.lanes * vectors
        if vectors > 1 and lanes - machine.lanes >= channels:
            continue
        tiles = -(-channels // lanes)
        held = vectors == 1 or lanes * 4 * depth * taps <= machine.l2_bytes // 3
        if not held and not chunks:
            continue
        for rows, columns in _fitting(machine, height=height, width=width, vectors=vectors):
            tile = Tile(rows=rows, columns=columns, vectors=vectors)
            beside = _beside(machine, tile, **shape) if chunks else {WHOLE: 0.0}
            chunk = cheapest_chunk(beside)
            if not held and chunk == WHOLE:
                continue
            cycles = _tile_cycles(
                machine,
                tile,
                steps=depth * taps,
                requests=requests,
                image=height > 1,
                in_chunks=chunk != WHOLE,
            )
            passes = height // rows * -(-width // columns)
            parts = tiles * passes
            uneven = -(-parts // machine.threads) * machine.threads / parts
            rounded = -(-width // columns) * columns
            ragged = 1.0 if rounded == width else RAGGED
            cost = uneven * tiles * (passes * cycles * ragged + beside[chunk])
            key, found = (vectors, rounded), (cost, rows * columns * vectors, tile)
            if key not in best or found[:2] < best[key][:2]:
                best[key] = found
    ranked = sorted(best.values(), key=lambda row: row[:2])
    seen: set[int] = set()
    kept = []
    for cost, _, tile in ranked:
        if tile.vectors not in seen or cost <= CLOSE * ranked[0][0]:
            kept.append((cost, tile))
        seen.add(tile.vectors)
    return tuple(kept) or ((math.inf, Tile(rows=1, columns=1, vectors=1)),)


def _requests(machine: Machine, *, pixels: int, weights: int) -> bool:
    return prefetch_distance(machine, rows=pixels, weight_bytes=4 * weights) > 0


def _fitting(
    machine: Machine, *, height: int, width: int, vectors: int
) -> Iterator[tuple[int, int]]:
    """Yield rows and columns whose sums fit the registers; several rows only of whole ones."""
    most = most_sums(machine, vectors) // vectors
    for columns in range(1, min(width, most) + 1):
        for rows in divisors(height):
            if rows * columns <= most and (rows == 1 or columns == width):
                yield rows, columns


def choose_pixels(
    machine: Machine,
    *,
    height: int,
    width: int,
    channels: int,
    depth: int,
    taps: int,
    vectors: int,
    point: str = "pixels",
) -> tuple[int, int]:
    """Choose ``(rows, columns)`` for weights that are packed in tiles of ``vectors`` already.

    Both divide the (rounded) output image. See `choose_tile` for the model. A kernel that asks for
    several images gives each ``point`` a name of its own.
    """
    ranked = _ranked_pixels(
        machine.plain,
        height=height,
        width=width,
        channels=channels,
        depth=depth,
        taps=taps,
        vectors=vectors,
    )
    return machine.pick(point, {f"{rows}x{columns}": (rows, columns) for rows, columns in ranked})


@cache
def _ranked_pixels(
    machine: Machine, *, height: int, width: int, channels: int, depth: int, taps: int, vectors: int
) -> tuple[tuple[int, int], ...]:
    requests = _requests(machine, pixels=height * width, weights=channels * depth * taps)
    ranked: list[tuple[float, int, int, int]] = []
    for rows, columns in _fitting(machine, height=height, width=width, vectors=vectors):
        if width % columns:
            continue
        tile = Tile(rows=rows, columns=columns, vectors=vectors)
        cycles = _tile_cycles(
            machine, tile, steps=depth * taps, requests=requests, image=height > 1
        )
        cost = (height // rows) * (width // columns) * cycles
        ranked.append((cost, rows * columns, columns, rows))
    best = sorted(ranked)[:MOST_OPTIONS]
    return tuple((rows, columns) for _, _, columns, rows in best) or ((1, 1),)
