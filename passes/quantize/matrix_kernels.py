"""Integer kernels for processors that multiply small matrices of bytes (ARM's i8mm).

Lowers ``hone.conv2d_int8`` and ``hone.dense_int8`` to sums of two neighbouring pixels by two
channels, each over groups of eight bytes, where that is modelled faster than `dot_kernels`. Weights
are packed as ``[K / tk, R, S, C / 8, tk / 2, 2, 8]``. Stages: ``matrix_pad``, ``matrix_left``
(levels of two pixels side by side), ``matrix_acc``, ``requantize``. The data is uint8. Numerics:
exact, and equal to those of `kernels`.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from tvm import relax, te, tirx
from tvm.ir import Expr

from hone.passes.lower import tile_sums
from hone.passes.lower.anchors import ANCHOR
from hone.passes.lower.conv2d import Window
from hone.targets.dot_intrinsics import integer_product
from hone.targets.integer_dot import MATRIX_GROUP, SIDE
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.matrix import choose_matrix_tile

from .dot_kernels import Rows, pack_conv2d, pad_pixels, pad_rows, rounded_up
from .kernels import level, total
from .tile_kernels import Kernel, Wrap


def pack(weight: np.ndarray, rows: Rows, tile: int) -> np.ndarray:
    """Pack ``[K, R, S, C]`` to ``[ceil(K / tile), R, taps, groups, tile / 2, 2, 8]``, zeros around.

    Parameters
    ----------
    weight : ndarray
        int8.
    rows : Rows
        The cut of its taps, in groups of `MATRIX_GROUP`.
    tile : int
        Channels of a register tile, even.
    """
    packed = pack_conv2d(weight, rows, tile)
    return packed.reshape(*packed.shape[:4], tile // SIDE, SIDE, MATRIX_GROUP)


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
    shape: tuple[int, ...],
    out_dtype: str,
) -> te.Tensor:
    """Return ``hone.conv2d_int8``, or ``hone.dense_int8``, with weights packed by `pack`.

    Parameters
    ----------
    data : te.Tensor
        uint8 ``[N, H, W, C]``; a matrix ``[1, 1, M, C]``.
    weight : te.Tensor
        ``[ceil(K / tk), R, taps, groups, tk / 2, 2, 8]``.
    bias, multiplier : te.Tensor
        ``[K]``.
    levels, residual, residual_multiplier, offsets, window_sums : te.Tensor
        See `hone.passes.quantize.operators.conv2d_int8`.
    window : Window
        Geometry; of 1x1 and stride 1 over ``[1, 1, M, C]`` for a matrix product.
    rows : Rows
        The cut of its taps, in groups of `MATRIX_GROUP`.
    tile_columns : int
        Pairs of pixels, of which the sums' width is a multiple; the last stage leaves the pixels
        beyond the image out.
    shape : tuple of int
        Of the result: ``(N, OH, OW, K)``, or for a matrix axes that make M, and K.
    out_dtype : str
        Of the result.
    """
    blocks, taps_h, _, _, channel_pairs, _, _ = (int(extent) for extent in weight.shape)
    height, width = window.output
    pixel_pairs = rounded_up(-(-width // SIDE), tile_columns)
    source, last = _source(data, window, rows, levels, SIDE * pixel_pairs)

    def read(
        n: tirx.Var,
        h: tirx.Var,
        pair: tirx.Var,
        r: tirx.Var,
        s: tirx.Var,
        group: tirx.Var,
        pixel: tirx.Var,
        byte: tirx.Var,
    ) -> Expr:
        y = h * window.strides[0] + r * window.dilation[0]
        x = (pair * SIDE + pixel) * window.strides[1] + s * window.dilation[1]
        c = group * MATRIX_GROUP + byte
        if rows.joined:
            return source[n, y, x * rows.channels + c]
        return source[n, y, x if last is None else tirx.min(x, last), c]

    left = te.compute(
        (window.shape[0], height, pixel_pairs, taps_h, rows.taps, rows.groups, SIDE, MATRIX_GROUP),
        read,
        name="matrix_left",
    )
    r, s = te.reduce_axis((0, taps_h), "r"), te.reduce_axis((0, rows.taps), "s")
    group = te.reduce_axis((0, rows.groups), "group")
    byte = te.reduce_axis((0, MATRIX_GROUP), "byte")

    def product(
        n: tirx.Var, h: tirx.Var, w: tirx.Var, k: tirx.Var, pixel: tirx.Var, channel: tirx.Var
    ) -> Expr:
        factor = weight[
            tirx.indexdiv(k, channel_pairs),
            r,
            s,
            group,
            tirx.indexmod(k, channel_pairs),
            channel,
            byte,
        ]
        term = integer_product(left[n, h, w, r, s, group, pixel, byte], factor, 0)
        return te.sum(term, axis=[r, s, group, byte])

    sums = te.compute(
        (window.shape[0], height, pixel_pairs, blocks * channel_pairs, SIDE, SIDE),
        product,
        name="matrix_acc",
    )
    matrix = window.shape[0] == height == 1

    def element(*index: tirx.Var) -> Expr:
        *place, k = index
        n = h = w = tirx.const(0, "int32")
        if matrix:
            for extent, at in zip(shape[:-1], place, strict=True):
                w = w * extent + at
        else:
            n, h, w = place
        total_of = sums[
            n,
            h,
            tirx.indexdiv(w, SIDE),
            tirx.indexdiv(k, SIDE),
            tirx.indexmod(w, SIDE),
            tirx.indexmod(k, SIDE),
        ]
        return level(
            total(total_of, index, bias, offsets, window_sums),
            index,
            multiplier[k],
            levels,
            residual,
            residual_multiplier,
            out_dtype,
        )

    return te.compute(shape, element, name="requantize")


def _source(
    data: te.Tensor, window: Window, rows: Rows, levels: te.Tensor, columns: int
) -> tuple[te.Tensor, int | None]:
    """Return what the products read, and the last pixel of a row where they would go beyond it."""
    name = "matrix_pad"
    if rows.joined:
        run = (columns - 1) * window.strides[1] * rows.channels + rows.groups * MATRIX_GROUP
        return pad_rows(data, window, levels, run, name=name), None
    if tile_sums.is_matrix(window):
        return data, window.shape[2] - 1 if columns > window.shape[2] else None
    needed = (columns - 1) * window.strides[1] + window.dilation[1] * (window.taps[1] - 1) + 1
    return pad_pixels(data, window, levels, needed, rows.channels, name=name), None


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
    """Return a convolution in small matrices, or None where they do not pay.

    Parameters
    ----------
    machine : Machine
        Says whether it has the instruction.
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
    shape = (window.shape[0], *window.output, weight.shape[0])
    if tile_sums.is_matrix(window):
        window = _matrix(math.prod(window.shape[:3]), window.shape[3])
    kernel = partial(conv2d, shape=shape, out_dtype=out_dtype)
    return _call(machine, bb, kernel, arguments, weight, window, wrap, "conv2d_int8")


def lower_dense(
    machine: Machine,
    bb: relax.BlockBuilder,
    arguments: list[relax.Expr],
    weight: np.ndarray,
    *,
    out_dtype: str,
    wrap: Wrap,
) -> relax.Expr | None:
    """Return a product with ``[M, C]`` as `lower_conv2d` does; ``weight`` is ``[K, C]``."""
    rows, depth = (int(extent) for extent in arguments[0].ty.shape)
    kernel = partial(conv2d, shape=(rows, weight.shape[0]), out_dtype=out_dtype)
    window = _matrix(rows, depth)
    weight = weight[:, None, None]
    return _call(machine, bb, kernel, arguments, weight, window, wrap, "dense_int8")


def _matrix(rows: int, depth: int) -> Window:
    """Return the left matrix of a product as a window over one row of pixels."""
    return Window(
        shape=(1, 1, rows, depth),
        taps=(1, 1),
        strides=(1, 1),
        dilation=(1, 1),
        padding=(0, 0, 0, 0),
    )


def _call(
    machine: Machine,
    bb: relax.BlockBuilder,
    kernel: Kernel,
    arguments: list[relax.Expr],
    weight: np.ndarray,
    window: Window,
    wrap: Wrap,
    name: str,
) -> relax.Expr | None:
    matrices, vectors = Rows.of(window, MATRIX_GROUP), Rows.of(window)
    height, width = window.output
    tile = choose_matrix_tile(
        machine,
        height=height,
        width=width,
        channels=weight.shape[0],
        matrix=(matrices.groups, window.taps[0] * matrices.taps),
        vector=(vectors.groups, window.taps[0] * vectors.taps),
    )
    if tile is None:
        return None
    data, *others = arguments
    if [int(extent) for extent in data.ty.shape] != list(window.shape):
        data = bb.emit(relax.op.reshape(data, window.shape))
    kernel = partial(kernel, window=window, rows=matrices, tile_columns=tile.columns)
    return bb.call_te(
        wrap(kernel),
        data,
        relax.const(pack(weight, matrices, tile.vectors * SIDE)),
        *others,
        primfunc_name_hint=name,
        primfunc_attrs=ANCHOR,
    )
