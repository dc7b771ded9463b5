"""The model that chooses between Winograd's forms of a 3x3 convolution and the direct one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .machine import FMA_LATENCY, FMA_PER_CYCLE, Machine

# Vectors that a transform of one tile and one vector of channels loads, computes and stores,
# as a multiple of the points of the tile: counted on the generated code of F(4x4).
TRANSFORM_STEPS = 5
# How much faster the larger tile must be: its weights are 2.25 times as large.
LARGE_TILE_GAIN = 1.1
# Vectors of weights that a step of a sum loads where it transforms a row of points, on average over
# the row: three, but for the first and the last point one.
ROW_LOADS = {2: 2.0, 4: 14 / 6}
# Share of a core's L2 that the transformed data may fill where every block of output channels
# reads it again.
HELD_SHARE = 0.75


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of a 3x3 convolution of stride 1.

    Parameters
    ----------
    tile : int
        Output pixels of a side of a tile, m; 0 for the direct convolution.
    rows : bool
        Weights are transformed along their rows only, ``3 (m + 2)`` numbers instead of
        ``(m + 2)^2``; the kernel does the rest.
    """

    tile: int
    rows: bool = False

    @property
    def name(self) -> str:
        """Return what tells this form from the others of a layer."""
        if not self.tile:
            return "direct"
        return f"{self.tile}x{self.tile}{' rows' if self.rows else ''}"

    @property
    def points(self) -> int:
        """Points of a transformed tile; for the direct convolution its taps."""
        return (self.tile + 2) ** 2 if self.tile else 9

    @property
    def weights(self) -> int:
        """Numbers that are kept for each pair of an input and an output channel."""
        return 3 * (self.tile + 2) if self.rows else self.points


DIRECT = Form(tile=0)


def tile_rows(machine: Machine, form: Form, tiles: int) -> int:
    """Return how many tiles' sums a form by rows takes at a time, one vector of channels each.

    A step loads a factor for each tile, and the weights of its point for all of them:
    ``ceil(tiles / n) (n + loads)`` is least. 49 tiles of F(4x4) are 2 times 25, at
    ``2 (25 + 2.3) = 54.7`` loads, where 7 times 7 are 65.
    """
    most = min(machine.accumulators, tiles)
    return min(range(1, most + 1), key=lambda n: (-(-tiles // n) * (n + ROW_LOADS[form.tile]), n))


def _takes_rows(machine: Machine, form: Form, tiles: int, channels: int, depth: int) -> bool:
    """Say whether sums of one vector hide their latency, and threads share the output channels.

    Each thread must keep the data in its cache, and the weights must be too large for that.
    """
    hidden = tiles >= FMA_LATENCY * FMA_PER_CYCLE
    shared = channels % (machine.lanes * machine.threads) == 0
    held = form.points * tiles * depth * 4 <= HELD_SHARE * machine.l2_bytes
    streamed = form.points * channels * depth * 4 > machine.l2_bytes
    return hidden and shared and held and streamed


def winograd_cycles(
    machine: Machine,
    *,
    batch: int,
    height: int,
    width: int,
    channels: int,
    depth: int,
    group: int = 1,
    tiles: tuple[int, ...] = (2, 4),
    rows: bool = False,
) -> dict[Form, float]:
    """Return the modelled cycles of a 3x3 convolution of stride 1, all threads at work.

    Direct, each output pixel takes nine products for each pair of channels; with a tile of
    ``m x m`` it is ``(m + 2)^2 / m^2``, plus the transforms of each vector of input and output
    channels, and weights of ``(m + 2)^2 / 9`` the size that are streamed once. By rows weights are
    a third of ``m + 2`` times as large, a step has more loads than products (`tile_rows`), and each
    thread transforms the whole input. Where memory is slow, rows are faster than they are modelled
    here (docs/performance.md): tuning may take them.

    Worked number: 14x14, 256 to 256 channels, 16 tiles of F(4x4), two threads of 16 lanes:
    ``36 x 16 x 65536 / 64 = 590 000`` cycles of products and ``36 x 65536 x 4 / 20 = 472 000`` of
    streaming; by rows ``590 000 (16 + 2.3) / 16 = 676 000`` and 236 000.

    Parameters
    ----------
    machine : Machine
        Lanes and threads.
    batch, height, width : int
        Output images.
    channels, depth : int
        Output and input channels.
    group : int
        Input channels of one lane of a product; they take four bytes together.
    tiles : tuple of int
        The m to choose from.
    rows : bool
        Whether weights may be transformed along their rows only.

    Returns
    -------
    dict of Form to float
        Every form that the layer can take.
    """
    per_cycle = machine.lanes * FMA_PER_CYCLE * machine.threads
    rounded, steps = -(-channels // machine.lanes) * machine.lanes, -(-depth // group)

    def vectors(size: int) -> int:
        return size // math.gcd(size, machine.lanes)

    def cycles(form: Form, count: int, *, loads: float = 1.0, repeats: int = 1) -> float:
        products = count * form.points * rounded * steps / per_cycle * loads
        stream = form.weights * rounded * steps * 4 / machine.weight_bytes_per_cycle
        moved = vectors(depth) * repeats + vectors(channels) if form.tile else 0
        transforms = count * moved * form.points * TRANSFORM_STEPS
        return max(products, stream) + transforms / (FMA_PER_CYCLE * machine.threads)

    costs = {DIRECT: cycles(DIRECT, batch * height * width)}
    for m in tiles:
        count = batch * -(-height // m) * -(-width // m)
        form = Form(tile=m)
        costs[form] = cycles(form, count) * (LARGE_TILE_GAIN if m > min(tiles) else 1.0)
        form = Form(tile=m, rows=True)
        if rows and _takes_rows(machine, form, count, channels, depth):
            taken = tile_rows(machine, form, count)
            rounds = -(-count // taken)
            loads = rounds * (taken + ROW_LOADS[m]) / count
            costs[form] = cycles(form, count, loads=loads, repeats=machine.threads)
    return costs


def choose_winograd(
    machine: Machine,
    *,
    batch: int,
    height: int,
    width: int,
    channels: int,
    depth: int,
    group: int = 1,
    tiles: tuple[int, ...] = (2, 4),
    rows: bool = False,
) -> Form:
    """Choose the form of a 3x3 convolution with the least `winograd_cycles`; see there."""
    costs = winograd_cycles(
        machine,
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        depth=depth,
        group=group,
        tiles=tiles,
        rows=rows,
    )
    point = f"winograd {batch}x{height}x{width}x{depth} to {channels}"
    ranked = sorted(costs, key=lambda form: costs[form])
    return machine.pick(point, {form.name: form for form in ranked})
