"""Lowers softmax and normalizations so that each row is read once and stays in the cache.

Rewrites ``relax.nn.softmax``, ``log_softmax``, ``layer_norm``, ``rms_norm``, ``group_norm`` and
``instance_norm`` in float32; what is normalized along must be the last axes, except for softmax.
Variances are means of squared distances from the mean, not differences of large squares. Runs
before fusion. Numerics: sums may be taken in another order; for exp see `elementary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from tvm import relax, te, tirx

from hone.targets.schedule.machine import Machine

from .anchors import ANCHOR, default_legalization
from .elementary import exp_below_0
from .reductions import MAX, SUM, Indices, reduce_rows, split_index


def _row_softmax(x: te.Tensor, *, logarithm: bool, lanes: int) -> te.Tensor:
    *outer, extent = (int(size) for size in x.shape)
    outer = outer or [1]
    rank = len(x.shape)

    def at(i: Indices, k: tirx.Expr) -> Indices:
        return (*i, k)[-rank:]

    largest = reduce_rows(lambda i, _, k: x[at(i, k)], outer, extent, MAX, lanes=lanes)
    if logarithm:
        total = reduce_rows(
            lambda i, _, k: exp_below_0(x[at(i, k)] - largest[i]), outer, extent, SUM, lanes=lanes
        )
        shift = te.compute(outer, lambda *i: largest[i] + tirx.log(total[i]), name="row_shift")
        return te.compute(x.shape, lambda *i: x[i] - shift[i[:-1] or (0,)], name="row_out")
    powers = te.compute(
        (*outer, extent), lambda *i: exp_below_0(x[i[-rank:]] - largest[i[:-1]]), name="row_exp"
    )
    total = reduce_rows(lambda i, _, k: powers[(*i, k)], outer, extent, SUM, lanes=lanes)
    share = te.compute(outer, lambda *i: tirx.const(1.0, "float32") / total[i], name="row_share")
    return te.compute(
        x.shape,
        lambda *i: powers[(*(i[:-1] or (0,)), i[-1])] * share[i[:-1] or (0,)],
        name="row_out",
    )


def _column_softmax(x: te.Tensor, *, axis: int, logarithm: bool) -> te.Tensor:
    outer = [size for position, size in enumerate(x.shape) if position != axis]

    def put(i: Indices, k: tirx.Expr) -> Indices:
        return (*i[:axis], k, *i[axis:])

    def without(i: Indices) -> Indices:
        return (*i[:axis], *i[axis + 1 :])

    k_max = te.reduce_axis((0, x.shape[axis]), "k")
    largest = te.compute(outer, lambda *i: te.max(x[put(i, k_max)], axis=k_max), name="col_max")
    powers = te.compute(x.shape, lambda *i: exp_below_0(x[i] - largest[without(i)]), name="col_exp")
    k_sum = te.reduce_axis((0, x.shape[axis]), "k")
    total = te.compute(outer, lambda *i: te.sum(powers[put(i, k_sum)], axis=k_sum), name="col_sum")
    if logarithm:
        shift = te.compute(outer, lambda *i: largest[i] + tirx.log(total[i]), name="col_shift")
        return te.compute(x.shape, lambda *i: x[i] - shift[without(i)], name="col_out")
    share = te.compute(outer, lambda *i: tirx.const(1.0, "float32") / total[i], name="col_share")
    return te.compute(x.shape, lambda *i: powers[i] * share[without(i)], name="col_out")


def legalize_softmax(
    logarithm: bool, machine: Machine, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    """Legalize ``relax.nn.softmax`` or ``log_softmax``: ``e ** (x - max) / sum`` or its log."""
    rank = len(call.ty.shape)
    if str(call.ty.dtype) != "float32" or rank == 0:
        return default_legalization(bb, call)
    axis = int(call.attrs.axis) % rank
    # Behind an axis that is reduced, unit axes change nothing.
    make: Callable[..., te.Tensor]
    if axis == rank - 1:
        make = partial(_row_softmax, logarithm=logarithm, lanes=machine.lanes)
    else:
        make = partial(_column_softmax, axis=axis, logarithm=logarithm)
    return bb.call_te(
        make,
        call.args[0],
        primfunc_name_hint="log_softmax" if logarithm else "softmax",
        primfunc_attrs=ANCHOR,
    )


def _normalize(
    x: te.Tensor,
    *weights: te.Tensor,
    outer: Sequence[int],
    row: Sequence[int],
    at: Callable[[Indices, Indices], Indices],
    back: Callable[[Indices], Indices],
    weight_at: Callable[[Indices], Indices],
    centre: bool,
    epsilon: float,
    lanes: int,
) -> te.Tensor:
    """Return ``(x - mean) / sqrt(variance + epsilon) * gamma + beta`` along rows.

    Parameters
    ----------
    x : Tensor
        Data.
    weights : Tensor
        ``gamma`` and, where there is one, ``beta``.
    outer, row : sequence of int
        Extents of what has its own statistics, and of what these are taken over.
    at : callable
        ``(outer indices, row indices) → indices of x``.
    back : callable
        ``indices of x → outer indices``.
    weight_at : callable
        ``indices of x → indices of gamma``.
    centre : bool
        Subtract the mean (layer norm) or not (RMS norm).
    epsilon : float
        Added to the variance.
    lanes : int
        Of one vector.
    """
    extent = math.prod(row)
    share = tirx.const(1 / extent, "float32")

    def read(i: Indices, k: tirx.Expr) -> tirx.Expr:
        return x[at(i, split_index(k, row))]

    mean = None
    if centre:
        sums = reduce_rows(lambda i, _, k: read(i, k), outer, extent, SUM, lanes=lanes)
        mean = te.compute(outer, lambda *i: sums[i] * share, name="row_mean")

    def apart(value: tirx.Expr, i: Indices) -> tirx.Expr:
        return value if mean is None else value - mean[i]

    def square(i: Indices, k: tirx.Expr) -> tirx.Expr:
        distance = apart(read(i, k), i)
        return distance * distance

    squares = reduce_rows(lambda i, _, k: square(i, k), outer, extent, SUM, lanes=lanes)
    scale = te.compute(
        outer,
        lambda *i: (
            tirx.const(1.0, "float32")
            / tirx.sqrt(squares[i] * share + tirx.const(epsilon, "float32"))
        ),
        name="row_scale",
    )

    def element(*i: tirx.Var) -> tirx.Expr:
        result = apart(x[i], back(i)) * scale[back(i)] * weights[0][weight_at(i)]
        return result + weights[1][weight_at(i)] if len(weights) > 1 else result

    return te.compute(x.shape, element, name="row_out")


def _is_float32(call: relax.Call) -> bool:
    return all(str(argument.ty.dtype) == "float32" for argument in call.args) and all(
        int(extent) > 0 for extent in call.ty.shape
    )


def legalize_layer_norm(
    centre: bool, machine: Machine, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    """Legalize ``relax.nn.layer_norm`` or ``rms_norm`` along the last axes."""
    shape = [int(extent) for extent in call.ty.shape]
    axes = sorted(int(axis) % len(shape) for axis in call.attrs.axes)
    if not _is_float32(call) or axes != list(range(len(shape) - len(axes), len(shape))):
        return default_legalization(bb, call)
    lead = len(shape) - len(axes)
    return bb.call_te(
        partial(
            _normalize,
            outer=shape[:lead] or [1],
            row=shape[lead:],
            at=lambda i, k: (*i[:lead], *k),
            back=lambda i: tuple(i[:lead]) or (tirx.const(0, "int32"),),
            weight_at=lambda i: tuple(i[lead:]),
            centre=centre,
            epsilon=float(call.attrs.epsilon),
            lanes=machine.lanes,
        ),
        *call.args,
        primfunc_name_hint="layer_norm" if centre else "rms_norm",
        primfunc_attrs=ANCHOR,
    )


def legalize_group_norm(machine: Machine, bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize ``relax.nn.group_norm`` or ``instance_norm`` over ``[N, C, ...]``."""
    attrs = call.attrs
    shape = [int(extent) for extent in call.ty.shape]
    rank = len(shape)
    axes = sorted(int(axis) % rank for axis in attrs.axes)
    fits = int(attrs.channel_axis) % rank == 1 and axes == list(range(2, rank))
    if not _is_float32(call) or not fits:
        return default_legalization(bb, call)
    is_group = call.op.name == "relax.nn.group_norm"
    groups = int(attrs.num_groups) if is_group else shape[1]
    depth = shape[1] // groups
    return bb.call_te(
        partial(
            _normalize,
            outer=[shape[0], groups],
            row=[depth, *shape[2:]],
            at=lambda i, k: (i[0], i[1] * depth + k[0], *k[1:]),
            back=lambda i: (i[0], tirx.indexdiv(i[1], depth)),
            weight_at=lambda i: (i[1],),
            centre=True,
            epsilon=float(attrs.epsilon),
            lanes=machine.lanes,
        ),
        *call.args,
        primfunc_name_hint="group_norm" if is_group else "instance_norm",
        primfunc_attrs=ANCHOR,
    )
