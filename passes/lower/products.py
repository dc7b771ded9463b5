"""Lowers matrix products of any ranks: brings them to the forms of `dense`, or broadcasts.

Rewrites ``relax.matmul`` in float32. A vector is a matrix of one row on the left and of one column
on the right; a single right matrix is multiplied with all rows of the left side at once; a single
column is a sum along rows; other leading axes are broadcast inside the kernel. Runs before fusion.
Numerics: sums may be taken in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from tvm import relax, te, tirx

from hone.passes.graph.dataflow import shape_of
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_model import choose_tile

from .anchors import ANCHOR, default_legalization, is_constant
from .dense import legalize_matmul
from .known_scale import KnownScale
from .reductions import SUM, reduce_rows


def matrix_vector(left: te.Tensor, right: te.Tensor, *, lanes: int) -> te.Tensor:
    """Return ``[M, C] x [C]`` as ``[M]``, sums in vectors along each row."""
    rows, depth = (int(extent) for extent in left.shape)
    return reduce_rows(lambda i, _, k: left[(*i, k)] * right[k], [rows], depth, SUM, lanes=lanes)


def broadcast_matmul(left: te.Tensor, right: te.Tensor, *, tile_rows: int, lanes: int) -> te.Tensor:
    """Return ``[..., M, C] x [..., C, K]``, leading axes broadcast as numpy does.

    Rounds K up to ``lanes`` and M to ``tile_rows`` as `dense.batch_matmul` does.
    """
    rows, depth = (int(extent) for extent in left.shape[-2:])
    batches = [[int(extent) for extent in side.shape[:-2]] for side in (left, right)]
    outer = np.broadcast_shapes(*batches)
    channels = int(right.shape[-1])
    rounded = -(-rows // tile_rows) * tile_rows
    padded = -(-channels // lanes) * lanes
    if padded > channels:
        source = right
        right = te.compute(
            (*batches[1], depth, padded),
            lambda *i: tirx.if_then_else(i[-1] < channels, source[i], tirx.const(0, source.dtype)),
            name="bmm_pad",
        )
    c = te.reduce_axis((0, depth), "c")

    def where(batch: list[int], at: Sequence[tirx.Var]) -> list[tirx.Expr]:
        """Return the place in one side's leading axes."""
        last = at[len(at) - len(batch) :]
        zero = tirx.const(0, "int32")
        return [zero if extent == 1 else i for extent, i in zip(batch, last, strict=True)]

    def element(*i: tirx.Var) -> tirx.Expr:
        *at, m, k = i
        row = m if rounded == rows else tirx.min(m, rows - 1)
        product = left[(*where(batches[0], at), row, c)] * right[(*where(batches[1], at), c, k)]
        return te.sum(product, axis=c)

    sums = te.compute((*outer, rounded, padded), element, name="bmm_acc")
    if rounded == rows and padded == channels:
        return sums
    return te.compute((*outer, rows, channels), lambda *i: sums[i], name="bmm_cut")


def legalize_product(
    machine: Machine, scaled: KnownScale, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    """Legalize one ``relax.matmul`` call for the machine. See the module."""
    left, right = call.args
    if not all(str(x.ty.dtype) == "float32" for x in (left, right, call)):
        return default_legalization(bb, call)
    shapes = shape_of(left), shape_of(right)
    if 0 in (*shapes[0], *shapes[1]):
        return default_legalization(bb, call)
    batched = len(shapes[0]) == len(shapes[1]) > 2 and shapes[0][:-2] == shapes[1][:-2]
    if batched and (shapes[1][-1] > 1 or shapes[1][-2] == 1):
        return legalize_matmul(machine, bb, call)
    left_shape = (1, *shapes[0]) if len(shapes[0]) == 1 else shapes[0]
    right_shape = (*shapes[1], 1) if len(shapes[1]) == 1 else shapes[1]
    if math.prod(right_shape[:-2]) == 1:
        right_shape = right_shape[-2:]
        if is_constant(right):
            weight = relax.const(right.value.numpy().reshape(right_shape), "float32")
            product = relax.op.matmul(_shaped(bb, left, left_shape), weight)
            product = legalize_matmul(machine, bb, bb.normalize(product), scaled=right in scaled)
            return _result(bb, product, call)
        rows = math.prod(left_shape[:-1])
        left = _shaped(bb, left, (rows, left_shape[-1]))
        if right_shape[1] == 1 < right_shape[0]:
            return _result(bb, _sum_rows(machine, bb, left, right), call)
        left_shape, right_shape = (1, *shape_of(left)), (1, *right_shape)
    left, right = _shaped(bb, left, left_shape), _shaped(bb, right, right_shape)
    if len(left_shape) == len(right_shape) and left_shape[:-2] == right_shape[:-2]:
        product = bb.normalize(relax.op.matmul(left, right))
        return _result(bb, legalize_matmul(machine, bb, product), call)
    rows, depth = left_shape[-2:]
    channels = right_shape[-1]
    tile = choose_tile(machine, height=1, width=rows, channels=channels, depth=depth, taps=1)
    product = bb.call_te(
        partial(broadcast_matmul, tile_rows=tile.columns, lanes=min(machine.lanes, channels)),
        left,
        right,
        primfunc_name_hint="batch_matmul",
        primfunc_attrs=ANCHOR,
    )
    return _result(bb, product, call)


def _sum_rows(
    machine: Machine, bb: relax.BlockBuilder, left: relax.Expr, right: relax.Expr
) -> relax.Expr:
    """Return the product of a matrix and one column."""
    return bb.call_te(
        partial(matrix_vector, lanes=machine.lanes),
        left,
        _shaped(bb, right, (shape_of(left)[1],)),
        primfunc_name_hint="matrix_vector",
        primfunc_attrs=ANCHOR,
    )


def _shaped(bb: relax.BlockBuilder, value: relax.Expr, shape: Sequence[int]) -> relax.Expr:
    """Return an operand in a shape."""
    if shape_of(value) == tuple(shape):
        return value
    return bb.emit(relax.op.reshape(value, tuple(shape)))


def _result(bb: relax.BlockBuilder, value: relax.Expr, call: relax.Call) -> relax.Expr:
    """Return a product in the shape of the call that it stands for."""
    value = bb.normalize(value)
    if shape_of(value) == shape_of(call):
        return value
    return relax.op.reshape(bb.emit(value), shape_of(call))
