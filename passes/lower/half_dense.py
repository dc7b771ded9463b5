"""Lowers matrix products of bfloat16 to sums of pairs, weights ``[K / tk, C / 2, tk, 2]``.

Rewrites ``relax.matmul`` of 16-bit floats with a float32 result. A constant right side is packed
here; one that is computed is packed to words once for each matrix of the batch, inside the kernel.
Without an instruction for pairs, or with an odd depth, the data is widened before a float product
and constant weights in registers. Products with constant weights that are large enough for AMX
are left to `half_tiles`. Runs before fusion. Numerics: products of 16-bit floats, sums in
float32.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from tvm import relax, te, tirx

from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_model import choose_tile

from .anchors import ANCHOR, is_constant
from .dense import SHORT, legalize_matmul
from .half import PAIR, Pairs, words
from .half_tiles import lower_dense


def pack_dense(weight: np.ndarray, tile: int) -> np.ndarray:
    """Pack ``[C, K]`` of 16-bit floats, C even, to int32 ``[ceil(K / tile), C / 2, tile]``."""
    depth, channels = weight.shape
    padded = np.zeros((depth, -(-channels // tile) * tile), weight.dtype)
    padded[:, :channels] = weight
    blocked = padded.reshape(depth // PAIR, PAIR, -1, tile)
    return words(np.ascontiguousarray(blocked.transpose(2, 0, 3, 1)))


def dense(
    data: te.Tensor,
    weight: te.Tensor,
    *,
    pairs: Pairs,
    channels: int,
    tile_rows: int,
) -> te.Tensor:
    """Return float32 ``[..., M, K]`` of ``[..., M, C]`` and weights packed by `pack_dense`.

    For rows that ``tile_rows`` does not divide see `hone.passes.lower.dense.dense`.
    """
    *outer, rows, _ = (int(extent) for extent in data.shape)
    rounded = -(-rows // tile_rows) * tile_rows
    blocks, depth, tile = (int(extent) for extent in weight.shape)
    pair = te.reduce_axis((0, depth), "pair")

    def element(*i: tirx.Var) -> tirx.Expr:
        *at, m, k = i
        row = m if rounded == rows else tirx.min(m, rows - 1)
        return pairs.sum(
            lambda half: data[(*at, row, PAIR * pair + half)],
            weight[k // tile, pair, k % tile],
            axis=[pair],
        )

    sums = te.compute((*outer, rounded, blocks * tile), element, name="mm_acc")
    if blocks * tile == channels and rounded == rows:
        return sums
    return te.compute((*outer, rows, channels), lambda *i: sums[i], name="mm_cut")


def batch_matmul(
    left: te.Tensor, right: te.Tensor, *, pairs: Pairs, tile_rows: int, lanes: int
) -> te.Tensor:
    """Return float32 ``[..., M, C] x [..., C, K]`` of 16-bit floats, leading axes equal, C even."""
    *outer, rows, depth = (int(extent) for extent in left.shape)
    channels = int(right.shape[-1])
    rounded = -(-rows // tile_rows) * tile_rows
    padded = -(-channels // lanes) * lanes

    def pack(*i: tirx.Var) -> tirx.Expr:
        *at, pair, k = i
        value = pairs.word(lambda half: right[(*at, PAIR * pair + half, k)])
        if padded == channels:
            return value
        return tirx.if_then_else(k < channels, value, tirx.const(0, "int32"))

    packed = te.compute((*outer, depth // PAIR, padded), pack, name="bmm_pad")
    pair = te.reduce_axis((0, depth // PAIR), "pair")

    def element(*i: tirx.Var) -> tirx.Expr:
        *at, m, k = i
        row = m if rounded == rows else tirx.min(m, rows - 1)
        return pairs.sum(
            lambda half: left[(*at, row, PAIR * pair + half)], packed[(*at, pair, k)], axis=[pair]
        )

    sums = te.compute((*outer, rounded, padded), element, name="bmm_acc")
    if rounded == rows and padded == channels:
        return sums
    return te.compute((*outer, rows, channels), lambda *i: sums[i], name="bmm_cut")


def legalize_half_matmul(machine: Machine, bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize one product of 16-bit floats. See the module."""
    left, right = call.args
    pairs = Pairs.of(machine, str(left.ty.dtype))
    if pairs is not None and is_constant(right):
        tiles = lower_dense(machine, pairs, bb, left, right.value.numpy())
        if tiles is not None:
            return tiles
    if pairs is None or int(left.ty.shape[-1]) % PAIR:
        return _widened(machine, bb, call)
    return _paired(machine, pairs, bb, call)


def _widened(machine: Machine, bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize a product of 16-bit floats in float32; constant weights stay as they are stored."""
    operands = [
        operand
        if is_constant(operand) and position == 1
        else bb.emit(relax.op.astype(operand, "float32"))
        for position, operand in enumerate(call.args)
    ]
    product = relax.Call(call.op, operands, call.attrs, call.ty_args)
    return legalize_matmul(machine, bb, bb.normalize(product))


def _paired(machine: Machine, pairs: Pairs, bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize a product of even depth for a machine that sums pairs."""
    left, right = call.args
    *outer, rows, depth = (int(extent) for extent in left.ty.shape)
    channels = int(right.ty.shape[-1])
    if is_constant(right):
        flatten = rows < SHORT and math.prod(outer) > 1
        if flatten:
            rows = rows * math.prod(outer)
            left = bb.emit(relax.op.reshape(left, (rows, depth)))
        tile = choose_tile(
            machine, height=1, width=rows, channels=channels, depth=depth // PAIR, taps=1
        )
        product = bb.call_te(
            partial(dense, pairs=pairs, channels=channels, tile_rows=tile.columns),
            left,
            relax.const(pack_dense(right.value.numpy(), tile.vectors * machine.lanes)),
            primfunc_name_hint="dense_half",
            primfunc_attrs=ANCHOR,
        )
        if flatten:
            product = relax.op.reshape(bb.emit(product), call.ty.shape)
        return product
    tile = choose_tile(
        machine, height=1, width=rows, channels=channels, depth=depth // PAIR, taps=1
    )
    return bb.call_te(
        partial(batch_matmul, pairs=pairs, tile_rows=tile.columns, lanes=machine.lanes),
        left,
        right,
        primfunc_name_hint="batch_matmul_half",
        primfunc_attrs=ANCHOR,
    )
