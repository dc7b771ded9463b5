"""The model that chooses between Winograd's forms of a 3x3 convolution and the direct one."""

from __future__ import annotations

import math

from .machine import FMA_PER_CYCLE, Machine

# Vectors that a transform of one tile and one vector of channels loads, computes and stores,
# as a multiple of the points of the tile: counted on the generated code of F(4x4).
TRANSFORM_STEPS = 5
# How much faster the larger tile must be: its weights are 2.25 times as large.
LARGE_TILE_GAIN = 1.1


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
) -> dict[int, float]:
    """Return the modelled cycles of a 3x3 convolution of stride 1, all threads at work.

    Direct, each output pixel takes nine products for each pair of channels; with a tile of
    ``m x m`` it is ``(m + 2)^2 / m^2``, plus the transforms of each vector of input and output
    channels, and weights of ``(m + 2)^2 / 9`` the size that are streamed once.

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

    Returns
    -------
    dict of int to float
        By m, with 0 for the direct convolution.
    """
    per_cycle = machine.lanes * FMA_PER_CYCLE * machine.threads
    rounded, steps = -(-channels // machine.lanes) * machine.lanes, -(-depth // group)
    vectors = sum(size // math.gcd(size, machine.lanes) for size in (depth, channels))

    def cycles(products: float, points: int, transforms: int) -> float:
        stream = points * rounded * steps * 4 / machine.weight_bytes_per_cycle
        return max(products / per_cycle, stream) + transforms / (FMA_PER_CYCLE * machine.threads)

    costs = {0: cycles(batch * height * width * rounded * steps * 9, 9, 0)}
    for m in tiles:
        count = batch * -(-height // m) * -(-width // m)
        points = (m + 2) ** 2
        costs[m] = cycles(
            count * points * rounded * steps, points, count * vectors * points * TRANSFORM_STEPS
        )
        if m > min(tiles):
            costs[m] *= LARGE_TILE_GAIN
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
) -> int:
    """Choose the output tile of a 3x3 convolution with the least `winograd_cycles`.

    Returns
    -------
    int
        m, or 0 for the direct convolution.
    """
    costs = winograd_cycles(
        machine,
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        depth=depth,
        group=group,
        tiles=tiles,
    )
    point = f"winograd {batch}x{height}x{width}x{depth} to {channels}"
    ranked = sorted(costs, key=lambda m: costs[m])
    return machine.pick(point, {f"{m}x{m}" if m else "direct": m for m in ranked})
