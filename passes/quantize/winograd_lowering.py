"""Lowers integer 3x3 convolutions of stride 1 to Winograd's form where it is modelled faster.

Part of the lowering of ``hone.conv2d_int8`` (`legalize`), for processors that sum pairs of int16.
Numerics: exact; a layer whose weights do not prove it keeps the direct form.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from tvm import relax

from hone.passes.lower.anchors import ANCHOR
from hone.passes.lower.window import Window
from hone.targets.integer_dot import GROUP, IntegerDot
from hone.targets.schedule.machine import FMA_PER_CYCLE, Machine
from hone.targets.schedule.tile_model import choose_tile
from hone.targets.word_intrinsics import word_dot_of

from .tile_kernels import Wrap
from .winograd_kernels import F2, F4, PAIR, IntegerTransform, conv2d, pack

# Cycles of one core for each point of a tile and vector of channels, both transforms alike.
TRANSFORM_CYCLES = 2.5
# Cycles of a vector of sums for one group of bytes, of the direct form: one VNNI instruction, or
# 6.5 instructions at 4.6 in a cycle (docs/performance.md).
DIRECT_CYCLES = {IntegerDot.VPDPBUSD: 1 / FMA_PER_CYCLE, IntegerDot.VPMADDWD: 1.4}
# How much faster Winograd must be modelled: its weights are 3.6 to 8 times as large.
GAIN = 1.1


def choose_transform(
    machine: Machine, window: Window, weight: np.ndarray
) -> IntegerTransform | None:
    """Return the transform of a layer that is modelled faster than the direct form, if any.

    Parameters
    ----------
    machine : Machine
        Instruction, lanes, threads and the rate at which weights stream.
    window : Window
        Geometry.
    weight : ndarray
        int8 ``[K, R, S, C]``.
    """
    batch, _, _, depth = window.shape
    plain = window.taps == (3, 3) and window.strides == window.dilation == (1, 1)
    if machine.integer_dot is None or word_dot_of(machine.integer_dot) is None:
        return None
    if not plain or depth % PAIR:
        return None
    transforms = {4: F4, 2: F2}
    fitting = {m: form for m, form in transforms.items() if form.fits(weight)}
    height, width = window.output
    channels = len(weight)
    vectors = -(-channels // machine.lanes)
    sums = vectors * -(-depth // GROUP)

    def cycles(products: float, weight_bytes: int, transforms: float) -> float:
        # Not the larger of the two: what these weights push out of the caches, others wait for.
        stream = weight_bytes / machine.weight_bytes_per_cycle
        return (products + transforms) / machine.threads + stream

    direct = DIRECT_CYCLES[IntegerDot(machine.integer_dot).vector]
    costs = {
        0: cycles(batch * height * width * 9 * sums * direct, 9 * sums * GROUP * machine.lanes, 0)
    }
    for m in fitting:
        points = (m + 2) ** 2
        tiles = batch * -(-height // m) * -(-width // m)
        words = vectors * (depth // PAIR)
        # Beyond the caches they are read anew for every image, see `schedule_winograd`.
        held = points * words * machine.lanes * 4 <= machine.threads * machine.l2_bytes
        rereads = 1 if held else batch
        moved = vectors + -(-depth // (2 * machine.lanes))
        costs[m] = GAIN * cycles(
            tiles * points * words / FMA_PER_CYCLE,
            points * words * machine.lanes * 4 * rereads,
            tiles * points * moved * TRANSFORM_CYCLES,
        )
    ranked = sorted(costs, key=lambda m: costs[m])
    point = f"int8 winograd {batch}x{height}x{width}x{depth} to {channels}"
    chosen = machine.pick(point, {f"{m}x{m}" if m else "direct": m for m in ranked})
    return fitting.get(chosen)


def lower_conv2d(
    machine: Machine,
    bb: relax.BlockBuilder,
    arguments: list[relax.Expr],
    weight: np.ndarray,
    window: Window,
    *,
    out_dtype: str,
    wrap: Wrap,
) -> relax.Expr | None:
    """Return a convolution in Winograd's form, or None where it does not pay.

    Parameters
    ----------
    machine : Machine
        Decides.
    bb : BlockBuilder
        Takes the bindings.
    arguments : list of Expr
        Those of ``hone.conv2d_int8`` without the weight; the data is uint8.
    weight : ndarray
        ``[K, R, S, C]``.
    window : Window
        Geometry.
    out_dtype : str
        Of the result.
    wrap : callable
        Makes a kernel take the arguments in the order of the operator.
    """
    transform = choose_transform(machine, window, weight)
    dot = word_dot_of(machine.integer_dot)
    if transform is None or dot is None:
        return None
    data, *others = arguments
    height, width = window.output
    m = transform.tile
    tile = choose_tile(
        machine,
        height=1,
        width=window.shape[0] * -(-height // m) * -(-width // m),
        channels=len(weight),
        depth=window.shape[3] // PAIR,
        taps=1,
    )
    kernel = partial(
        conv2d,
        window=window,
        transform=transform,
        dot=dot,
        tile_rows=tile.columns,
        out_dtype=out_dtype,
    )
    return bb.call_te(
        wrap(kernel),
        data,
        relax.const(pack(weight, transform, tile.vectors * machine.lanes)),
        *others,
        primfunc_name_hint="winograd_conv2d_int8",
        primfunc_attrs=ANCHOR,
    )
