"""Lowers argmax and argmin to two reductions in vectors: the extremum, then its least index.

Rewrites ``relax.argmax`` and ``relax.argmin`` of float32 along one axis. TVM's reduction of pairs
keeps one running index and compares element by element. Runs before fusion; scheduled as other
rows and columns. Numerics: exact; the first of equal elements. As in onnxruntime, a NaN is passed
over, except that the index is 0 where the first element is one.
"""

from __future__ import annotations

import math
from functools import partial

from tvm import relax, te, tirx

from hone.targets.schedule.machine import Machine

from .anchors import ANCHOR, default_legalization
from .elementary import is_number
from .reductions import MIN, Reducer, in_shape, reduce_axes


def _greater(a: tirx.Expr, b: tirx.Expr) -> tirx.Expr:
    # A comparison with NaN is false, and the second of two values is taken then.
    return tirx.max(b, a)


def _less(a: tirx.Expr, b: tirx.Expr) -> tirx.Expr:
    return tirx.min(b, a)


def _infinity(dtype: str) -> tirx.Expr:
    return tirx.const(math.inf, dtype)


def _minus_infinity(dtype: str) -> tirx.Expr:
    return tirx.const(-math.inf, dtype)


GREATEST = Reducer(along=te.comm_reducer(_greater, _minus_infinity, name="greatest"), both=_greater)
LEAST = Reducer(along=te.comm_reducer(_less, _infinity, name="least"), both=_less)


def _index(
    x: te.Tensor, *, axis: int, reducer: Reducer, shape: tuple[int, ...], lanes: int
) -> te.Tensor:
    """Return the index of the extremum of ``x`` along an axis, int64 in the shape given."""
    extents = [int(extent) for extent in x.shape]
    kept = [position for position in range(len(extents)) if position != axis]
    best = reduce_axes(lambda i, _: x[i], extents, [axis], reducer, lanes=lanes)

    def candidate(i: tuple[tirx.Expr, ...], outer: tuple[tirx.Expr, ...]) -> tirx.Expr:
        index = tirx.Cast("int32", i[axis])
        return tirx.Select(x[i].equal(best[outer]), index, tirx.const(extents[axis], "int32"))

    least = reduce_axes(candidate, extents, [axis], MIN, lanes=lanes)

    def element(*outer: tirx.Var) -> tirx.Expr:
        at = dict(zip(kept, outer, strict=False)) | {axis: tirx.const(0, "int32")}
        first = x[tuple(at[position] for position in range(len(extents)))]
        found = tirx.Select(is_number(first), least[outer], tirx.const(0, "int32"))
        return found.astype("int64")

    prefix = "row" if axis == len(extents) - 1 else "col"
    result = te.compute(least.shape, element, name=f"{prefix}_index")
    return in_shape(result, shape, prefix)


def legalize_arg_extremum(
    reducer: Reducer, machine: Machine, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    """Legalize an argmax or argmin for the machine. See the module."""
    data = call.args[0]
    shape = [int(extent) for extent in data.ty.shape]
    types = (str(data.ty.dtype), str(call.ty.dtype))
    if call.attrs.axis is None or types != ("float32", "int64") or 0 in shape:
        return default_legalization(bb, call)
    make = partial(
        _index,
        axis=int(call.attrs.axis) % len(shape),
        reducer=reducer,
        shape=tuple(int(extent) for extent in call.ty.shape),
        lanes=machine.lanes,
    )
    hint = "argmax" if reducer is GREATEST else "argmin"
    return bb.call_te(make, data, primfunc_name_hint=hint, primfunc_attrs=ANCHOR)
