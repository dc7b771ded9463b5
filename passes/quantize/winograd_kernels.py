"""Integer 3x3 convolutions of stride 1 by Winograd's minimal filtering, exactly.

``F(4x4, 3x3)`` takes 36 products for 16 pixels instead of 144, of int16 instead of bytes. With the
points 0, ±1, ±2 and infinity both transforms are integers: the data's fits int16, and so does the
weights' once the denominators are moved behind the sum. What comes back is ``odd × 2^a × sum``,
computed modulo 2^32, in which the odd number has an inverse; ``32 - a`` bits of the sum are left,
26 at least. That it fits them is proven from the weights (`IntegerTransform.fits`); no product
needs to be small. Stages: ``wino_rows``, ``wino_in``, ``wino_acc``, ``wino_cols``, ``wino_out``,
``requantize``. Numerics: exact, and equal to those of `kernels`.

Worked number, F(2, 3) in one dimension: data 1 2 3 4, weights 5 6 7. Points of the data (0, 1, -1,
infinity): 2, 5, 1, 2; of the weights: 10, 18, 6, 14; their products: 20, 90, 6, 28. 90 + 6 - 20 is
76, twice 38 = 1 × 5 + 2 × 6 + 3 × 7, and 90 - 6 + 28 is 112, twice 56.

Source: Lavin and Gray, CVPR 2016, for the transforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from tvm import te, tirx

from hone.passes.lower.window import Window
from hone.passes.lower.winograd_transforms import Transform, select_row, transform_data
from hone.targets.word_intrinsics import (
    WordDot,
    word_product,
    word_sum,
    wrapping_add,
    wrapping_multiply,
    wrapping_subtract,
)

from .kernels import level, total

PAIR = 2
"""Channels that share one int32 lane."""
_WORD_BITS = 32
_MOST_LEVEL = 255


@dataclass(frozen=True, kw_only=True)
class IntegerTransform:
    """``F(m x m, 3 x 3)`` over integers: one scaling of the weights, one of each row of results.

    Parameters
    ----------
    points : Transform
        Interpolation at integers.
    ends : int
        Factor of the weights at 0 and at infinity, which spares the results a product.
    """

    points: Transform
    ends: int

    @property
    def tile(self) -> int:
        """Output pixels of a side, m."""
        return self.points.tile

    @property
    def side(self) -> int:
        """Points of a side, ``m + 2``."""
        return self.points.side

    @property
    def weight(self) -> np.ndarray:
        """``[m + 2, 3]`` integers: ``1 a a^2`` for each finite point a, infinity last."""
        rows = [[1, a, a * a] for a in map(int, self.points.finite)]
        rows[0][0] = self.ends
        return np.array([*rows, [0, 0, self.ends]])

    @property
    def _results(self) -> list[list[Fraction]]:
        """``A^T`` with the denominators that `weight` leaves out."""
        finite = [int(a) for a in self.points.finite]
        scales = [math.prod(a - b for b in finite if b != a) for a in finite]
        scales[0] *= self.ends
        rows = [
            [Fraction(a**r, s) for a, s in zip(finite, scales, strict=True)]
            for r in range(self.tile)
        ]
        last = [Fraction(0)] * (self.tile - 1) + [Fraction(1, self.ends)]
        return [[*row, end] for row, end in zip(rows, last, strict=True)]

    @property
    def odd(self) -> int:
        """The odd part of the denominators, the same for all rows."""
        factors = [math.lcm(*(c.denominator for c in row)) for row in self._results]
        return math.lcm(*(f // (f & -f) for f in factors))

    @property
    def shifts(self) -> tuple[int, ...]:
        """The power of two of each row's denominator."""
        factors = [math.lcm(*(c.denominator for c in row)) for row in self._results]
        return tuple((f & -f).bit_length() - 1 for f in factors)

    @property
    def result(self) -> tuple[tuple[int, ...], ...]:
        """``A^T [m, m + 2]`` in integers: row r times ``odd × 2^shifts[r]``."""
        rows = zip(self._results, self.shifts, strict=True)
        return tuple(tuple(int(c * self.odd * 2**shift) for c in row) for row, shift in rows)

    def fits(self, weight: np.ndarray) -> bool:
        """Say whether every sum of levels with these weights survives the power of two.

        Parameters
        ----------
        weight : ndarray
            int8 ``[K, 3, 3, C]``. F(4x4) allows sums below 2^25: 516 channels of weights that are
            all 28.
        """
        rows = weight.reshape(len(weight), -1).astype(np.int64)
        most = max(np.maximum(rows, 0).sum(1).max(), np.maximum(-rows, 0).sum(1).max())
        return bool(most * _MOST_LEVEL < 2 ** (_WORD_BITS - 1 - 2 * max(self.shifts)))


F2 = IntegerTransform(points=Transform(pairs=(1.0,)), ends=2)
F4 = IntegerTransform(points=Transform(pairs=(1.0, 2.0)), ends=6)


def pack(weight: np.ndarray, transform: IntegerTransform, tile: int) -> np.ndarray:
    """Transform int8 ``[K, 3, 3, C]`` to words ``[m + 2, m + 2, ceil(K / tile), C / 2, tile]``.

    A word is int32 and holds two neighbouring channels as int16, the first one low.
    """
    channels, _, _, depth = weight.shape
    matrix, side = transform.weight, transform.side
    points = np.einsum("xr,krsc,ys->xykc", matrix, weight.astype(np.int64), matrix)
    rounded = -(-channels // tile) * tile
    padded = np.zeros((side, side, rounded, depth), np.int16)
    padded[:, :, :channels] = points
    blocked = padded.reshape(side, side, rounded // tile, tile, depth // PAIR, PAIR)
    pairs = np.ascontiguousarray(blocked.transpose(0, 1, 2, 4, 3, 5))
    return pairs.view("<u2").astype("<u2").view("<i4")[..., 0]


def _combine(coefficients: list[tuple[int, tirx.Expr]]) -> tirx.Expr:
    """Return a sum of products modulo 2^32, whose first coefficient may not stand alone."""
    chosen = sorted((c for c in coefficients if c[0]), key=lambda c: c[0] < 0)
    whole: tirx.Expr | None = None
    for coefficient, value in chosen:
        size = abs(coefficient) if whole is not None else coefficient
        term = value if size == 1 else wrapping_multiply(value, size)
        if whole is None:
            whole = term
        else:
            whole = (wrapping_add if coefficient > 0 else wrapping_subtract)(whole, term)
    return whole


def _results(
    transform: IntegerTransform, row: tirx.Expr, term: Callable[[int], tirx.Expr]
) -> tirx.Expr:
    """Return one row of ``A^T`` times a vector; pairs of points as a sum and a difference."""
    values = []
    for power, coefficients in enumerate(transform.result):
        terms = [(coefficients[0], term(0)), (coefficients[-1], term(transform.side - 1))]
        for index in range(1, transform.side - 1, 2):
            joined = wrapping_subtract if power % 2 else wrapping_add
            terms.append((coefficients[index], joined(term(index), term(index + 1))))
        values.append(_combine(terms))
    return select_row(row, values)


def conv2d(
    data: te.Tensor,
    weight: te.Tensor,
    bias: te.Tensor,
    multiplier: te.Tensor,
    levels: te.Tensor,
    residual: te.Tensor | None = None,
    residual_multiplier: te.Tensor | None = None,
    offsets: te.Tensor | None = None,
    window_sums: te.Tensor | None = None,
    *,
    window: Window,
    transform: IntegerTransform,
    dot: WordDot,
    tile_rows: int,
    out_dtype: str,
) -> te.Tensor:
    """Return ``hone.conv2d_int8`` with weights packed by `pack`.

    Parameters
    ----------
    data : te.Tensor
        uint8 ``[N, H, W, C]``, C even.
    weight : te.Tensor
        int32 ``[m + 2, m + 2, ceil(K / tk), C / 2, tk]``.
    bias, multiplier : te.Tensor
        ``[K]``.
    levels, residual, residual_multiplier, offsets, window_sums : te.Tensor
        See `hone.passes.quantize.operators.conv2d_int8`.
    window : Window
        Geometry: 3x3, stride 1, no dilation.
    transform : IntegerTransform
        ``F(m x m, 3 x 3)``.
    dot : WordDot
        The instruction.
    tile_rows : int
        Tiles of one register tile; the number of tiles is rounded up to it.
    out_dtype : str
        Of the result.
    """
    batch, height, width, depth = window.shape
    out_height, out_width = window.output
    top, left = window.padding[:2]
    m, side = transform.tile, transform.side
    down, across = -(-out_height // m), -(-out_width // m)
    tiles = batch * down * across
    rounded = -(-tiles // tile_rows) * tile_rows
    blocks, pairs, tile = (int(extent) for extent in weight.shape[2:])
    channels = int(bias.shape[0])

    def pixel(p: tirx.Expr, i: int, j: tirx.Expr, c: tirx.Expr) -> tirx.Expr:
        at = p if rounded == tiles else tirx.min(p, tiles - 1)
        n, at = tirx.indexdiv(at, down * across), tirx.indexmod(at, down * across)
        h = tirx.indexdiv(at, across) * m + i - top
        w = tirx.indexmod(at, across) * m + j - left
        inside = tirx.all(h >= 0, h < height, w >= 0, w < width)
        zero_point = tirx.Cast("int16", levels[0])
        return tirx.if_then_else(inside, tirx.Cast("int16", data[n, h, w, c]), zero_point)

    rows = te.compute(
        (rounded, side, side, depth),
        lambda p, x, j, c: transform_data(
            transform.points, x, lambda i: pixel(p, i, j, c), "int16"
        ),
        name="wino_rows",
    )
    points = te.compute(
        (side, side, rounded, depth),
        lambda x, y, p, c: transform_data(transform.points, y, lambda j: rows[p, x, j, c], "int16"),
        name="wino_in",
    )
    pair = te.reduce_axis((0, pairs), "pair")

    def word(x: tirx.Var, y: tirx.Var, p: tirx.Var) -> tirx.Expr:
        # LLVM makes one load of the two.
        low, high = (
            tirx.Cast("uint32", tirx.reinterpret("uint16", points[x, y, p, PAIR * pair + half]))
            for half in range(PAIR)
        )
        return tirx.reinterpret("int32", low | (high << tirx.const(16, "uint32")))

    sums = te.compute(
        (side, side, rounded, blocks * tile),
        lambda x, y, p, k: word_sum(dot)(
            word_product(dot, word(x, y, p), weight[x, y, k // tile, pair, k % tile]), axis=[pair]
        ),
        name="wino_acc",
    )
    columns = te.compute(
        (batch, down, across, m, side, channels),
        lambda n, a, b, i, y, k: _results(
            transform, i, lambda x: sums[x, y, (n * down + a) * across + b, k]
        ),
        name="wino_cols",
    )
    inverse = pow(transform.odd, -2, 2**_WORD_BITS)

    def shift(at: tirx.Expr) -> tirx.Expr:
        return select_row(at, [tirx.const(bits, "int32") for bits in transform.shifts])

    def result(n: tirx.Var, h: tirx.Var, w: tirx.Var, k: tirx.Var) -> tirx.Expr:
        i, j = tirx.indexmod(h, m), tirx.indexmod(w, m)
        scaled = _results(
            transform,
            j,
            lambda y: columns[n, tirx.indexdiv(h, m), tirx.indexdiv(w, m), i, y, k],
        )
        if inverse != 1:
            scaled = wrapping_multiply(scaled, inverse)
        return scaled >> (shift(i) + shift(j))

    shape = (batch, out_height, out_width, channels)
    exact = te.compute(shape, result, name="wino_out")
    return te.compute(
        shape,
        lambda *i: level(
            total(exact[i], i, bias, offsets, window_sums),
            i,
            multiplier[i[3]],
            levels,
            residual,
            residual_multiplier,
            out_dtype,
        ),
        name="requantize",
    )
