"""Lowers 3x3 convolutions of stride 1 to Winograd's minimal filtering.

An output tile of ``m x m`` pixels takes ``(m + 2)^2`` products instead of ``9 m^2``: for each
position of the transformed tile, one matrix product of all tiles by the transformed weights,
``Y = A^T [(G g G^T) * (B^T d B)] A`` (Lavin and Gray 2016, equation 12). Weights are transformed
here, in float64. Numerics: the transforms amplify rounding: of 128 random channels F(4x4) is off by
1.4e-6 of the largest output, a direct sum by 0.8e-6. Where an input is infinite the outputs of its
tile may be NaN (``inf - inf``); callers leave weights that are not all finite to the direct form.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import te, tirx

from hone.targets.schedule.machine import Machine
from hone.targets.schedule.winograd_model import DIRECT, Form, choose_winograd, winograd_cycles

from .half import PAIR, Pairs, widen
from .window import Window
from .winograd_transforms import (
    F2,
    F4,
    F4_ROUNDED,
    Transform,
    transform_data,
    transform_output,
    transform_row,
)


def choose_transform(
    machine: Machine,
    window: Window,
    *,
    channels: int,
    dtype: str = "float32",
    large_tiles: bool = False,
) -> Transform | None:
    """Return the transform of a convolution that is modelled faster than the direct way, if any.

    Where the products are of bfloat16, F(2x2) only, which adds little to the error of rounding, or
    F(4x4) as well with ``large_tiles`` (docs/performance.md). Products of float32, into which a
    processor without that instruction widens 16-bit weights, take either.
    """
    form = choose_form(machine, window, channels=channels, dtype=dtype, large_tiles=large_tiles)
    return transform_of(form, dtype)


def choose_form(
    machine: Machine,
    window: Window,
    *,
    channels: int,
    dtype: str = "float32",
    large_tiles: bool = False,
    rows: bool = False,
) -> Form:
    """Return the form that is modelled fastest; ``rows`` as in `winograd_cycles`."""
    layer = _layer(machine, window, channels=channels, dtype=dtype, large_tiles=large_tiles)
    return DIRECT if layer is None else choose_winograd(machine, rows=rows, **layer)


def transform_of(form: Form, dtype: str) -> Transform | None:
    """Return the transform of a form, None for the direct one."""
    large = F4 if dtype == "float32" else F4_ROUNDED
    return {2: F2, 4: large}.get(form.tile)


def winograd_cycles_of(
    machine: Machine, window: Window, *, channels: int, dtype: str, large_tiles: bool = False
) -> float:
    """Return the modelled cycles, of all threads, of the best transform; infinite without one."""
    layer = _layer(machine, window, channels=channels, dtype=dtype, large_tiles=large_tiles)
    if layer is None:
        return math.inf
    costs = winograd_cycles(machine, **layer)
    return min(cycles for form, cycles in costs.items() if form.tile)


def _layer(
    machine: Machine, window: Window, *, channels: int, dtype: str, large_tiles: bool
) -> dict[str, Any] | None:
    """Return a convolution as the model takes it, None where no transform applies."""
    plain = window.taps == (3, 3) and window.strides == window.dilation == (1, 1)
    batch, _, _, depth = window.shape
    group = 1 if Pairs.of(machine, dtype) is None else PAIR
    if not plain or depth % group:
        return None
    height, width = window.output
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "channels": channels,
        "depth": depth,
        "group": group,
        "tiles": (F2.tile,) if group == PAIR and not large_tiles else (F2.tile, F4.tile),
    }


def winograd_conv2d(
    data: te.Tensor,
    weight: te.Tensor,
    window: Window,
    *,
    transform: Transform,
    channels: int,
    tile_rows: int,
    pairs: Pairs | None = None,
    rows: bool = False,
) -> te.Tensor:
    """Return the 3x3 convolution of NHWC data with transformed weights.

    Parameters
    ----------
    data : Tensor
        ``[N, H, W, C]``; 16-bit floats are widened.
    weight : Tensor
        ``[m + 2, m + 2, ceil(K / tk), C, tk]``; with pairs int32
        ``[m + 2, m + 2, ceil(K / tk), C / 2, tk]``, with rows ``[ceil(K / tk), m + 2, 3, C, tk]``.
    window : Window
        Geometry: 3x3, stride 1, no dilation.
    transform : Transform
        ``F(m x m, 3 x 3)``.
    channels : int
        K.
    tile_rows : int
        Tiles of one register tile; the number of tiles is rounded up to it.
    pairs : Pairs, optional
        Rounds the transformed data and sums pairs of channels; the transforms stay in float32.
    rows : bool
        The float32 weights are transformed along their rows only; each step of a sum transforms the
        vector of weights that it needs along the other axis, in registers.
    """
    batch, height, width, depth = window.shape
    out_height, out_width = window.output
    top, left = window.padding[:2]
    m, side = transform.tile, transform.side
    down, across = -(-out_height // m), -(-out_width // m)
    tiles = batch * down * across
    rounded = -(-tiles // tile_rows) * tile_rows
    pack = int(weight.shape[4])
    blocks = int(weight.shape[0 if rows else 2])

    def pixel(p: tirx.Expr, i: int, j: tirx.Expr, c: tirx.Expr) -> tirx.Expr:
        tile = p if rounded == tiles else tirx.min(p, tiles - 1)
        n, at = tirx.indexdiv(tile, down * across), tirx.indexmod(tile, down * across)
        h = tirx.indexdiv(at, across) * m + i - top
        w = tirx.indexmod(at, across) * m + j - left
        inside = tirx.all(h >= 0, h < height, w >= 0, w < width)
        return tirx.if_then_else(inside, widen(data[n, h, w, c]), tirx.const(0, "float32"))

    across_rows = te.compute(
        (rounded, side, side, depth),
        lambda p, x, j, c: transform_data(transform, x, lambda i: pixel(p, i, j, c)),
        name="wino_rows",
    )

    def point(x: tirx.Var, y: tirx.Var, p: tirx.Var, c: tirx.Var) -> tirx.Expr:
        value = transform_data(transform, y, lambda j: across_rows[p, x, j, c])
        return value if pairs is None else pairs.bits(value)

    points = te.compute((side, side, rounded, depth), point, name="wino_in")
    c = te.reduce_axis((0, int(weight.shape[3])), "c")

    def factor_of(x: tirx.Var, y: tirx.Var, k: tirx.Var) -> tirx.Expr:
        return transform_row(transform, y, lambda s: weight[k // pack, x, s, c, k % pack])

    def product(x: tirx.Var, y: tirx.Var, p: tirx.Var, k: tirx.Var) -> tirx.Expr:
        if rows:
            return te.sum(points[x, y, p, c] * factor_of(x, y, k), axis=c)
        factor = weight[x, y, k // pack, c, k % pack]
        if pairs is None:
            return te.sum(points[x, y, p, c] * widen(factor), axis=c)
        return pairs.sum(lambda half: points[x, y, p, PAIR * c + half], factor, axis=[c])

    sums = te.compute(
        (side, side, rounded, blocks * pack),
        product,
        name="wino_row_acc" if rows else "wino_acc",
    )
    columns = te.compute(
        (batch, down, across, m, side, channels),
        lambda n, a, b, i, y, k: transform_output(
            transform,
            i,
            lambda x: sums[x, y, (n * down + a) * across + b, k],
        ),
        name="wino_cols",
    )
    return te.compute(
        (batch, out_height, out_width, channels),
        lambda n, h, w, k: transform_output(
            transform,
            tirx.indexmod(w, m),
            lambda y: columns[
                n, tirx.indexdiv(h, m), tirx.indexdiv(w, m), tirx.indexmod(h, m), y, k
            ],
            scaled=not rows,
        ),
        name="wino_out",
    )
