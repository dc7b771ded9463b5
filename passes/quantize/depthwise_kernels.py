"""Depthwise convolutions of levels by an instruction for pairs of int16.

Two rows of a padded image, one below the other, are one image of int32 words, so that one
instruction multiplies and adds two taps of each channel. A window of three rows is two words high;
where it begins in the middle of a word its weights are moved down by one, zeros around them:
``[R, S, C] → [2, words, S, C]``. Stages: ``dw_words``, which each task writes for itself,
``dw_acc``, ``requantize``. Numerics: exact, and equal to those of `kernels`.
"""

from __future__ import annotations

import numpy as np
from tvm import te, tirx
from tvm.ir import Expr

from hone.passes.lower.window import Window
from hone.targets.schedule.machine import Machine
from hone.targets.word_intrinsics import WordDot, word_product, word_sum

from .kernels import level

PAIR = 2
"""Rows that share a word, and the words' parities: windows begin at every row."""
HALF_BITS = 16


def in_pairs(machine: Machine, window: Window) -> bool:
    """Say whether a depthwise convolution is summed in pairs of rows.

    With a stride of 2 each word serves one row of windows, not two, and every second column one
    window: two of MobileNetV2's such layers took 1.6 times as long (docs/performance.md).
    """
    return (
        window.strides[0] == window.dilation[0] == 1
        and window.taps[0] > 1
        and window.shape[3] % machine.lanes == 0
    )


def words_high(taps: int) -> int:
    """Return how many words a window of so many rows is high, wherever it begins: 3 rows are 2."""
    return -(-(taps + 1) // PAIR)


def pack(weight: np.ndarray) -> np.ndarray:
    """Pack int8 or int16 ``[R, S, C]`` to int32 ``[2, words, S, C]``.

    First for a window that begins with a word, then for one that begins in the middle of it.
    """
    taps_h, taps_w, channels = weight.shape
    height = words_high(taps_h)
    padded = np.zeros((PAIR, height * PAIR, taps_w, channels), np.int16)
    for parity in range(PAIR):
        padded[parity, parity : parity + taps_h] = weight
    blocked = padded.reshape(PAIR, height, PAIR, taps_w, channels).transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(blocked).view("<u2").astype("<u2").view("<i4")[..., 0]


def _words(data: te.Tensor, window: Window, zero_point: Expr) -> te.Tensor:
    """Return the words ``[N, rows / 2, W, C]`` of the padded rows of ``[N, H, W, C]``."""
    batch, height, width, channels = window.shape
    top, left, _, right = window.padding
    wide = "uint16" if str(data.dtype) == "uint8" else "int16"

    def bits(value: Expr) -> Expr:
        return tirx.Cast("uint32", tirx.reinterpret("uint16", tirx.Cast(wide, value)))

    def joined(low: Expr, high: Expr) -> Expr:
        return tirx.reinterpret("int32", low | (high << tirx.const(HALF_BITS, "uint32")))

    border = bits(tirx.Cast(data.dtype, zero_point))

    def element(n: tirx.Var, p: tirx.Var, w: tirx.Var, c: tirx.Var) -> Expr:
        def row(half: int) -> Expr:
            h = p * PAIR + half - top
            return tirx.if_then_else(
                tirx.all(h >= 0, h < height), bits(data[n, h, w - left, c]), border
            )

        word = joined(row(0), row(1))
        # Each bound by itself, marked likely, is what loop partitioning understands.
        outside = joined(border, border)
        word = tirx.if_then_else(tirx.likely(w < width + left), word, outside)
        return tirx.if_then_else(tirx.likely(w >= left), word, outside)

    rows = (window.output[0] - 1) // PAIR + words_high(window.taps[0])
    return te.compute((batch, rows, width + left + right, channels), element, name="dw_words")


def conv2d(
    data: te.Tensor,
    weight: te.Tensor,
    bias: te.Tensor,
    multiplier: te.Tensor,
    levels: te.Tensor,
    residual: te.Tensor | None = None,
    residual_multiplier: te.Tensor | None = None,
    *,
    window: Window,
    dot: WordDot,
    out_dtype: str,
) -> te.Tensor:
    """Return ``hone.conv2d_int8`` with one filter for each channel.

    Parameters
    ----------
    data : te.Tensor
        ``[N, H, W, C]``.
    weight : te.Tensor
        int32 ``[2, words, S, C]`` of `pack`.
    bias, multiplier : te.Tensor
        ``[C]``.
    levels, residual, residual_multiplier : te.Tensor
        See `hone.passes.quantize.operators.conv2d_int8`.
    window : Window
        Geometry; `in_pairs`.
    dot : WordDot
        The instruction.
    out_dtype : str
        Of the result.
    """
    _, height, taps_w, channels = (int(extent) for extent in weight.shape)
    words = _words(data, window, levels[0])
    p, s = te.reduce_axis((0, height), "p"), te.reduce_axis((0, taps_w), "s")

    def element(n: tirx.Var, h: tirx.Var, w: tirx.Var, c: tirx.Var) -> Expr:
        x = w * window.strides[1] + s * window.dilation[1]
        word = words[n, tirx.indexdiv(h, PAIR) + p, x, c]
        product = word_product(dot, word, weight[tirx.indexmod(h, PAIR), p, s, c])
        return word_sum(dot)(product, axis=[p, s])

    shape = (window.shape[0], *window.output, channels)
    sums = te.compute(shape, element, name="dw_acc")
    return te.compute(
        shape,
        lambda *i: level(
            sums[i] + bias[i[3]],
            i,
            multiplier[i[3]],
            levels,
            residual,
            residual_multiplier,
            out_dtype,
        ),
        name="requantize",
    )
