"""Lowers matrix products to TIR: packed weights for a constant right side, plain otherwise.

Rewrites ``relax.matmul`` in float32. A constant ``[C, K]`` right side becomes
``[ceil(K / tk), C, tk]``, leading axes of the left side are one long axis; two activations
become a batched product with its own block name. Runs before fusion. Numerics: sums may be
taken in another order.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from tvm import relax, te

from hone.targets.schedule.machine import Machine, choose_tile

from .anchors import ANCHOR, default_legalization, is_constant


def pack_dense_weight(weight: np.ndarray, tile: int) -> np.ndarray:
    """Pack ``[C, K]`` to ``[ceil(K / tile), C, tile]`` with zeros in the rounding."""
    depth, channels = weight.shape
    rounded = -(-channels // tile) * tile
    padded = np.zeros((depth, rounded), weight.dtype)
    padded[:, :channels] = weight
    return np.ascontiguousarray(padded.reshape(depth, rounded // tile, tile).transpose(1, 0, 2))


def dense(data: te.Tensor, weight: te.Tensor, *, channels: int) -> te.Tensor:
    """Return ``[M, C] x packed [ceil(K / tk), C, tk]`` as ``[M, K]``."""
    rows = int(data.shape[0])
    blocks, depth, tile = (int(extent) for extent in weight.shape)
    c = te.reduce_axis((0, depth), "c")
    sums = te.compute(
        (rows, blocks * tile),
        lambda m, k: te.sum(data[m, c] * weight[k // tile, c, k % tile], axis=c),
        name="mm_acc",
    )
    if blocks * tile == channels:
        return sums
    return te.compute((rows, channels), lambda *i: sums[i], name="mm_cut")


def batch_matmul(left: te.Tensor, right: te.Tensor) -> te.Tensor:
    """Return ``[..., M, C] x [..., C, K]``, leading axes equal."""
    *outer, rows, depth = (int(extent) for extent in left.shape)
    channels = int(right.shape[-1])
    c = te.reduce_axis((0, depth), "c")
    return te.compute(
        (*outer, rows, channels),
        lambda *i: te.sum(left[(*i[:-1], c)] * right[(*i[:-2], c, i[-1])], axis=c),
        name="bmm_acc",
    )


def legalize_matmul(machine: Machine, bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize one ``relax.matmul`` call for the machine. See the module."""
    left, right = call.args
    left_shape = [int(extent) for extent in left.ty.shape]
    right_shape = [int(extent) for extent in right.ty.shape]
    if not (str(left.ty.dtype) == str(right.ty.dtype) == str(call.ty.dtype) == "float32"):
        return default_legalization(bb, call)
    if is_constant(right) and len(right_shape) == 2 and len(left_shape) >= 2:
        rows = math.prod(left_shape[:-1])
        depth, channels = right_shape
        tile = choose_tile(machine, height=1, width=rows, channels=channels, depth=depth, taps=1)
        packed = pack_dense_weight(right.value.numpy(), tile.vectors * machine.lanes)
        flat = left
        if len(left_shape) > 2:
            flat = bb.emit(relax.op.reshape(left, (rows, depth)))
        product = bb.call_te(
            partial(dense, channels=channels),
            flat,
            relax.const(packed),
            primfunc_name_hint="dense",
            primfunc_attrs=ANCHOR,
        )
        if len(left_shape) > 2:
            product = relax.op.reshape(bb.emit(product), (*left_shape[:-1], channels))
        return product
    if len(left_shape) == len(right_shape) >= 3 and left_shape[:-2] == right_shape[:-2]:
        return bb.call_te(
            batch_matmul, left, right, primfunc_name_hint="batch_matmul", primfunc_attrs=ANCHOR
        )
    return default_legalization(bb, call)
