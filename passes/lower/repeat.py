"""Lowers tiling to a choice between its repetitions, which is scheduled as one copy for each.

Rewrites ``relax.tile`` of at most `MOST_BOXES` repetitions (see ``targets/schedule/copies``). TVM
takes a remainder for each element. Runs before fusion. Numerics: exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from tvm import relax, te, tirx

from hone.targets.schedule.boxes import MOST_BOXES

from .anchors import default_legalization


def _repeated(x: te.Tensor, *, repeats: Sequence[int]) -> te.Tensor:
    """Return ``x`` so many times along each axis."""
    extents = [int(extent) for extent in x.shape]

    def chosen(known: tuple[tirx.Expr, ...], rest: tuple[tirx.Expr, ...]) -> tirx.Expr:
        if not rest:
            return x[known]
        axis = len(known)
        index, extent = rest[0], extents[axis]
        value = chosen((*known, index - (repeats[axis] - 1) * extent), rest[1:])
        for time in reversed(range(repeats[axis] - 1)):
            here = chosen((*known, index - time * extent), rest[1:])
            value = tirx.if_then_else(index < (time + 1) * extent, here, value)
        return value

    shape = tuple(times * extent for times, extent in zip(repeats, extents, strict=True))
    return te.compute(shape, lambda *i: chosen((), i), name="repeat")


def legalize_tile(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize a tiling. See the module."""
    data = call.args[0]
    repeats = [int(times) for times in call.attrs.repeats]
    if len(repeats) != len(data.ty.shape) or not 1 < math.prod(repeats) <= MOST_BOXES:
        return default_legalization(bb, call)
    return bb.call_te(partial(_repeated, repeats=repeats), data, primfunc_name_hint="tile")
