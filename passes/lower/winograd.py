"""Lowers 3x3 convolutions of stride 1 to Winograd's minimal filtering.

An output tile of ``m x m`` pixels takes ``(m + 2)^2`` products instead of ``9 m^2``: for each
position of the transformed tile, one matrix product of all tiles by the transformed weights,
``Y = A^T [(G g G^T) * (B^T d B)] A`` (Lavin and Gray 2016, equation 12). Weights are transformed
here, in float64. Numerics: the transforms amplify rounding, see `ERROR`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from hone.targets.half_dot import BFLOAT16
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.winograd_model import choose_winograd, winograd_cycles

from .half import PAIR, Pairs, widen
from .window import Window

Row = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Transform:
    """``F(m x m, 3 x 3)`` by interpolation at 0, at pairs of points ``+a, -a``, and at infinity.

    Parameters
    ----------
    pairs : tuple of float
        The positive point of each pair; one pair for m = 2, two for m = 4.
    """

    pairs: Row

    @property
    def tile(self) -> int:
        """Output pixels of a side, m."""
        return 2 * len(self.pairs)

    @property
    def side(self) -> int:
        """Points of a side of the transformed tile, ``m + 2``."""
        return self.tile + 2

    @property
    def finite(self) -> Row:
        """The points but for infinity."""
        return (0.0, *(point for a in self.pairs for point in (a, -a)))

    @property
    def data(self) -> tuple[Row, ...]:
        """``B^T [m + 2, m + 2]``: row i holds the coefficients of ``prod (x - a_j), j != i``."""
        finite = self.finite
        rows = [
            np.poly([other for j, other in enumerate(finite) if j != i])[::-1]
            for i in range(len(finite))
        ]
        return (
            *((*(float(c) for c in row), 0.0) for row in rows),
            tuple(float(c) for c in np.poly(finite)[::-1]),
        )

    @property
    def weight(self) -> np.ndarray:
        """``G [m + 2, 3]``: row i is ``a_i^k / prod (a_i - a_j)``, the last one ``0 0 1``."""
        finite = self.finite
        scale = [
            np.prod([point - other for j, other in enumerate(finite) if j != i])
            for i, point in enumerate(finite)
        ]
        rows = [[point**k / scale[i] for k in range(3)] for i, point in enumerate(finite)]
        return np.array([*rows, [0.0, 0.0, 1.0]])


F2 = Transform(pairs=(1.0,))
# With Lavin's points 1 and 2 the error is 4.4 times as large: the best of a grid of pairs, on
# random layers of 128 channels (docs/performance.md; Barabasz et al. 2020 on why points matter).
F4 = Transform(pairs=(3 / 4, 4 / 3))


def choose_transform(
    machine: Machine, window: Window, *, channels: int, dtype: str = "float32"
) -> Transform | None:
    """Return the transform of a convolution that is modelled faster than the direct way, if any.

    In bfloat16 F(2x2) only, which adds little to the error of rounding: ResNet-18 is off by 0.65%
    without it, by 0.83% with it, and by 1.22% with F(4x4) in the larger images, which is 1.09 times
    as fast (docs/performance.md).
    """
    layer = _layer(machine, window, channels=channels, dtype=dtype)
    return None if layer is None else {2: F2, 4: F4}.get(choose_winograd(machine, **layer))


def winograd_cycles_of(machine: Machine, window: Window, *, channels: int, dtype: str) -> float:
    """Return the modelled cycles, of all threads, of the best transform; infinite without one."""
    layer = _layer(machine, window, channels=channels, dtype=dtype)
    if layer is None:
        return math.inf
    return min(cycles for m, cycles in winograd_cycles(machine, **layer).items() if m)


def _layer(machine: Machine, window: Window, *, channels: int, dtype: str) -> dict[str, Any] | None:
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
        "tiles": (F2.tile,) if dtype == BFLOAT16 else (F2.tile, F4.tile),
    }


def transform_weight(weight: np.ndarray, transform: Transform, tile: int) -> np.ndarray:
    """Transform ``[K, 3, 3, C]`` to ``[m + 2, m + 2, ceil(K / tile), C, tile]``, of its type."""
    channels, _, _, depth = weight.shape
    matrix = transform.weight
    points = np.einsum("xr,krsc,ys->xykc", matrix, weight.astype("float64"), matrix)
    rounded = -(-channels // tile) * tile
    padded = np.zeros((*points.shape[:2], rounded, depth), weight.dtype)
    padded[:, :, :channels] = points
    side = transform.side
    blocked = padded.reshape(side, side, rounded // tile, tile, depth)
    return np.ascontiguousarray(blocked.transpose(0, 1, 2, 4, 3))


def _sum(terms: list[tuple[float, tirx.Expr]], dtype: str = "float32") -> tirx.Expr:
    """Return a sum of products with coefficients, which are skipped where they are 0 or 1."""
    total = None
    for coefficient, value in terms:
        if coefficient == 0:
            continue
        if abs(coefficient) != 1:
            value = value * tirx.const(abs(coefficient), dtype)
        if total is None:
            total = value if coefficient > 0 else -value
        else:
            total = total + value if coefficient > 0 else total - value
    return total


def select_row(row: tirx.Expr, values: list[tirx.Expr]) -> tirx.Expr:
    """Return the value of a row; which one is known once the loop over rows is unrolled."""
    chosen = values[-1]
    for index in reversed(range(len(values) - 1)):
        chosen = tirx.Select(row == index, values[index], chosen)
    return chosen


def transform_data(
    transform: Transform,
    row: tirx.Expr,
    term: Callable[[int], tirx.Expr],
    dtype: str = "float32",
) -> tirx.Expr:
    """Return one row of ``B^T`` times a vector, in float32 or in integers.

    The rows of ``+a`` and ``-a`` have the same even part and opposite odd parts: written as sum and
    difference, each part is computed once.
    """
    values = []
    for position, coefficients in enumerate(transform.data):
        even = [(c, term(i)) for i, c in enumerate(coefficients) if c and i % 2 == 0]
        odd = [(c, term(i)) for i, c in enumerate(coefficients) if c and i % 2]
        if not odd or not even:
            values.append(_sum(even or odd, dtype))
        elif position % 2:
            values.append(_sum(even, dtype) + _sum(odd, dtype))
        else:
            values.append(_sum(even, dtype) - _sum([(-c, value) for c, value in odd], dtype))
    return select_row(row, values)


def _transform_output(
    transform: Transform, row: tirx.Expr, term: Callable[[int], tirx.Expr]
) -> tirx.Expr:
    """Return one row of ``A^T`` times a vector: ``sum a_i^row m_i``, the last with infinity's."""
    values = []
    for power in range(transform.tile):
        terms = [(1.0, term(0))] if power == 0 else []
        for index, point in enumerate(transform.pairs):
            plus, minus = term(2 * index + 1), term(2 * index + 2)
            terms.append((point**power, plus - minus if power % 2 else plus + minus))
        if power == transform.tile - 1:
            terms.append((1.0, term(transform.side - 1)))
        values.append(_sum(terms))
    return select_row(row, values)


def winograd_conv2d(
    data: te.Tensor,
    weight: te.Tensor,
    window: Window,
    *,
    transform: Transform,
    channels: int,
    tile_rows: int,
    pairs: Pairs | None = None,
) -> te.Tensor:
    """Return the 3x3 convolution of NHWC data with transformed weights.

    Parameters
    ----------
    data : Tensor
        ``[N, H, W, C]``; 16-bit floats are widened.
    weight : Tensor
        ``[m + 2, m + 2, ceil(K / tk), C, tk]``; with pairs int32
        ``[m + 2, m + 2, ceil(K / tk), C / 2, tk]``.
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
    """
    batch, height, width, depth = window.shape
    out_height, out_width = window.output
    top, left = window.padding[:2]
    m, side = transform.tile, transform.side
    down, across = -(-out_height // m), -(-out_width // m)
    tiles = batch * down * across
    rounded = -(-tiles // tile_rows) * tile_rows
    blocks, _, pack = (int(extent) for extent in weight.shape[2:])

    def pixel(p: tirx.Expr, i: int, j: tirx.Expr, c: tirx.Expr) -> tirx.Expr:
        tile = p if rounded == tiles else tirx.min(p, tiles - 1)
        n, at = tirx.indexdiv(tile, down * across), tirx.indexmod(tile, down * across)
        h = tirx.indexdiv(at, across) * m + i - top
        w = tirx.indexmod(at, across) * m + j - left
        inside = tirx.all(h >= 0, h < height, w >= 0, w < width)
        return tirx.if_then_else(inside, widen(data[n, h, w, c]), tirx.const(0, "float32"))

    rows = te.compute(
        (rounded, side, side, depth),
        lambda p, x, j, c: transform_data(transform, x, lambda i: pixel(p, i, j, c)),
        name="wino_rows",
    )

    def point(x: tirx.Var, y: tirx.Var, p: tirx.Var, c: tirx.Var) -> tirx.Expr:
        value = transform_data(transform, y, lambda j: rows[p, x, j, c])
        return value if pairs is None else pairs.bits(value)

    points = te.compute((side, side, rounded, depth), point, name="wino_in")
    c = te.reduce_axis((0, int(weight.shape[3])), "c")

    def product(x: tirx.Var, y: tirx.Var, p: tirx.Var, k: tirx.Var) -> tirx.Expr:
        factor = weight[x, y, k // pack, c, k % pack]
        if pairs is None:
            return te.sum(points[x, y, p, c] * widen(factor), axis=c)
        return pairs.sum(lambda half: points[x, y, p, PAIR * c + half], factor, axis=[c])

    sums = te.compute((side, side, rounded, blocks * pack), product, name="wino_acc")
    columns = te.compute(
        (batch, down, across, m, side, channels),
        lambda n, a, b, i, y, k: _transform_output(
            transform, i, lambda x: sums[x, y, (n * down + a) * across + b, k]
        ),
        name="wino_cols",
    )
    return te.compute(
        (batch, out_height, out_width, channels),
        lambda n, h, w, k: _transform_output(
            transform,
            tirx.indexmod(w, m),
            lambda y: columns[
                n, tirx.indexdiv(h, m), tirx.indexdiv(w, m), tirx.indexmod(h, m), y, k
            ],
        ),
        name="wino_out",
    )
