"""Kernels of binary weights and binary activations: exclusive or, population count, sum.

Of n products of signs, each is -1 where the signs differ: their sum is ``n - 2 popcount(a ^ b)``.
Signs of input channels share words of 32 bits, words of neighbouring output channels a vector.
LLVM counts with ``vpopcntd``, ``cnt``, or by a table of nibbles, as the target has it. Numerics:
the sums are exact; the scale of a channel is applied once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import te, tirx

from hone.passes.quantize.bit_packing import pack_words
from hone.passes.quantize.weight_schemes import WeightLevels

from .weight_words import scale_value
from .window import Window

WORD = 32


def fits(levels: WeightLevels) -> bool:
    """Say whether levels are signs with one scale for each channel."""
    return levels.bits == 1 and levels.scale.shape[1] == 1


def pack_signs(levels: np.ndarray) -> np.ndarray:
    """Pack -1 and 1 of int8 ``[..., C]`` into int32 ``[..., ceil(C / 32)]``, a bit for each -1."""
    return pack_words(-levels, 1, WORD).view(np.int32)


def dense(
    data: te.Tensor, packed: te.Tensor, scale: te.Tensor, *, channels: int, tile_rows: int
) -> te.Tensor:
    """Return ``sign([M, C]) x packed [ceil(K / tk), words, tk]`` as ``[M, K]``."""
    rows, depth = (int(extent) for extent in data.shape)
    rounded = -(-rows // tile_rows) * tile_rows
    blocks, words, tile = (int(extent) for extent in packed.shape)
    signs = _signs((rows, words), depth, lambda m, c: data[m, c], name="wonly_pad")
    w = te.reduce_axis((0, words), "w")

    def row(m: tirx.Var) -> tirx.Expr:
        return m if rounded == rows else tirx.min(m, rows - 1)

    counts = te.compute(
        (rounded, blocks * tile),
        lambda m, k: te.sum(
            tirx.popcount(signs[row(m), w] ^ packed[k // tile, w, k % tile]), axis=w
        ),
        name="wonly_acc",
    )
    return _real(counts, (rows, channels), depth, scale)


def conv2d(
    data: te.Tensor,
    packed: te.Tensor,
    scale: te.Tensor,
    *,
    window: Window,
    channels: int,
    tile_columns: int,
) -> te.Tensor:
    """Return the convolution of ``sign([N, H, W, C])`` with ``[ceil(K / tk), R, S, words, tk]``.

    Nothing is padded: a padding has no sign, and stands in the data where there is one.
    """
    batch, in_height, in_width, depth = window.shape
    blocks, taps_h, taps_w, words, tile = (int(extent) for extent in packed.shape)
    height, width = window.output
    rounded = -(-width // tile_columns) * tile_columns
    needed = (rounded - 1) * window.strides[1] + window.dilation[1] * (taps_w - 1) + 1
    signs = _signs(
        (batch, in_height, max(needed, in_width), words),
        depth,
        # Columns that only fill the last tile are cut off again.
        lambda n, y, x, c: data[n, y, tirx.min(x, in_width - 1), c],
        name="conv_pad",
    )
    r, s = te.reduce_axis((0, taps_h), "r"), te.reduce_axis((0, taps_w), "s")
    w = te.reduce_axis((0, words), "w")
    counts = te.compute(
        (batch, height, rounded, blocks * tile),
        lambda n, y, x, k: te.sum(
            tirx.popcount(
                signs[
                    n,
                    y * window.strides[0] + r * window.dilation[0],
                    x * window.strides[1] + s * window.dilation[1],
                    w,
                ]
                ^ packed[k // tile, r, s, w, k % tile]
            ),
            axis=[r, s, w],
        ),
        name="conv_acc",
    )
    return _real(counts, (batch, height, width, channels), taps_h * taps_w * depth, scale)


def _signs(
    shape: tuple[int, ...], depth: int, read: Callable[..., tirx.Expr], *, name: str
) -> te.Tensor:
    """Return words of the signs of ``depth`` channels, a bit for each that is below 0."""

    def word(*i: tirx.Var) -> tirx.Expr:
        *at, place = i
        result: tirx.Expr = tirx.const(0, "int32")
        for bit in range(min(WORD, depth)):
            c = place * WORD + bit
            inside = c < depth
            value = read(*at, c if depth % WORD == 0 else tirx.min(c, depth - 1))
            below = tirx.Not(value >= tirx.const(0, "float32"))
            below = below if depth % WORD == 0 else tirx.And(inside, below)
            flag = tirx.Select(below, tirx.const(1, "int32"), tirx.const(0, "int32"))
            result = result | (flag << bit)
        return result

    return te.compute(shape, word, name=name)


def _real(counts: te.Tensor, shape: tuple[int, ...], terms: int, scale: te.Tensor) -> te.Tensor:
    """Return sums of signs in the weights' scale, without what fills up tiles."""
    tile = int(scale.shape[-1])

    def element(*i: tirx.Var) -> tirx.Expr:
        sums = tirx.Cast("float32", tirx.const(terms, "int32") - counts[i] * 2)
        return sums * scale_value(scale[i[-1] // tile, 0, i[-1] % tile])

    return te.compute(shape, element, name="wo_cut")
