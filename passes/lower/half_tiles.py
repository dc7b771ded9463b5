"""Lowers convolutions and matrix products of bfloat16 to products of AMX tiles.

Rewrites the same calls as `half_conv2d` and `half_dense`, where the target has ``tdpbf16ps`` and
tiles are modelled faster than vectors by the margin that integer layers ask for: than pairs in
vectors, and than Winograd's F(2x2) where that applies. Weights are packed as tiles. Bias, residual,
activation and rounding are elementwise stages behind the sums. Runs before fusion. Numerics: those
of the instruction, products of bfloat16 with sums in float32, denormals counted as zero.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from tvm import relax, te, tirx
from tvm.ir import Expr

from hone.targets.half_dot import HalfDot
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_plan import TilePlan, TileWork, choose_plan, vector_cycles
from hone.targets.tile_product import TileProduct

from . import tile_sums
from .anchors import ANCHOR
from .half import Pairs, rounded_source
from .window import Window

PRODUCT = TileProduct.TDPBF16PS


def _has_tiles(machine: Machine) -> bool:
    return machine.half_dot == HalfDot.TDPBF16PS


def _choose(machine: Machine, work: TileWork, other: float = math.inf) -> TilePlan | None:
    """Return the tiles of a layer, or None where vectors or ``other`` cycles are fewer."""
    vectors = vector_cycles(work, HalfDot.TDPBF16PS.vector, machine.lanes)
    return choose_plan(machine, work, min(vectors, other))


def conv2d(
    data: te.Tensor,
    weight: te.Tensor,
    *,
    pairs: Pairs,
    window: Window,
    plan: TilePlan,
    channels: int,
) -> te.Tensor:
    """Return the float32 convolution ``[N, H, W, K]`` with weights packed as tiles.

    Parameters
    ----------
    data : te.Tensor
        ``[N, H, W, C]`` of bfloat16, or of float32, which is rounded where it is copied; bfloat16
        ``[N x H x W, C]`` where that is the product's left matrix.
    weight : te.Tensor
        Bits, packed by `tile_sums.pack_tiles`.
    pairs : Pairs
        Says how to round.
    window : Window
        Geometry.
    plan : TilePlan
        The tiles.
    channels : int
        K.
    """
    height, width = window.output
    matrix = tile_sums.is_matrix(window)
    if matrix:
        sums = _matrix_sums(data, weight, pairs=pairs, plan=plan)
    else:
        zero = tirx.const(0, "uint16")
        source = tile_sums.copy_rows(data, window, plan, zero, read=pairs.bits)
        sums = tile_sums.sums(source, weight, plan, window)

    def element(n: tirx.Var, h: tirx.Var, w: tirx.Var, k: tirx.Var) -> Expr:
        pixel = h * width + w
        return sums[0, n * height * width + pixel, k] if matrix else sums[n, pixel, k]

    return te.compute((window.shape[0], height, width, channels), element, name="tile_cut")


def dense(
    data: te.Tensor,
    weight: te.Tensor,
    *,
    pairs: Pairs,
    plan: TilePlan,
    shape: tuple[int, ...],
) -> te.Tensor:
    """Return the float32 product, ``[..., M, K]``, of bfloat16 ``[rows, C]`` and packed weights.

    Parameters
    ----------
    data : te.Tensor
        All leading axes of the operand as one.
    weight : te.Tensor
        Bits, packed by `tile_sums.pack_tiles`.
    pairs : Pairs
        Says how to take the bits.
    plan : TilePlan
        The tiles.
    shape : tuple of int
        Of the result.
    """
    sums = _matrix_sums(data, weight, pairs=pairs, plan=plan)

    def element(*index: tirx.Var) -> Expr:
        row = tirx.const(0, "int32")
        for extent, at in zip(shape[:-1], index[:-1], strict=True):
            row = row * extent + at
        return sums[0, row, index[-1]]

    return te.compute(shape, element, name="tile_cut")


def _matrix_sums(data: te.Tensor, weight: te.Tensor, *, pairs: Pairs, plan: TilePlan) -> te.Tensor:
    source = data if plan.in_place else tile_sums.copy_matrix(data, plan, read=pairs.bits)
    return tile_sums.sums(source, weight, plan)


def _packed(weight: np.ndarray, plan: TilePlan) -> relax.Constant:
    """Return the bits of ``[K, T, run]`` in bfloat16 as tiles."""
    return relax.const(tile_sums.pack_tiles(np.ascontiguousarray(weight).view("uint16"), plan))


def lower_conv2d(
    machine: Machine,
    pairs: Pairs,
    bb: relax.BlockBuilder,
    data: relax.Expr,
    weight: np.ndarray,
    window: Window,
    *,
    winograd_cycles: float,
) -> relax.Expr | None:
    """Return a convolution in tiles, or None where they do not pay.

    Parameters
    ----------
    machine : Machine
        Says whether it has tiles.
    pairs : Pairs
        Says how to round.
    bb : BlockBuilder
        Takes the bindings.
    data : Expr
        bfloat16 ``[N, H, W, C]``.
    weight : ndarray
        bfloat16 ``[K, R, S, C]``.
    window : Window
        Geometry.
    winograd_cycles : float
        Modelled, of all threads, of the alternative; infinite where there is none.
    """
    if not _has_tiles(machine):
        return None
    channels, taps_h = weight.shape[:2]
    work = tile_sums.conv2d_work(window, channels, PRODUCT)
    plan = _choose(machine, work, winograd_cycles * machine.threads)
    if plan is None:
        return None
    if tile_sums.is_matrix(window):
        data = bb.emit(relax.op.reshape(data, (math.prod(window.shape[:3]), window.shape[3])))
    else:
        data = rounded_source(bb, data)
    kernel = partial(conv2d, pairs=pairs, window=window, plan=plan, channels=channels)
    return bb.call_te(
        kernel,
        data,
        _packed(weight.reshape(channels, taps_h, -1), plan),
        primfunc_name_hint="conv2d_half",
        primfunc_attrs=ANCHOR,
    )


def lower_dense(
    machine: Machine,
    pairs: Pairs,
    bb: relax.BlockBuilder,
    data: relax.Expr,
    weight: np.ndarray,
) -> relax.Expr | None:
    """Return ``[..., M, C] x [C, K]`` in tiles as `lower_conv2d` does."""
    if not _has_tiles(machine):
        return None
    *outer, depth = (int(extent) for extent in data.ty.shape)
    rows, channels = math.prod(outer), weight.shape[1]
    plan = _choose(machine, tile_sums.dense_work(rows, depth, channels, PRODUCT))
    if plan is None:
        return None
    if len(outer) > 1:
        data = bb.emit(relax.op.reshape(data, (rows, depth)))
    return bb.call_te(
        partial(dense, pairs=pairs, plan=plan, shape=(*outer, channels)),
        data,
        _packed(weight.T[:, None], plan),
        primfunc_name_hint="dense_half",
        primfunc_attrs=ANCHOR,
    )
