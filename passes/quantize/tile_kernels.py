"""Integer kernels for processors that multiply tiles of bytes (AMX).

Lowers ``hone.conv2d_int8`` and ``hone.dense_int8`` to the sums of `hone.passes.lower.tile_sums`
with one stage behind them, ``requantize``, where the layer is large enough for tiles to pay. The
data is uint8. Numerics: exact, and equal to those of `kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from tvm import relax, te, tirx
from tvm.ir import Expr

from hone.passes.lower import tile_sums
from hone.passes.lower.anchors import ANCHOR
from hone.passes.lower.conv2d import Window
from hone.targets.integer_dot import IntegerDot
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_plan import TilePlan, TileWork, choose_plan, vector_cycles
from hone.targets.tile_product import TileProduct

from .kernels import level, total

PRODUCT = TileProduct.TDPBUSD

Kernel = Callable[..., te.Tensor]
Wrap = Callable[[Kernel], Kernel]


def _choose(machine: Machine, work: TileWork) -> TilePlan | None:
    """Return the tiles of a layer, or None where vectors are modelled faster."""
    if machine.integer_dot != IntegerDot.TDPBUSD:
        return None
    vectors = vector_cycles(work, IntegerDot.TDPBUSD.vector, machine.lanes)
    return choose_plan(machine, work, vectors)


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
    plan: TilePlan,
    out_dtype: str,
) -> te.Tensor:
    """Return ``hone.conv2d_int8`` with weights packed by `tile_sums.pack_tiles`.

    Parameters
    ----------
    data : te.Tensor
        uint8 ``[N, H, W, C]``, or ``[N x H x W, C]`` where that is the product's left matrix.
    weight : te.Tensor
        Packed.
    bias, multiplier : te.Tensor
        ``[K]``.
    levels, residual, residual_multiplier, offsets, window_sums : te.Tensor
        See `hone.passes.quantize.operators.conv2d_int8`.
    window : Window
        Geometry.
    plan : TilePlan
        The tiles.
    out_dtype : str
        Of the result.
    """
    batch, (height, width) = window.shape[0], window.output
    matrix = tile_sums.is_matrix(window)
    if matrix:
        source = data if plan.in_place else tile_sums.copy_matrix(data, plan)
        products = tile_sums.sums(source, weight, plan)
    else:
        zero_point = tirx.Cast(data.dtype, levels[0])
        source = tile_sums.copy_rows(data, window, plan, zero_point)
        products = tile_sums.sums(source, weight, plan, window)

    def element(n: tirx.Var, h: tirx.Var, w: tirx.Var, k: tirx.Var) -> Expr:
        pixel = (n * height + h) * width + w
        sums = products[0, pixel, k] if matrix else products[n, h * width + w, k]
        return level(
            total(sums, (n, h, w, k), bias, offsets, window_sums),
            (n, h, w, k),
            multiplier[k],
            levels,
            residual,
            residual_multiplier,
            out_dtype,
        )

    shape = (batch, height, width, int(bias.shape[0]))
    return te.compute(shape, element, name="requantize")


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
    plan: TilePlan,
    out_dtype: str,
) -> te.Tensor:
    """Return ``hone.dense_int8`` of ``[M, C]`` with weights packed by `tile_sums.pack_tiles`."""
    source = data if plan.in_place else tile_sums.copy_matrix(data, plan)
    products = tile_sums.sums(source, weight, plan)
    return te.compute(
        (int(data.shape[0]), int(bias.shape[0])),
        lambda m, k: level(
            total(products[0, m, k], (m, k), bias, offsets, window_sums),
            (m, k),
            multiplier[k],
            levels,
            residual,
            residual_multiplier,
            out_dtype,
        ),
        name="requantize",
    )


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
    """Return a convolution in tiles, or None where they do not pay.

    Parameters
    ----------
    machine : Machine
        Says whether it has tiles.
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
    filters, taps_h = weight.shape[:2]
    plan = _choose(machine, tile_sums.conv2d_work(window, filters, PRODUCT))
    if plan is None:
        return None
    data, *others = arguments
    if tile_sums.is_matrix(window):
        rows = math.prod(window.shape[:3])
        data = bb.emit(relax.op.reshape(data, (rows, window.shape[3])))
    packed = tile_sums.pack_tiles(weight.reshape(filters, taps_h, -1), plan)
    kernel = wrap(partial(conv2d, window=window, plan=plan, out_dtype=out_dtype))
    return _call(bb, kernel, data, packed, others, "conv2d_int8")


def lower_dense(
    machine: Machine,
    bb: relax.BlockBuilder,
    arguments: list[relax.Expr],
    weight: np.ndarray,
    *,
    out_dtype: str,
    wrap: Wrap,
) -> relax.Expr | None:
    """Return a matrix product in tiles as `lower_conv2d` does; ``weight`` is ``[K, C]``."""
    data, *others = arguments
    filters, depth = weight.shape
    rows = int(data.ty.shape[0])
    plan = _choose(machine, tile_sums.dense_work(rows, depth, filters, PRODUCT))
    if plan is None:
        return None
    packed = tile_sums.pack_tiles(weight[:, None], plan)
    kernel = wrap(partial(dense, plan=plan, out_dtype=out_dtype))
    return _call(bb, kernel, data, packed, others, "dense_int8")


def _call(
    bb: relax.BlockBuilder,
    kernel: Kernel,
    data: relax.Expr,
    packed: np.ndarray,
    others: list[relax.Expr],
    name: str,
) -> relax.Expr:
    return bb.call_te(
        kernel,
        data,
        relax.const(packed),
        *others,
        primfunc_name_hint=name,
        primfunc_attrs=ANCHOR,
    )
