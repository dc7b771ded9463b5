"""The model that chooses the two phases of a 3x3 convolution of stride 2, or the direct way.

Two outputs of a row take five products where six are direct, so that ``2 x 2`` take 25 instead of
36; a last row or column without a partner takes three, as many as direct.
"""

from __future__ import annotations

from .machine import FMA_LATENCY, FMA_PER_CYCLE, Machine
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


def row_products(length: int) -> int:
    """Return the products of a row of outputs: five for two, three for one; for seven 18."""
    return length // TILE * POINTS + length % TILE * 3


def packed_vectors(machine: Machine, channels: int) -> int:
    """Return the output vectors that are packed together; 0 where no whole vector fits."""
    fitting = (v for v in VECTORS if channels % (v * machine.lanes) == 0)
    return next(fitting, 0)


def choose_strided_winograd(
    machine: Machine,
    *,
    batch: int,
    height: int,
    width: int,
    channels: int,
    depth: int,
    group: int = 1,
) -> bool:
    """Say whether a 3x3 convolution of stride 2 goes by its two phases.

    Only whole vectors of channels on both sides, and images whose tiles fill registers: with less
    than ``latency x issue`` sums the units wait.

    Parameters
    ----------
    machine : Machine
        Lanes and threads; may have decided otherwise.
    batch, height, width : int
        Output images.
    channels, depth : int
        Output and input channels.
    group : int
        Input channels of one lane of a product; they take four bytes together.

    Returns
    -------
    bool
        28x28x128 to 128 channels: 1 836 000 cycles direct and 1 326 000 by phases on two cores of
        16 lanes; 14x14x256 to 256: 1 924 000 and 1 809 000.
    """
    vectors = packed_vectors(machine, channels)
    if not vectors or depth % (machine.lanes * group) or min(height, width) < TILE:
        return False
    down, across = -(-height // TILE), -(-width // TILE)
    rows, columns = choose_pixels(
        machine.plain,
        height=down,
        width=across,
        channels=channels,
        depth=depth // group,
        taps=1,
        vectors=vectors,
    )
    if rows * columns * vectors < FMA_LATENCY * FMA_PER_CYCLE:
        return False
    parallel = FMA_PER_CYCLE * machine.threads
    steps = depth // group * channels / machine.lanes
    # Pairs of 16-bit floats are added before they are packed: 16 weights for 9.
    tap_bytes = depth // group * channels * 4 / machine.weight_bytes_per_cycle
    direct = batch * height * width * 9 * steps / parallel + 9 * tap_bytes
    products = batch * row_products(height) * row_products(width) * steps / parallel
    products += (9 if group == 1 else 16) * tap_bytes
    inputs = batch * down * across * POINTS**2 * INPUT_STEPS * depth / machine.lanes
    outputs = batch * height * width * OUTPUT_STEPS * channels / machine.lanes
    remote = 0.0
    if (batch if height % TILE else batch * down) % machine.threads:
        # Threads share the channels: each transforms the whole image.
        inputs *= machine.threads
        image = batch * (2 * height) * (2 * width) * depth * 4 // group
        remote = image * (machine.threads - 1) / machine.threads / REMOTE_BYTES_PER_CYCLE
    phases = products + (inputs + outputs) / parallel + remote
    order = ("phases", "direct") if phases * GAIN < direct else ("direct", "phases")
    # The name begins as those of stride 1 do: tuning asks for both first.
    point = f"winograd stride 2 {batch}x{height}x{width}x{depth} to {channels}"
    return machine.pick(point, {name: name == "phases" for name in order})
