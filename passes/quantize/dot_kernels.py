"""Tensor expressions of integer kernels for processors that sum products of bytes.

As `kernels`, with the sums taken over groups of `GROUP` bytes that lie side by side in the data
and, for each output channel, in the weights; `hone.targets.schedule.integer` gives a group to one
instruction. Stages: ``qconv_pad``, ``qconv_acc``; ``qmm_pad``, ``qmm_acc``; ``requantize``. The
data is uint8. Numerics: exact, and equal to those of `kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import te, tirx
from tvm.ir import Expr

from hone.passes.lower.conv2d import Window
from hone.targets.dot_intrinsics import integer_product
from hone.targets.integer_dot import GROUP

from .kernels import level, total


def rounded_up(extent: int, step: int) -> int:
    """Return the smallest multiple of ``step`` that is at least ``extent``."""
    return -(-extent // step) * step


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How the taps of a convolution are cut into groups.

    Where the channels are no multiple of a group, the taps of one kernel row, which lie side by
    side in NHWC, are one run of ``S × C`` bytes (``joined``): 21 bytes are 6 groups where 7 taps
    of 3 channels would be 7, and 9 taps of one channel are 3 groups instead of 9. The bytes of the
    last group beyond the run meet weights of 0.

    Parameters
    ----------
    joined : bool
        One run for each kernel row; else one for each tap.
    taps : int
        Runs in a kernel row.
    channels : int
        Bytes from one pixel to the next in the padded data.
    groups : int
        Groups of one run.
    group : int
        Bytes of a group.
    """

    joined: bool
    taps: int
    channels: int
    groups: int
    group: int = GROUP

    @classmethod
    def of(cls, window: Window, group: int = GROUP) -> Rows:
        """Return the cut of a window into groups of a size."""
        channels, taps = window.shape[3], window.taps[1]
        if channels % group and window.dilation[1] == 1:
            groups = -(-taps * channels // group)
            return cls(joined=True, taps=1, channels=channels, groups=groups, group=group)
        rounded = rounded_up(channels, group)
        return cls(joined=False, taps=taps, channels=rounded, groups=rounded // group, group=group)


def pack_conv2d(weight: np.ndarray, rows: Rows, tile: int) -> np.ndarray:
    """Pack ``[K, R, S, C]`` to ``[ceil(K / tile), R, taps, groups, tile, group]``, zeros around."""
    filters, taps_h = weight.shape[:2]
    runs = weight.reshape(filters, taps_h, rows.taps, -1)
    padded = np.zeros(
        (rounded_up(filters, tile), taps_h, rows.taps, rows.groups * rows.group), weight.dtype
    )
    padded[:filters, ..., : runs.shape[-1]] = runs
    blocked = padded.reshape(-1, tile, taps_h, rows.taps, rows.groups, rows.group)
    return np.ascontiguousarray(blocked.transpose(0, 2, 3, 4, 1, 5))


def pack_dense(weight: np.ndarray, tile: int) -> np.ndarray:
    """Pack ``[K, C]`` to ``[ceil(K / tile), ceil(C / GROUP), tile, GROUP]``, zeros around."""
    filters, depth = weight.shape
    padded = np.zeros((rounded_up(filters, tile), rounded_up(depth, GROUP)), weight.dtype)
    padded[:filters, :depth] = weight
    blocked = padded.reshape(-1, tile, padded.shape[1] // GROUP, GROUP)
    return np.ascontiguousarray(blocked.transpose(0, 2, 1, 3))


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
    rows: Rows,
    tile_columns: int,
    offset: int,
    out_dtype: str,
) -> te.Tensor:
    """Return ``hone.conv2d_int8`` with weights packed by `pack_conv2d`.

    Parameters
    ----------
    data : te.Tensor
        uint8 ``[N, H, W, C]``.
    weight : te.Tensor
        ``[ceil(K / tk), R, taps, groups, tk, GROUP]``.
    bias, multiplier : te.Tensor
        ``[K]``.
    levels, residual, residual_multiplier, offsets, window_sums : te.Tensor
        See `hone.passes.quantize.operators.conv2d_int8`.
    window : Window
        Geometry.
    rows : Rows
        The cut of its taps.
    tile_columns : int
        The sums' width is rounded up to it; the last stage leaves the extra columns out.
    offset : int
        What the instruction subtracts from each level; the bias holds the correction.
    out_dtype : str
        Of the result.
    """
    blocks, taps_h, _, _, tile, _ = (int(extent) for extent in weight.shape)
    height, width = window.output
    columns = rounded_up(width, tile_columns)
    if rows.joined:
        # A row is one run of bytes: the last group may end beyond the last pixel.
        first = (columns - 1) * window.strides[1] * rows.channels
        source = pad_rows(data, window, levels, first + rows.groups * GROUP, name="qconv_pad")
    else:
        needed = (columns - 1) * window.strides[1] + window.dilation[1] * (window.taps[1] - 1) + 1
        source = pad_pixels(data, window, levels, needed, rows.channels, name="qconv_pad")
    r = te.reduce_axis((0, taps_h), "r")
    s = te.reduce_axis((0, rows.taps), "s")
    group = te.reduce_axis((0, rows.groups), "group")
    byte = te.reduce_axis((0, GROUP), "byte")

    def read(n: tirx.Var, h: tirx.Var, w: tirx.Var) -> Expr:
        y = h * window.strides[0] + r * window.dilation[0]
        x, c = w * window.strides[1] + s * window.dilation[1], group * GROUP + byte
        return source[n, y, x * rows.channels + c] if rows.joined else source[n, y, x, c]

    sums = te.compute(
        (window.shape[0], height, columns, blocks * tile),
        lambda n, h, w, k: te.sum(
            integer_product(read(n, h, w), weight[k // tile, r, s, group, k % tile, byte], offset),
            axis=[r, s, group, byte],
        ),
        name="qconv_acc",
    )
    return te.compute(
        (window.shape[0], height, width, int(bias.shape[0])),
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


def pad_pixels(
    data: te.Tensor, window: Window, levels: te.Tensor, width: int, channels: int, *, name: str
) -> te.Tensor:
    """Return ``[N, H, W, C]`` with zero points around each image and behind each pixel.

    At least ``width`` pixels of ``channels``; the data itself where nothing is added.
    """
    batch, height, in_width, depth = window.shape
    top, left, bottom, right = window.padding
    width = max(width, in_width + left + right)
    if not any(window.padding) and (width, channels) == (in_width, depth):
        return data

    def element(n: tirx.Var, h: tirx.Var, w: tirx.Var, c: tirx.Var) -> Expr:
        bounds = [h >= top, h < height + top, w >= left, w < in_width + left]
        if channels > depth:
            bounds.append(c < depth)
        return tirx.if_then_else(
            tirx.all(*bounds), data[n, h - top, w - left, c], tirx.Cast(data.dtype, levels[0])
        )

    return te.compute((batch, height + top + bottom, width, channels), element, name=name)


def pad_rows(
    data: te.Tensor, window: Window, levels: te.Tensor, run: int, *, name: str
) -> te.Tensor:
    """Return ``[N, H, bytes of a row]``, at least ``run`` of them, with zero points around."""
    batch, height, in_width, depth = window.shape
    top, left, bottom, right = window.padding
    run = rounded_up(max(run, (in_width + left + right) * depth), GROUP)

    def element(n: tirx.Var, h: tirx.Var, x: tirx.Var) -> Expr:
        zero_point = tirx.Cast(data.dtype, levels[0])
        value = data[n, h - top, x // depth - left, x % depth]
        # Each bound is marked likely by itself, which is what loop partitioning understands: it
        # leaves a plain copy between the borders.
        row = tirx.if_then_else(tirx.likely(x < (in_width + left) * depth), value, zero_point)
        row = tirx.if_then_else(tirx.likely(x >= left * depth), row, zero_point)
        return tirx.if_then_else(tirx.all(h >= top, h < height + top), row, zero_point)

    return te.compute((batch, height + top + bottom, run), element, name=name)


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
    tile_rows: int,
    offset: int,
    out_dtype: str,
) -> te.Tensor:
    """Return ``hone.dense_int8`` of ``[M, C]`` with weights packed by `pack_dense`.

    Where ``tile_rows`` does not divide M, the last tile computes the last row again and again;
    what is computed twice is cut off.
    """
    rows, depth = (int(extent) for extent in data.shape)
    channels = int(bias.shape[0])
    blocks, groups, tile, _ = (int(extent) for extent in weight.shape)
    source = data
    if groups * GROUP > depth:
        source = te.compute(
            (rows, groups * GROUP),
            lambda m, c: tirx.if_then_else(c < depth, data[m, c], tirx.const(0, data.dtype)),
            name="qmm_pad",
        )
    group, byte = te.reduce_axis((0, groups), "group"), te.reduce_axis((0, GROUP), "byte")
    rounded = rounded_up(rows, tile_rows)

    def element(m: tirx.Var, k: tirx.Var) -> Expr:
        row = m if rounded == rows else tirx.min(m, rows - 1)
        product = integer_product(
            source[row, group * GROUP + byte], weight[k // tile, group, k % tile, byte], offset
        )
        return te.sum(product, axis=[group, byte])

    sums = te.compute((rounded, blocks * tile), element, name="qmm_acc")
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
