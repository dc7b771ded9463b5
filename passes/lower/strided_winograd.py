"""Lowers 3x3 convolutions of stride 2 by their two phases, one of them by minimal filtering.

Of a row the outer taps read the even samples, as a convolution of two taps and stride 1, the middle
one the odd samples. Two outputs of the even phase take three products (Winograd's F(2, 2)), of the
odd phase two::

    y0 = (d0 - d2) w0 + d1 w1 + d2 (w0 + w2)
    y1 = (d4 - d2) w2 + d3 w1 + d2 (w0 + w2)

so that each output has a sum of two products of its own (`FIRST`, `SECOND`) and both share one
(`SHARED`). In two dimensions nine sums of 25 products make four outputs that take 36 direct.
Weights are packed as they are and added where they are read, so that they do not grow. A last row
or column without a partner leaves out what only its partner needs.

Numerics: differences of two inputs and sums of two weights in each dimension, nothing is scaled.
Where an input is infinite the outputs of its tile may be NaN (``inf - inf``), where a direct sum
has infinities or does not read it; differences of inputs and sums of weights overflow from a
quarter of the largest number on. Layers of 16-bit weights, or of weights that are not all finite,
stay direct.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from tvm import relax, te, tirx

from hone.targets.schedule.machine import Machine
from hone.targets.schedule.strided_winograd_model import (
    POINTS,
    SPAN,
    TILE,
    choose_strided_winograd,
    packed_vectors,
)

from .anchors import ANCHOR
from .half import widen
from .window import Window
from .winograd_transforms import select_row


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the sums that make two neighbouring outputs of a row.

    Parameters
    ----------
    name : str
        Part of the names of its blocks.
    point : int
        The first transformed sample that it reads.
    weight : int
        The first tap; of the shared sum the taps are ``w0 + w2``.
    taps : int
        How many of both.
    """

    name: str
    point: int
    weight: int
    taps: int


FIRST = Part(name="first", point=0, weight=0, taps=2)
SECOND = Part(name="second", point=2, weight=1, taps=2)
SHARED = Part(name="shared", point=4, weight=0, taps=1)
PARTS = (FIRST, SECOND, SHARED)


def applies(machine: Machine, window: Window, *, channels: int) -> bool:
    """Say whether a convolution without groups goes by its two phases.

    Parameters
    ----------
    machine : Machine
        Decides.
    window : Window
        Geometry.
    channels : int
        Output channels.
    """
    if window.taps != (3, 3) or window.strides != (2, 2) or window.dilation != (1, 1):
        return False
    batch, _, _, depth = window.shape
    height, width = window.output
    return choose_strided_winograd(
        machine, batch=batch, height=height, width=width, channels=channels, depth=depth
    )


def pack_width(machine: Machine, channels: int) -> int:
    """Return the output channels of a tile of packed weights."""
    return packed_vectors(machine, channels) * machine.lanes


def _transformed(row: tirx.Expr, samples: list[tirx.Expr]) -> tirx.Expr:
    """Return one of the five points of five samples, in the order of `PARTS`."""
    first, odd, middle, other, last = samples
    return select_row(row, [first - middle, odd, other, last - middle, middle])


def strided_winograd_conv2d(
    data: te.Tensor, weight: te.Tensor, window: Window, *, channels: int
) -> te.Tensor:
    """Return the 3x3 convolution of stride 2 of NHWC data.

    Parameters
    ----------
    data : Tensor
        ``[N, H, W, C]``; 16-bit floats are widened.
    weight : Tensor
        ``[K / tk, 3, 3, C, tk]`` in float32.
    window : Window
        Geometry: 3x3, stride 2, no dilation, at least two rows and columns of results.
    channels : int
        K.
    """
    batch, height, width, depth = window.shape
    out_height, out_width = window.output
    top, left = window.padding[:2]
    down, across = -(-out_height // TILE), -(-out_width // TILE)

    def sample(
        n: tirx.Var, a: tirx.Var, b: tirx.Var, i: int, j: tirx.Var, c: tirx.Var
    ) -> tirx.Expr:
        h, w = a * (2 * TILE) + i - top, b * (2 * TILE) + j - left
        inside = tirx.all(h >= 0, h < height, w >= 0, w < width)
        return tirx.if_then_else(inside, widen(data[n, h, w, c]), tirx.const(0, "float32"))

    rows = te.compute(
        (POINTS, batch, down, across, SPAN, depth),
        lambda x, n, a, b, j, c: _transformed(x, [sample(n, a, b, i, j, c) for i in range(SPAN)]),
        name="swino_rows",
    )

    def point(
        x: tirx.Var, y: tirx.Var, n: tirx.Var, a: tirx.Var, b: tirx.Var, c: tirx.Var
    ) -> tirx.Expr:
        return _transformed(y, [rows[x, n, a, b, j, c] for j in range(SPAN)])

    points = te.compute((POINTS, POINTS, batch, down, across, depth), point, name="swino_in")

    def total(vertical: Part, horizontal: Part) -> te.Tensor:
        t = te.reduce_axis((0, vertical.taps), "t")
        u = te.reduce_axis((0, horizontal.taps), "u")
        c = te.reduce_axis((0, int(weight.shape[3])), "c")

        def product(n: tirx.Var, a: tirx.Var, b: tirx.Var, k: tirx.Var) -> tirx.Expr:
            x, y = vertical.point + t, horizontal.point + u
            factor = _factor(weight, vertical, horizontal, t, u, c, k)
            return te.sum(points[x, y, n, a, b, c] * factor, axis=[t, u, c])

        shape = (
            batch,
            out_height // TILE if vertical is SECOND else down,
            out_width // TILE if horizontal is SECOND else across,
            channels,
        )
        return te.compute(shape, product, name=f"swino_acc_{vertical.name}_{horizontal.name}")

    sums = {(v.name, h.name): total(v, h) for v in PARTS for h in PARTS}

    def pixel(n: tirx.Var, h: tirx.Var, w: tirx.Var, k: tirx.Var) -> tirx.Expr:
        a, b = tirx.indexdiv(h, TILE), tirx.indexdiv(w, TILE)

        def output(vertical: Part, horizontal: Part) -> tirx.Expr:
            own, beside = (vertical.name, SHARED.name), (horizontal.name, SHARED.name)
            first, *others = [sums[v, u][n, a, b, k] for v in own for u in beside]
            return sum(others, first)

        def in_row(vertical: Part) -> tirx.Expr:
            is_first = tirx.indexmod(w, TILE) == 0
            return tirx.if_then_else(is_first, output(vertical, FIRST), output(vertical, SECOND))

        return tirx.if_then_else(tirx.indexmod(h, TILE) == 0, in_row(FIRST), in_row(SECOND))

    return te.compute((batch, out_height, out_width, channels), pixel, name="swino_out")


def _factor(
    weight: te.Tensor,
    vertical: Part,
    horizontal: Part,
    t: tirx.IterVar,
    u: tirx.IterVar,
    c: tirx.IterVar,
    k: tirx.Var,
) -> tirx.Expr:
    """Return a weight of a sum: a tap, or the sum of the outer ones in each shared dimension."""
    pack = int(weight.shape[-1])

    def in_row(r: tirx.Expr | int) -> tirx.Expr:
        def tap(s: tirx.Expr | int) -> tirx.Expr:
            return weight[k // pack, r, s, c, k % pack]

        return tap(0) + tap(2) if horizontal is SHARED else tap(horizontal.weight + u)

    return in_row(0) + in_row(2) if vertical is SHARED else in_row(vertical.weight + t)


def lower_conv2d(
    bb: relax.BlockBuilder,
    data: relax.Expr,
    packed: np.ndarray,
    window: Window,
    *,
    channels: int,
) -> relax.Expr:
    """Return the call of a convolution by its two phases, see `strided_winograd_conv2d`."""
    return bb.call_te(
        partial(strided_winograd_conv2d, window=window, channels=channels),
        data,
        relax.const(packed),
        primfunc_name_hint="strided_winograd_conv2d",
        primfunc_attrs=ANCHOR,
    )
