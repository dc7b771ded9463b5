"""Tensor expressions of convolutions and matrix products in tiles, up to their sums.

The output pixels of an image are one sequence. `copy_rows` lays each pixel's row of taps out as
one run, so that 16 neighbouring pixels are a tile whatever the window, the stride and the width of
the image: a row of the kernel reads the same runs, ``OW`` pixels further on. Data that already is
such runs (1x1 of stride 1, matrices) is read in place. Stages: ``tile_copy``, ``tile_left``,
``tile_acc``, ``tile_sums``. Numerics: those of the instruction; zeros fill every rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from tvm import te, tirx

from hone.targets.schedule.tile_plan import TilePlan, TileWork
from hone.targets.schedule.tiles import LEFT_TILES, TILE_PRODUCT, TILE_ROWS
from hone.targets.tile_intrinsics import tile_term
from hone.targets.tile_product import FORMS, LANES, TileProduct

from .window import Window

Read = Callable[[tirx.Expr], tirx.Expr]
"""Makes an element of the left operand of an element of the data."""


def _same(value: tirx.Expr) -> tirx.Expr:
    return value


def _rounded(extent: int, step: int) -> int:
    return -(-extent // step) * step


def _phase_step(window: Window) -> int:
    """Return what all remainders of the rows that taps begin at, modulo the stride, divide by."""
    return math.gcd(window.dilation[0], window.strides[0])


def _phases(window: Window) -> int:
    """Return how many remainders there are, up to the largest."""
    taps = range(window.taps[0])
    return (
        max(tap * window.dilation[0] % window.strides[0] for tap in taps) // _phase_step(window) + 1
    )


def _halo(window: Window) -> int:
    """Return the pixels by which the last row of taps reads further on than the first."""
    last = (window.taps[0] - 1) * window.dilation[0] // window.strides[0]
    return last * window.output[1]


def is_matrix(window: Window) -> bool:
    """Say whether the data of a window is the left matrix of its product as it is."""
    return window.taps == (1, 1) and window.strides == (1, 1) and not any(window.padding)


def conv2d_work(window: Window, filters: int, product: TileProduct) -> TileWork:
    """Return a convolution as tiles see it."""
    batch, _, _, channels = window.shape
    height, width = window.output
    if is_matrix(window):
        return dense_work(batch * height * width, channels, filters, product)
    return TileWork(
        product=product,
        images=batch,
        pixels=height * width,
        filters=filters,
        taps=window.taps[0],
        run=window.taps[1] * channels,
        copy_rows=_phases(window) * (height * width + _halo(window)),
        contiguous=False,
    )


def dense_work(rows: int, depth: int, filters: int, product: TileProduct) -> TileWork:
    """Return a matrix product as tiles see it."""
    return TileWork(
        product=product,
        images=1,
        pixels=rows,
        filters=filters,
        taps=1,
        run=depth,
        copy_rows=rows,
        contiguous=True,
    )


def pack_tiles(weight: np.ndarray, plan: TilePlan) -> np.ndarray:
    """Pack weights for the right operand of tiles.

    Parameters
    ----------
    weight : ndarray
        ``[K, T, run]``: filters, rows of taps, elements of a run.
    plan : TilePlan
        The tiles.

    Returns
    -------
    ndarray
        ``[ceil(K / block), T, steps, right tiles, groups, 16, group]``, zeros in the rounding.
    """
    shape = plan.shape
    filters, taps, run = weight.shape
    group = FORMS[shape.product].group
    padded = np.zeros(
        (_rounded(filters, shape.block_lanes), taps, plan.steps * shape.depth), weight.dtype
    )
    padded[:filters, :, :run] = weight
    split = padded.reshape(-1, shape.right_tiles, LANES, taps, plan.steps, shape.groups, group)
    return np.ascontiguousarray(split.transpose(0, 3, 4, 1, 5, 2, 6))


def copy_rows(
    data: te.Tensor, window: Window, plan: TilePlan, padding: tirx.Expr, *, read: Read = _same
) -> te.Tensor:
    """Return the runs of a window's rows of taps, ``[N, phases, pixels, pitch]``.

    Parameters
    ----------
    data : te.Tensor
        ``[N, H, W, C]``.
    window : Window
        Geometry.
    plan : TilePlan
        Rounds pixels and runs.
    padding : Expr
        What stands beyond the image, in the dtype of the left operand.
    read : callable
        Rounds data, or takes its bits.
    """
    batch, height, in_width, channels = window.shape
    top, left, _, _ = window.padding
    stride_h, stride_w = window.strides
    spread = window.dilation[1]
    width = window.output[1]
    run = window.taps[1] * channels
    pixels = _rounded(math.prod(window.output), plan.shape.block_rows) + _halo(window)
    nothing = tirx.const(0, FORMS[plan.shape.product].left)

    def element(n: tirx.Var, phase: tirx.Var, pixel: tirx.Var, at: tirx.Var) -> tirx.Expr:
        y = tirx.indexdiv(pixel, width) * stride_h + phase * _phase_step(window) - top
        first = tirx.indexmod(pixel, width) * stride_w
        tap, channel = tirx.indexdiv(at, channels), tirx.indexmod(at, channels)
        value = read(data[n, y, first + tap * spread - left, channel])
        # Each bound is marked likely by itself, which is what loop partitioning understands: it
        # leaves a plain copy between the borders.
        if spread == 1:
            right = tirx.likely(first * channels + at < (in_width + left) * channels)
            value = tirx.if_then_else(right, value, padding)
            inside = tirx.likely(first * channels + at >= left * channels)
            value = tirx.if_then_else(inside, value, padding)
        else:
            x = first + tap * spread
            value = tirx.if_then_else(tirx.all(x >= left, x < in_width + left), value, padding)
        value = tirx.if_then_else(tirx.all(y >= 0, y < height), value, padding)
        return (
            value if run == plan.pitch else tirx.if_then_else(tirx.likely(at < run), value, nothing)
        )

    return te.compute((batch, _phases(window), pixels, plan.pitch), element, name="tile_copy")


def copy_matrix(data: te.Tensor, plan: TilePlan, *, read: Read = _same) -> te.Tensor:
    """Return ``[M, C]`` as ``[1, 1, M, pitch]`` with zeros in the rounding."""
    dtype = FORMS[plan.shape.product].left
    rows, depth = (int(extent) for extent in data.shape)
    rounded = _rounded(rows, plan.shape.block_rows)

    def element(_n: tirx.Var, _phase: tirx.Var, row: tirx.Var, at: tirx.Var) -> tirx.Expr:
        inside = tirx.all(row < rows, tirx.likely(at < depth))
        return tirx.if_then_else(inside, read(data[row, at]), tirx.const(0, dtype))

    return te.compute((1, 1, rounded, plan.pitch), element, name="tile_copy")


def sums(
    source: te.Tensor, weight: te.Tensor, plan: TilePlan, window: Window | None = None
) -> te.Tensor:
    """Return the sums of a kernel, ``[N, pixels, filters]``, both rounded up to blocks.

    Parameters
    ----------
    source : te.Tensor
        Of `copy_rows`, or of `copy_matrix` or ``[M, C]`` in place without a window.
    weight : te.Tensor
        Packed by `pack_tiles`.
    plan : TilePlan
        The tiles.
    window : Window, optional
        Of a convolution that is not read in place.
    """
    shape = plan.shape
    group = FORMS[shape.product].group
    blocks, taps = int(weight.shape[0]), int(weight.shape[1])
    if window is None:
        images, rows = 1, int(source.shape[-2])
    else:
        images, rows = window.shape[0], int(source.shape[2]) - _halo(window)

    def read(n: tirx.Var, tap: tirx.Var, pixel: tirx.Var, at: tirx.Var) -> tirx.Expr:
        if window is None and len(source.shape) == 2:
            value, dtype = source[pixel, at], FORMS[shape.product].left
            return value if source.dtype == dtype else tirx.reinterpret(dtype, value)
        if window is None:
            return source[n, 0, pixel, at]
        row = tap * window.dilation[0]
        phase = tirx.indexdiv(tirx.indexmod(row, window.strides[0]), _phase_step(window))
        further = tirx.indexdiv(row, window.strides[0]) * window.output[1]
        return source[n, phase, pixel + further, at]

    left = te.compute((images, taps, rows, plan.steps * shape.depth), read, name="tile_left")
    tap = te.reduce_axis((0, taps), "tap")
    step = te.reduce_axis((0, plan.steps), "step")
    part = te.reduce_axis((0, shape.groups), "group")
    element = te.reduce_axis((0, group), "element")

    def term(n: tirx.Var, pixel: tirx.Var, k: tirx.Var) -> tirx.Expr:
        at = step * shape.depth + part * group + element
        block, lane = tirx.indexdiv(k, shape.block_lanes), tirx.indexmod(k, LANES)
        tile = tirx.indexmod(tirx.indexdiv(k, LANES), shape.right_tiles)
        return te.sum(
            tile_term(
                left[n, tap, pixel, at],
                weight[block, tap, step, tile, part, lane, element],
                shape.product,
            ),
            axis=[tap, step, part, element],
        )

    notes = {
        TILE_PRODUCT: str(shape.product),
        TILE_ROWS: shape.rows,
        LEFT_TILES: shape.left_tiles,
    }
    total = te.compute(
        (images, rows, blocks * shape.block_lanes), term, name="tile_acc", attrs=notes
    )
    return te.compute(total.shape, lambda *i: total(*i), name="tile_sums")
