"""The model that chooses the two phases of a 3x3 convolution of stride 2, or the direct way.

Two outputs of a row take five products where six are direct, so that ``2 x 2`` take 25 instead of
36; a last row or column without a partner takes three, as many as direct.
"""

from __future__ import annotations

import itertools
import math

from .machine import FMA_LATENCY, FMA_PER_CYCLE, WEIGHT_BYTES_PER_CYCLE, Machine, choose_tasks
from .tile_model import choose_pixels

# Output pixels of a side of a tile, samples that it reads and points that are made of them.
TILE, SPAN, POINTS = 2, 5, 5
# Vectors that are loaded, computed and stored for each point of a vector of input channels.
INPUT_STEPS = 3
# The same for each output pixel of a vector of output channels: four sums, three additions.
OUTPUT_STEPS = 8
# Output vectors of a register tile: more were slower by a third and more (docs/performance.md).
VECTORS = (2, 1)
# Bytes of the input that a core reads in each cycle from the cache of another, which wrote them:
# 0.4 MB of 28x28x256 cost some 0.1 ms at the start of a kernel, where nothing hides them.
REMOTE_BYTES_PER_CYCLE = 1
# What the modelled time must gain: smaller gains were not measured.
GAIN = 1.05


def row_sums(length: int) -> tuple[tuple[int, int], ...]:
    """Return how many sums of a row of outputs there are, and the taps of each.

    The first and the shared one of each tile have three taps together, that of its partner two: of
    seven outputs ``4 * 3 + 3 * 2 = 18`` products.
    """
    return (-(-length // TILE), 3), (length // TILE, 2)


def packed_vectors(machine: Machine, channels: int) -> int:
    """Return the output vectors that are packed together; 0 where no whole vector fits."""
    fitting = (v for v in VECTORS if channels % (v * machine.lanes) == 0)
    return next(fitting, 0)


def choose_parts(
    machine: Machine,
    *,
    batch: int,
    height: int,
    channel_tiles: int,
    weight_bytes: int,
    point_bytes: int,
) -> tuple[int, int]:
    """Choose how many parts the rows of tiles and the channels are cut into, see `choose_tasks`.

    An odd number of rows is not cut: its last tile has fewer sums than the others.

    Parameters
    ----------
    machine : Machine
        Threads and caches.
    batch, height : int
        Output images and their rows.
    channel_tiles : int
        Tiles of packed output channels.
    weight_bytes, point_bytes : int
        Of all weights, and of the points of one image.
    """
    down = -(-height // TILE)
    return choose_tasks(
        machine,
        batch=batch,
        row_tiles=down if height % TILE == 0 else 1,
        channel_tiles=channel_tiles,
        weight_bytes=weight_bytes,
        input_bytes=point_bytes * batch,
        # An eighth of L2 is what a task may read otherwise; points are made and read in it. Where
        # a row takes more, a task has one row.
        row_bytes=min(point_bytes // down // 4, machine.l2_bytes // 8),
    )


def _products(machine: Machine, *, height: int, width: int, **layer: int) -> float:
    """Return the products of an image, as many more as units that wait for a sum could make.

    The sums of partners in an odd image have other register tiles: of 35 columns 17 have a
    partner, no tile divides 17, and two sums of one pixel take the time of eight.
    """
    total = 0.0
    for (rows, taps), (columns, beside) in itertools.product(row_sums(height), row_sums(width)):
        tile = choose_pixels(
            machine.plain, height=rows, width=columns, taps=1, point="pixels", **layer
        )
        busy = math.prod(tile) * layer["vectors"] / (FMA_LATENCY * FMA_PER_CYCLE)
        total += rows * columns * taps * beside / min(busy, 1.0)
    return total


def choose_strided_winograd(
    machine: Machine, *, batch: int, height: int, width: int, channels: int, depth: int
) -> bool:
    """Say whether a 3x3 convolution of stride 2 goes by its two phases.

    Only whole vectors of channels on both sides. Where a register tile has less than
    ``latency x issue`` sums the units wait, and its products count for more (`_products`).

    Parameters
    ----------
    machine : Machine
        Lanes and threads; may have decided otherwise.
    batch, height, width : int
        Output images.
    channels, depth : int
        Output and input channels.

    Returns
    -------
    bool
        28x28x128 to 128 channels: 1 836 000 cycles direct and 1 326 000 by phases on two cores of
        16 lanes; 14x14x256 to 256: 1 924 000 and 1 809 000.
    """
    vectors = packed_vectors(machine, channels)
    if not vectors or depth % machine.lanes or min(height, width) < TILE:
        return False
    shape = {"height": height, "width": width, "channels": channels, "depth": depth}
    parallel = FMA_PER_CYCLE * machine.threads
    steps = depth * channels / machine.lanes
    weight_bytes = 9 * depth * channels * 4
    weights = weight_bytes / machine.weight_bytes_per_cycle
    direct = batch * height * width * 9 * steps / parallel + weights
    points = -(-height // TILE) * -(-width // TILE) * POINTS**2 * depth
    channel_tiles = channels // (vectors * machine.lanes)
    row_parts, channel_parts = choose_parts(
        machine.plain,
        batch=batch,
        height=height,
        channel_tiles=channel_tiles,
        weight_bytes=weight_bytes,
        point_bytes=points * 4,
    )
    tasks = batch * row_parts * channel_parts
    uneven = -(-tasks // machine.threads) * machine.threads / tasks
    products = batch * _products(machine, **shape, vectors=vectors) * steps
    # Where threads share the channels each transforms the whole image.
    inputs = batch * points * INPUT_STEPS / machine.lanes * channel_parts
    outputs = batch * height * width * OUTPUT_STEPS * channels / machine.lanes
    phases = uneven * (products + inputs + outputs) / parallel + weights
    if channel_parts > 1:
        image = batch * (2 * height) * (2 * width) * depth * 4
        phases += image * (machine.threads - 1) / machine.threads / REMOTE_BYTES_PER_CYCLE
    # The points of all threads fit half of the last cache, or each tile of channels reads what
    # exceeds it from memory.
    together = min(tasks, machine.threads) * points * 4 / row_parts
    beyond = max(together - (machine.l3_bytes // 2 or machine.l2_bytes), 0)
    passes = -(-tasks // machine.threads) * channel_tiles / channel_parts
    phases += beyond * passes / WEIGHT_BYTES_PER_CYCLE
    order = ("phases", "direct") if phases * GAIN < direct else ("direct", "phases")
    # The name begins as those of stride 1 do: tuning asks for both first.
    point = f"winograd stride 2 {batch}x{height}x{width}x{depth} to {channels}"
    return machine.pick(point, {name: name == "phases" for name in order})
