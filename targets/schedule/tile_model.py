"""The model that chooses register tiles of convolutions and matrix products."""

from __future__ import annotations

import math
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
)
from .weight_chunks import WHOLE, cheapest_chunk, chunk_cycles


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


def _cycles(machine: Machine, tile: Tile, *, weight_vectors_from_l2: bool) -> float:
    pixels = tile.rows * tile.columns
    multiply_adds = pixels * tile.vectors
    loads = pixels + tile.vectors
    stream = tile.vectors * machine.lanes * 4 / L2_BYTES_PER_CYCLE if weight_vectors_from_l2 else 0
    return max(multiply_adds / FMA_PER_CYCLE, loads / 2, FMA_LATENCY, stream) + 0.5


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

    The cost of a tile is ``steps x max(fma / 2, loads / 2, latency, weight bytes / L2 rate)``,
    where a step is one input channel of one tap; ``rows x columns x vectors`` accumulators must
    fit the registers, and two weight tiles must share two thirds of L2, so that the next one can
    arrive while one is in use.

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
    return pick_tile(machine, ranked_tiles(machine.plain, **shape, chunks=chunks), **shape)


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
    """Return the best register tile of each number of vectors, best first; see `choose_tile`."""
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
    ranked: list[tuple[float, int, Tile]] = []
    for vectors in range(1, 9):
        tiles = -(-channels // (machine.lanes * vectors))
        weight_bytes = vectors * machine.lanes * 4 * depth * taps
        held = vectors == 1 or weight_bytes <= machine.l2_bytes // 3
        if not held and not chunks:
            continue
        if vectors > 1 and machine.lanes * (vectors - 1) >= channels:
            continue
        best: tuple[float, int] | None = None
        chosen = Tile(rows=1, columns=1, vectors=vectors)
        from_l2 = weight_bytes > machine.l1_bytes // 2
        for columns in range(1, min(width, machine.accumulators) + 1):
            across = -(-width // columns)
            for rows in divisors(height):
                tile = Tile(rows=rows, columns=columns, vectors=vectors)
                sums = rows * columns * vectors
                if sums > most_sums(machine, vectors) or (rows > 1 and across > 1):
                    continue
                beside = _beside(machine, tile, **shape) if chunks else {WHOLE: 0.0}
                chunk = cheapest_chunk(beside)
                if not held and chunk == WHOLE:
                    continue
                far = from_l2 and chunk == WHOLE
                cycles = _cycles(machine, tile, weight_vectors_from_l2=far)
                steps = tiles * (height // rows) * across
                # A width that is no multiple of the tile costs a patch with extra columns.
                ragged = 1.0 if across * columns == width else 1.03
                cost = steps * (cycles * depth * taps + sums) * ragged + tiles * beside[chunk]
                if best is None or (cost, -sums) < best:
                    best, chosen = (cost, -sums), tile
        if best is not None:
            ranked.append((*best, chosen))
    ranked.sort(key=lambda row: row[:2])
    found = tuple((cost, tile) for cost, _, tile in ranked)
    return found or ((math.inf, Tile(rows=1, columns=1, vectors=1)),)


def choose_pixels(
    machine: Machine, *, height: int, width: int, channels: int, depth: int, taps: int, vectors: int
) -> tuple[int, int]:
    """Choose ``(rows, columns)`` for weights that are packed in tiles of ``vectors`` already.

    Both divide the (rounded) output image. See `choose_tile` for the model.
    """
    ranked = _ranked_pixels(
        machine.plain, height=height, width=width, depth=depth, taps=taps, vectors=vectors
    )
    return machine.pick(
        "pixels", {f"{rows}x{columns}": (rows, columns) for rows, columns in ranked}
    )


@cache
def _ranked_pixels(
    machine: Machine, *, height: int, width: int, depth: int, taps: int, vectors: int
) -> tuple[tuple[int, int], ...]:
    ranked: list[tuple[float, int, int]] = []
    for columns in divisors(width):
        for rows in divisors(height):
            sums = rows * columns * vectors
            if sums > most_sums(machine, vectors) or (rows > 1 and columns < width):
                continue
            tile = Tile(rows=rows, columns=columns, vectors=vectors)
            cycles = _cycles(machine, tile, weight_vectors_from_l2=False)
            cost = (height // rows) * (width // columns) * (cycles * depth * taps + sums)
            ranked.append((cost, columns, rows))
    return tuple((rows, columns) for _, columns, rows in sorted(ranked)[:MOST_OPTIONS]) or ((1, 1),)
