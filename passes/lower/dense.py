"""Lowers matrix products to TIR: packed weights for a constant right side, plain otherwise.

Rewrites ``relax.matmul`` in float32. A constant ``[C, K]`` right side becomes
``[ceil(K / tk), C, tk]``, leading axes of the left side are one long axis, or goes by products of
sums (`pairs`) where the machine adds beside multiplying; two activations become a batched product
with its own block name. Runs before fusion. Numerics: sums may be taken in another order.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import tvm
from tvm import relax, te, tirx

from hone.targets.schedule.machine import FMA_LATENCY, FMA_PER_CYCLE, Machine
from hone.targets.schedule.pairs import applies as pairs_apply
from hone.targets.schedule.tile_model import choose_tile

from .anchors import ANCHOR, default_legalization, is_constant
from .half import is_half, widen
from .pairs import lower_product

# With fewer rows than this in the last axis a register tile would be mostly empty.
SHORT = 8
# Below this depth adding the chains up costs as much as waiting for one.
SHORT_DEPTH = 32


def pack_dense_weight(weight: np.ndarray, tile: int) -> np.ndarray:
    """Pack ``[C, K]`` to ``[ceil(K / tile), C, tile]`` with zeros in the rounding."""
    depth, channels = weight.shape
    rounded = -(-channels // tile) * tile
    padded = np.zeros((depth, rounded), weight.dtype)
    padded[:, :channels] = weight
    return np.ascontiguousarray(padded.reshape(depth, rounded // tile, tile).transpose(1, 0, 2))


def dense(data: te.Tensor, weight: te.Tensor, *, channels: int, tile_rows: int) -> te.Tensor:
    """Return ``[..., M, C] x packed [ceil(K / tk), C, tk]`` as ``[..., M, K]``.

    Where ``tile_rows`` does not divide M, the last tile computes the last row again and again;
    what is computed twice is cut off, and no row is read beyond the end.
    """
    *outer, rows, depth = (int(extent) for extent in data.shape)
    rounded = -(-rows // tile_rows) * tile_rows
    blocks, _, tile = (int(extent) for extent in weight.shape)
    c = te.reduce_axis((0, depth), "c")

    def element(*i: tirx.Var) -> tirx.Expr:
        *at, m, k = i
        row = m if rounded == rows else tirx.min(m, rows - 1)
        return te.sum(data[(*at, row, c)] * widen(weight[k // tile, c, k % tile]), axis=c)

    sums = te.compute((*outer, rounded, blocks * tile), element, name="mm_acc")
    if blocks * tile == channels and rounded == rows:
        return sums
    return te.compute((*outer, rows, channels), lambda *i: sums[i], name="mm_cut")


def choose_chains(machine: Machine, *, rows: int, channels: int, depth: int) -> int:
    """Choose how many chains of additions the sums of one row of few channels are cut into.

    A sum waits `FMA_LATENCY` cycles for itself, in which ``FMA_LATENCY x FMA_PER_CYCLE`` others
    could begin: 8 vectors of sums keep the units busy, of 10 channels there is one.

    Returns
    -------
    int
        1, 2, 4 or 8; more than 1 only for a single row that is one register tile.
    """
    vectors = -(-channels // machine.lanes)
    chains = 1 << (max(FMA_LATENCY * FMA_PER_CYCLE // vectors, 1).bit_length() - 1)
    return chains if rows == 1 and depth >= SHORT_DEPTH else 1


def chained_row(data: te.Tensor, weight: te.Tensor, *, channels: int, chains: int) -> te.Tensor:
    """Return ``[..., C] x packed [1, C, tk]`` of one row, as several sums that are added up.

    Chain j takes every element ``chains i + j``. What is left of a depth that they do not divide is
    added behind them.
    """
    *outer, depth = (int(extent) for extent in data.shape)
    tile = int(weight.shape[-1])
    zeros = [0] * len(outer)
    c = te.reduce_axis((0, depth // chains), "c")

    def term(at: tirx.Expr | int, k: tirx.Expr) -> tirx.Expr:
        return data[(*zeros, at)] * widen(weight[0, at, k])

    sums = te.compute(
        (chains, tile), lambda j, k: te.sum(term(c * chains + j, k), axis=c), name="mmrow_acc"
    )

    def total(k: tirx.Var) -> tirx.Expr:
        parts = [sums[j, k] for j in range(chains)]
        while len(parts) > 1:
            parts = [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)]
        for at in range(depth // chains * chains, depth):
            parts[0] = parts[0] + term(at, k)
        return parts[0]

    added = te.compute((tile,), total, name="mmrow_total")
    return te.compute((*outer, channels), lambda *i: added[i[-1]], name="mmrow_out")


def batch_matmul(left: te.Tensor, right: te.Tensor, *, tile_rows: int, lanes: int) -> te.Tensor:
    """Return ``[..., M, C] x [..., C, K]``, leading axes equal.

    Where the lanes of a vector do not divide K, the right side is copied with zeros behind it.
    For rows that ``tile_rows`` does not divide see `dense`.
    """
    *outer, rows, depth = (int(extent) for extent in left.shape)
    channels = int(right.shape[-1])
    rounded = -(-rows // tile_rows) * tile_rows
    padded = -(-channels // lanes) * lanes
    if padded > channels:
        source = right
        right = te.compute(
            (*outer, depth, padded),
            lambda *i: tirx.if_then_else(i[-1] < channels, source[i], tirx.const(0, source.dtype)),
            name="bmm_pad",
        )
    c = te.reduce_axis((0, depth), "c")

    def element(*i: tirx.Var) -> tirx.Expr:
        *at, m, k = i
        row = m if rounded == rows else tirx.min(m, rows - 1)
        return te.sum(left[(*at, row, c)] * right[(*at, c, k)], axis=c)

    sums = te.compute((*outer, rounded, padded), element, name="bmm_acc")
    if rounded == rows and padded == channels:
        return sums
    return te.compute((*outer, rows, channels), lambda *i: sums[i], name="bmm_cut")


def legalize_matmul(
    machine: Machine, bb: relax.BlockBuilder, call: relax.Call, *, scaled: bool = False
) -> relax.Expr:
    """Legalize one ``relax.matmul`` call; ``scaled`` says that its data has a known scale."""
    left, right = call.args
    left_shape = [int(extent) for extent in left.ty.shape]
    right_shape = [int(extent) for extent in right.ty.shape]
    stored = is_constant(right) and is_half(right)
    if not (str(left.ty.dtype) == str(call.ty.dtype) == "float32") or not (
        stored or str(right.ty.dtype) == "float32"
    ):
        return default_legalization(bb, call)
    if is_constant(right) and len(right_shape) == 2 and len(left_shape) >= 2:
        return _packed(machine, bb, call, left_shape, right, scaled=scaled)
    if len(left_shape) == len(right_shape) >= 3 and left_shape[:-2] == right_shape[:-2]:
        rows, depth = left_shape[-2:]
        channels = right_shape[-1]
        tile = choose_tile(machine, height=1, width=rows, channels=channels, depth=depth, taps=1)
        return bb.call_te(
            partial(batch_matmul, tile_rows=tile.columns, lanes=min(machine.lanes, channels)),
            left,
            right,
            primfunc_name_hint="batch_matmul",
            primfunc_attrs=ANCHOR,
        )
    return default_legalization(bb, call)


def _goes_by_pairs(machine: Machine, left_shape: list[int], weight: np.ndarray) -> bool:
    """Say whether ``[..., M, C] x [C, K]`` is computed by products of sums (`pairs`)."""
    depth, channels = weight.shape
    return (
        weight.dtype == np.float32
        and left_shape[-2] >= SHORT
        and pairs_apply(machine, height=1, width=left_shape[-2], channels=channels, depth=depth)
        and bool(np.isfinite(weight).all())
    )


def _packed(
    machine: Machine,
    bb: relax.BlockBuilder,
    call: relax.Call,
    left_shape: list[int],
    weight: tvm.ir.GenericConst,
    *,
    scaled: bool,
) -> relax.Expr:
    """Legalize a product with constant weights, as one long matrix where rows are few."""
    *outer, rows, depth = left_shape
    channels = int(weight.ty.shape[-1])
    flatten = rows < SHORT and math.prod(outer) > 1
    if flatten:
        rows = math.prod(left_shape[:-1])
    data = call.args[0]
    if flatten:
        data = bb.emit(relax.op.reshape(data, (rows, depth)))
    values = weight.value.numpy()
    if scaled and _goes_by_pairs(machine, left_shape, values):
        return lower_product(machine, bb, data, values, name="pairs_dense")
    tile = choose_tile(machine, height=1, width=rows, channels=channels, depth=depth, taps=1)
    chains = choose_chains(machine, rows=rows, channels=channels, depth=depth)
    if chains > 1:
        packed = pack_dense_weight(
            weight.value.numpy(), -(-channels // machine.lanes) * machine.lanes
        )
        make = partial(chained_row, channels=channels, chains=chains)
    else:
        packed = pack_dense_weight(weight.value.numpy(), tile.vectors * machine.lanes)
        make = partial(dense, channels=channels, tile_rows=tile.columns)
    product = bb.call_te(
        make,
        data,
        relax.const(packed),
        primfunc_name_hint="dense",
        primfunc_attrs=ANCHOR,
    )
    if flatten:
        product = relax.op.reshape(bb.emit(product), (*left_shape[:-1], channels))
    return product
