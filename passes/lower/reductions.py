"""Lowers sums, means, products, extrema and variances to vector partial sums, whatever the extent.

Rewrites ``relax.sum``, ``mean``, ``prod``, ``max``, ``min``, ``variance`` and ``std`` in float32.
Where the contiguous axis is reduced, a vector of partial results runs along it, and the elements
that fill no vector are combined at the end (blocks ``row_...``); elsewhere whole vectors of the
contiguous axis are reduced side by side (blocks ``col_...``). Runs before fusion. Numerics: sums
and products may be taken in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tvm import relax, te, tirx

from hone.targets.schedule.machine import Machine

from .anchors import ANCHOR, default_legalization

# Partial vectors in flight: a sum has a latency of four cycles on the cores in the tables.
MAX_CHAINS = 4

# ``(outer indices, indices of further reduced axes, index along the row) → element``.
Element = Callable[[tuple[tirx.Expr, ...], tuple[tirx.Expr, ...], tirx.Expr], tirx.Expr]
Indices = tuple[tirx.Expr, ...]


@dataclass(frozen=True, kw_only=True)
class Reducer:
    """An associative operation, over an axis and of two values.

    Parameters
    ----------
    along : callable
        ``(expression, axis=...) → reduction`` of TE.
    both : callable
        ``(a, b) → expression``.
    """

    along: Callable[..., tirx.Expr]
    both: Callable[[tirx.Expr, tirx.Expr], tirx.Expr]


SUM = Reducer(along=te.sum, both=lambda a, b: a + b)
MAX = Reducer(along=te.max, both=tirx.max)
MIN = Reducer(along=te.min, both=tirx.min)
PRODUCT = Reducer(
    along=te.comm_reducer(lambda a, b: a * b, lambda dtype: tirx.const(1, dtype), name="product"),
    both=lambda a, b: a * b,
)


def _tree(values: list[tirx.Expr], both: Callable[[tirx.Expr, tirx.Expr], tirx.Expr]) -> tirx.Expr:
    """Combine values in a balanced tree of halves."""
    while len(values) > 1:
        half = (len(values) + 1) // 2
        values = [
            both(values[i], values[i + half]) if i + half < len(values) else values[i]
            for i in range(half)
        ]
    return values[0]


def reduce_rows(
    element: Element,
    outer: Sequence[int],
    extent: int,
    reducer: Reducer,
    *,
    lanes: int,
    extra: Sequence[int] = (),
    together: int = 0,
) -> te.Tensor:
    """Reduce along the contiguous axis, for each index of the outer axes.

    Parameters
    ----------
    element : callable
        What is reduced.
    outer : sequence of int
        Extents that are kept; not empty.
    extent : int
        Of the contiguous axis.
    reducer : Reducer
        How two elements are combined.
    lanes : int
        Of one vector.
    extra : sequence of int
        Extents of further axes that are reduced.
    together : int
        No step takes parts of two groups of so many vectors; 0 where the row has no groups.

    Returns
    -------
    Tensor
        ``[*outer]``; its block and those of its parts are named ``row_...``.
    """
    while lanes > 1 and extent < 2 * lanes:
        lanes //= 2
    vectors = extent // lanes
    whole = math.gcd(vectors, together)
    chains = max(c for c in range(1, MAX_CHAINS + 1) if whole % c == 0)
    width = lanes * chains
    k = te.reduce_axis((0, vectors // chains), "k")
    more = [te.reduce_axis((0, size), f"e{i}") for i, size in enumerate(extra)]
    parts = te.compute(
        (*outer, width),
        lambda *i: reducer.along(element(i[:-1], tuple(more), k * width + i[-1]), axis=[*more, k]),
        name="row_partial",
    )
    if chains > 1:
        chained = parts
        parts = te.compute(
            (*outer, lanes),
            lambda *i: _tree(
                [chained[(*i[:-1], c * lanes + i[-1])] for c in range(chains)], reducer.both
            ),
            name="row_fold",
        )
    first = vectors * lanes
    if extra and first < extent:
        again = [te.reduce_axis((0, size), f"t{i}") for i, size in enumerate(extra)]
        rest = te.compute(
            (*outer, extent - first),
            lambda *i: reducer.along(element(i[:-1], tuple(again), first + i[-1]), axis=again),
            name="row_rest",
        )

    def tail(i: Indices, position: int) -> tirx.Expr:
        if extra:
            return rest[(*i, position)]
        return element(i, (), tirx.const(first + position, "int32"))

    def total(*i: tirx.Expr) -> tirx.Expr:
        values = [parts[(*i, lane)] for lane in range(lanes)]
        values += [tail(i, position) for position in range(extent - first)]
        return _tree(values, reducer.both)

    return te.compute(tuple(outer), total, name="row_total")


def split_index(index: tirx.Expr, shape: Sequence[int]) -> Indices:
    """Return the indices of a flat index in a row-major shape."""
    indices: list[tirx.Expr] = []
    for extent in reversed(shape[1:]):
        indices.append(tirx.indexmod(index, extent))
        index = tirx.indexdiv(index, extent)
    return (index, *reversed(indices)) if shape else ()


def trailing(axes: Sequence[int], rank: int) -> int:
    """Return how many of the last axes are reduced."""
    count = 0
    while count < rank and rank - 1 - count in axes:
        count += 1
    return count


def reduce_axes(
    read: Callable[[Indices, Indices], tirx.Expr],
    shape: Sequence[int],
    axes: Sequence[int],
    reducer: Reducer,
    *,
    lanes: int,
) -> te.Tensor:
    """Return a tensor reduced along axes, of the kept extents; ``[1]`` where none is kept.

    Parameters
    ----------
    read : callable
        ``(all indices, kept indices) → element``.
    shape : sequence of int
        Of the tensor.
    axes : sequence of int
        What is reduced.
    reducer : Reducer
        How.
    lanes : int
        Of one vector.
    """
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    outer = [shape[axis] for axis in kept] or [1]
    row = len(shape) - trailing(axes, len(shape))
    further = [axis for axis in axes if axis < row]

    def at(i: Indices, reduced: Indices, last: Indices) -> tirx.Expr:
        where = dict(zip(kept, i, strict=False)) | dict(zip(further, reduced, strict=True))
        return read((*(where[axis] for axis in range(row)), *last), i)

    if row == len(shape):
        ks = [te.reduce_axis((0, shape[axis]), f"k{axis}") for axis in further]
        return te.compute(
            tuple(outer),
            lambda *i: reducer.along(at(i, tuple(ks), ()), axis=ks),
            name="col_acc",
        )
    return reduce_rows(
        lambda i, reduced, k: at(i, reduced, split_index(k, shape[row:])),
        outer,
        math.prod(shape[row:]),
        reducer,
        lanes=lanes,
        extra=[shape[axis] for axis in further],
    )


def in_shape(value: te.Tensor, shape: Sequence[int], prefix: str) -> te.Tensor:
    """Return a tensor of the same elements in a shape with other unit axes."""
    if [int(extent) for extent in value.shape] == list(shape):
        return value
    kept = [axis for axis, extent in enumerate(value.shape) if int(extent) != 1]
    places = [axis for axis, extent in enumerate(shape) if extent != 1]

    def element(*i: tirx.Var) -> tirx.Expr:
        index: list[tirx.Expr] = [tirx.const(0, "int32")] * len(value.shape)
        for axis, place in zip(kept, places, strict=True):
            index[axis] = i[place]
        return value[tuple(index)]

    return te.compute(tuple(shape), element, name=f"{prefix}_shape")


def _statistic(
    x: te.Tensor, *, axes: Sequence[int], kind: str, shape: Sequence[int], lanes: int
) -> te.Tensor:
    """Return a statistic of ``x`` along axes in the shape that the operator gives it."""
    extents = [int(extent) for extent in x.shape]
    prefix = "row" if trailing(axes, len(extents)) else "col"
    reducer = {"max": MAX, "min": MIN, "prod": PRODUCT}.get(kind, SUM)
    share = tirx.const(1 / math.prod(extents[axis] for axis in axes), "float32")
    value = reduce_axes(lambda i, _: x[i], extents, axes, reducer, lanes=lanes)

    def averaged(total: te.Tensor, name: str) -> te.Tensor:
        return te.compute(total.shape, lambda *i: total[i] * share, name=f"{prefix}_{name}")

    if kind in ("mean", "variance", "std"):
        value = averaged(value, "mean")
    if kind in ("variance", "std"):
        mean = value

        def square(i: Indices, kept: Indices) -> tirx.Expr:
            distance = x[i] - mean[kept]
            return distance * distance

        value = averaged(reduce_axes(square, extents, axes, SUM, lanes=lanes), "variance")
    if kind == "std":
        variance = value
        value = te.compute(
            variance.shape, lambda *i: tirx.sqrt(variance[i]), name=f"{prefix}_deviation"
        )
    return in_shape(value, shape, prefix)


def legalize_statistic(
    kind: str, machine: Machine, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    """Legalize one reduction for the machine. See the module."""
    data = call.args[0]
    shape = [int(extent) for extent in data.ty.shape]
    axes = call.attrs.axis
    axes = sorted({int(a) % len(shape) for a in axes} if axes is not None else range(len(shape)))
    fits = str(data.ty.dtype) == str(call.ty.dtype) == "float32"
    if not fits or not axes or 0 in shape:
        return default_legalization(bb, call)
    result = [int(extent) for extent in call.ty.shape]
    kept = [extent for axis, extent in enumerate(shape) if axis not in axes]
    # Where a kept axis follows a reduced one, unit axes between them would hide that the result
    # begins with the kept axes.
    apart = 0 < trailing(axes, len(shape)) < len(axes)
    value = bb.call_te(
        partial(
            _statistic,
            axes=axes,
            kind=kind,
            shape=kept if apart else result,
            lanes=machine.lanes,
        ),
        data,
        primfunc_name_hint=kind,
        primfunc_attrs=ANCHOR,
    )
    if apart and kept != result:
        return relax.op.reshape(bb.emit(value), result)
    return value


STATISTICS = ("sum", "mean", "prod", "max", "min", "variance", "std")
"""Relax operators that `legalize_statistic` knows."""
