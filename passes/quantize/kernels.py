"""Tensor expressions of hone's integer kernels.

Stages are named for the scheduler: ``conv_pad``, ``conv_acc``; ``dw_pad``, ``dw_acc`` (depthwise
and window averages); ``mm_acc``; and ``requantize``, the one stage after the sum. Sums are int32
over ``int32(level) × int32(weight)``, exact as long as no sum leaves int32, which `QuantizeInt8`
proves for each layer before it makes the operator. An offset of an output channel's weights is not
multiplied with every level: it is worth that number times the sum of the levels, which is taken
once for all channels. Numerics: exact; see `arithmetic`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm import te, tirx
from tvm.ir import Expr

from hone.passes.lower.conv2d import Window, pad

from . import arithmetic
from .arithmetic import as_int32


def level(
    sums: Expr,
    index: Sequence[Expr],
    multiplier: Expr,
    levels: te.Tensor,
    residual: te.Tensor | None,
    residual_multiplier: te.Tensor | None,
    dtype: str,
) -> Expr:
    """Return one output element of a convolution or matrix product from its int32 sum."""
    if dtype == "float32":
        return arithmetic.real(sums, multiplier)
    output = {"zero_point": levels[1], "low": levels[2], "high": levels[3], "dtype": dtype}
    if residual is None or residual_multiplier is None:
        return arithmetic.requantize(sums, multiplier, **output)
    other = as_int32(residual(*index)) - levels[4]
    fixed = arithmetic.fixed_point(sums, multiplier)
    fixed += arithmetic.fixed_point(other, residual_multiplier[0])
    return arithmetic.round_fixed_point(fixed, **output)


def total(
    sums: Expr,
    index: Sequence[Expr],
    bias: te.Tensor,
    offsets: te.Tensor | None,
    window_sums: te.Tensor | None,
) -> Expr:
    """Return one int32 sum with its bias and, where weights have offsets, what those add."""
    channel = index[-1]
    sums = sums + bias[channel]
    if offsets is None or window_sums is None:
        return sums
    return sums + offsets[channel] * window_sums(*index[:-1], 0)


def conv2d(
    data: te.Tensor,
    weight: te.Tensor,
    bias: te.Tensor,
    multiplier: te.Tensor,
    levels: te.Tensor,
    residual: te.Tensor | None = None,
    residual_multiplier: te.Tensor | None = None,
    offsets: te.Tensor | None = None,
    window_sums: te.Tensor | None = None,
    *,
    window: Window,
    tile_columns: int,
    out_dtype: str,
) -> te.Tensor:
    """Return ``hone.conv2d_int8`` with packed weights.

    Parameters
    ----------
    data : te.Tensor
        ``[N, H, W, C]``.
    weight : te.Tensor
        ``[ceil(K / tk), R, S, C, tk]``.
    bias, multiplier : te.Tensor
        ``[K]``.
    levels, residual, residual_multiplier, offsets, window_sums : te.Tensor
        See `hone.passes.quantize.operators.conv2d_int8`.
    window : Window
        Geometry.
    tile_columns : int
        The sums' width is rounded up to it; the last stage leaves the extra columns out.
    out_dtype : str
        Of the result.
    """
    blocks, taps_h, taps_w, depth, tile = (int(extent) for extent in weight.shape)
    height, width = window.output
    rounded = -(-width // tile_columns) * tile_columns
    needed = (rounded - 1) * window.strides[1] + window.dilation[1] * (taps_w - 1) + 1
    padded = pad(
        data,
        window,
        name="conv_pad",
        value=tirx.Cast(data.dtype, levels[0]),
        width=needed if rounded > width else None,
    )
    r = te.reduce_axis((0, taps_h), "r")
    s = te.reduce_axis((0, taps_w), "s")
    c = te.reduce_axis((0, depth), "c")
    sums = te.compute(
        (window.shape[0], height, rounded, blocks * tile),
        lambda n, h, w, k: te.sum(
            as_int32(
                padded[
                    n,
                    h * window.strides[0] + r * window.dilation[0],
                    w * window.strides[1] + s * window.dilation[1],
                    c,
                ]
            )
            * as_int32(weight[k // tile, r, s, c, k % tile]),
            axis=[r, s, c],
        ),
        name="conv_acc",
    )
    channels = int(bias.shape[0])
    return te.compute(
        (window.shape[0], height, width, channels),
        lambda *i: level(
            total(sums[i], i, bias, offsets, window_sums),
            i,
            multiplier[i[3]],
            levels,
            residual,
            residual_multiplier,
            out_dtype,
        ),
        name="requantize",
    )


def depthwise_conv2d(
    data: te.Tensor,
    weight: te.Tensor,
    bias: te.Tensor,
    multiplier: te.Tensor,
    levels: te.Tensor,
    residual: te.Tensor | None = None,
    residual_multiplier: te.Tensor | None = None,
    *,
    window: Window,
    out_dtype: str,
) -> te.Tensor:
    """Return ``hone.conv2d_int8`` with one filter for each channel, weights ``[R, S, C]``."""
    taps_h, taps_w, channels = (int(extent) for extent in weight.shape)
    padded = pad(data, window, name="dw_pad", value=tirx.Cast(data.dtype, levels[0]), likely=True)
    r, s = te.reduce_axis((0, taps_h), "r"), te.reduce_axis((0, taps_w), "s")
    shape = (window.shape[0], *window.output, channels)
    sums = te.compute(
        shape,
        lambda n, h, w, c: te.sum(
            as_int32(
                padded[
                    n,
                    h * window.strides[0] + r * window.dilation[0],
                    w * window.strides[1] + s * window.dilation[1],
                    c,
                ]
            )
            * as_int32(weight[r, s, c]),
            axis=[r, s],
        ),
        name="dw_acc",
    )
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


def dense(
    data: te.Tensor,
    weight: te.Tensor,
    bias: te.Tensor,
    multiplier: te.Tensor,
    levels: te.Tensor,
    residual: te.Tensor | None = None,
    residual_multiplier: te.Tensor | None = None,
    offsets: te.Tensor | None = None,
    window_sums: te.Tensor | None = None,
    *,
    out_dtype: str,
) -> te.Tensor:
    """Return ``hone.dense_int8`` of ``[M, C]`` with packed weights ``[ceil(K / tk), C, tk]``."""
    rows, channels = int(data.shape[0]), int(bias.shape[0])
    blocks, depth, tile = (int(extent) for extent in weight.shape)
    c = te.reduce_axis((0, depth), "c")
    sums = te.compute(
        (rows, blocks * tile),
        lambda m, k: te.sum(
            as_int32(data[m, c]) * as_int32(weight[k // tile, c, k % tile]), axis=c
        ),
        name="mm_acc",
    )
    return te.compute(
        (rows, channels),
        lambda *i: level(
            total(sums[i], i, bias, offsets, window_sums),
            i,
            multiplier[i[1]],
            levels,
            residual,
            residual_multiplier,
            out_dtype,
        ),
        name="requantize",
    )


def row_sums(data: te.Tensor) -> te.Tensor:
    """Return ``hone.row_sums``."""
    c = te.reduce_axis((0, int(data.shape[-1])), "c")
    return te.compute(
        data.shape[:-1], lambda *i: te.sum(as_int32(data(*i, c)), axis=c), name="row_sums"
    )


def window_sums(data: te.Tensor, border: te.Tensor, *, window: Window) -> te.Tensor:
    """Return ``hone.window_sums``, ``[N, OH, OW]``, of ``[N, H, W]``."""
    batch, height, width, _ = window.shape
    top, left, bottom, right = window.padding

    def inside(n: tirx.Var, h: tirx.Var, w: tirx.Var) -> Expr:
        bounds = [h >= top, h < height + top, w >= left, w < width + left]
        return tirx.if_then_else(tirx.all(*bounds), data[n, h - top, w - left], border[0])

    padded = data
    if any(window.padding):
        shape = (batch, height + top + bottom, width + left + right)
        padded = te.compute(shape, inside, name="sums_pad")
    r, s = te.reduce_axis((0, window.taps[0]), "r"), te.reduce_axis((0, window.taps[1]), "s")

    def element(n: tirx.Var, h: tirx.Var, w: tirx.Var) -> Expr:
        y = h * window.strides[0] + r * window.dilation[0]
        x = w * window.strides[1] + s * window.dilation[1]
        return te.sum(padded[n, y, x], axis=[r, s])

    return te.compute((batch, *window.output), element, name="window_sums")


def add(
    left: te.Tensor, right: te.Tensor, multipliers: te.Tensor, levels: te.Tensor, *, out_dtype: str
) -> te.Tensor:
    """Return ``hone.add_int8``."""

    def element(*i: tirx.Var) -> Expr:
        fixed = arithmetic.fixed_point(as_int32(left(*i)) - levels[0], multipliers[0])
        fixed += arithmetic.fixed_point(as_int32(right(*i)) - levels[1], multipliers[1])
        return arithmetic.round_fixed_point(
            fixed, zero_point=levels[2], low=levels[3], high=levels[4], dtype=out_dtype
        )

    return te.compute(left.shape, element, name="requantize")


def multiply(
    left: te.Tensor, right: te.Tensor, multiplier: te.Tensor, levels: te.Tensor, *, out_dtype: str
) -> te.Tensor:
    """Return ``hone.multiply_int8``."""
    shapes = [[int(extent) for extent in x.shape] for x in (left, right)]

    def read(tensor: te.Tensor, shape: list[int], i: Sequence[tirx.Var]) -> Expr:
        return tensor(*(0 if extent == 1 else at for extent, at in zip(shape, i, strict=True)))

    def element(*i: tirx.Var) -> Expr:
        first = as_int32(read(left, shapes[0], i)) - levels[0]
        second = as_int32(read(right, shapes[1], i)) - levels[1]
        return arithmetic.requantize(
            first * second,
            multiplier[0],
            zero_point=levels[2],
            low=levels[3],
            high=levels[4],
            dtype=out_dtype,
        )

    shape = [max(a, b) for a, b in zip(*shapes, strict=True)]
    return te.compute(shape, element, name="requantize")


def table(data: te.Tensor, values: te.Tensor) -> te.Tensor:
    """Return ``hone.table_int8``."""
    return te.compute(data.shape, lambda *i: values[as_int32(data(*i))], name="look_up")


def avg_pool2d(
    data: te.Tensor, multiplier: te.Tensor, levels: te.Tensor, *, window: Window, out_dtype: str
) -> te.Tensor:
    """Return ``hone.avg_pool2d_int8``."""
    padded = pad(data, window, name="dw_pad", value=tirx.Cast(data.dtype, levels[0]), likely=True)
    r, s = te.reduce_axis((0, window.taps[0]), "r"), te.reduce_axis((0, window.taps[1]), "s")
    shape = (window.shape[0], *window.output, window.shape[3])
    sums = te.compute(
        shape,
        lambda n, h, w, c: te.sum(
            as_int32(
                padded[
                    n,
                    h * window.strides[0] + r * window.dilation[0],
                    w * window.strides[1] + s * window.dilation[1],
                    c,
                ]
            ),
            axis=[r, s],
        ),
        name="dw_acc",
    )
    return _averaged(sums, math.prod(window.taps), multiplier, levels, out_dtype)


def mean(
    data: te.Tensor,
    multiplier: te.Tensor,
    levels: te.Tensor,
    *,
    axis: Sequence[int],
    keepdims: bool,
    out_dtype: str,
) -> te.Tensor:
    """Return ``hone.mean_int8``."""
    extents = [int(extent) for extent in data.shape]
    averaged = sorted({a % len(extents) for a in axis})
    reduced = {a: te.reduce_axis((0, extents[a]), f"r{a}") for a in averaged}
    shape = [
        1 if a in reduced else e for a, e in enumerate(extents) if keepdims or a not in reduced
    ]

    def element(*i: tirx.Var) -> Expr:
        kept = iter(i)
        index = []
        for a in range(len(extents)):
            if a in reduced:
                if keepdims:
                    next(kept)
                index.append(reduced[a])
            else:
                index.append(next(kept))
        return te.sum(as_int32(data(*index)), axis=list(reduced.values()))

    sums = te.compute(shape, element, name="mean_acc")
    return _averaged(sums, math.prod(extents[a] for a in averaged), multiplier, levels, out_dtype)


def _averaged(
    sums: te.Tensor, count: int, multiplier: te.Tensor, levels: te.Tensor, out_dtype: str
) -> te.Tensor:
    return te.compute(
        sums.shape,
        lambda *i: arithmetic.requantize(
            sums(*i) - levels[0] * count,
            multiplier[0],
            zero_point=levels[1],
            low=levels[2],
            high=levels[3],
            dtype=out_dtype,
        ),
        name="requantize",
    )


def quantize(
    data: te.Tensor, scale: te.Tensor, zero_point: te.Tensor, *, out_dtype: str
) -> te.Tensor:
    """Return ``hone.quantize``."""
    inverse = tirx.const(1.0, "float32") / scale()
    return te.compute(
        data.shape,
        lambda *i: arithmetic.quantize(data(*i), inverse, zero_point(), dtype=out_dtype),
        name="quantize",
    )


def dequantize(data: te.Tensor, scale: te.Tensor, zero_point: te.Tensor) -> te.Tensor:
    """Return ``hone.dequantize``."""
    return te.compute(
        data.shape,
        lambda *i: arithmetic.real(as_int32(data(*i)) - zero_point(), scale()),
        name="dequantize",
    )
