"""The transforms of Winograd's minimal filtering, ``F(m x m, 3 x 3)``.

An output tile of ``m x m`` pixels takes ``(m + 2)^2`` products instead of ``9 m^2``,
``Y = A^T [(G g G^T) * (B^T d B)] A`` (Lavin and Gray 2016, equation 12).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx

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
        rows = [
            [point**k / scale for k in range(3)]
            for point, scale in zip(self.finite, self.scale, strict=True)
        ]
        return np.array([*rows, [0.0, 0.0, 1.0]])

    @property
    def scale(self) -> Row:
        """``prod (a_i - a_j), j != i`` of each finite point; the same for ``+a`` and ``-a``."""
        finite = self.finite
        return tuple(
            float(np.prod([point - other for j, other in enumerate(finite) if j != i]))
            for i, point in enumerate(finite)
        )


F2 = Transform(pairs=(1.0,))
# With Lavin's points 1 and 2 the error is 4.4 times as large: the best of a grid of pairs, on
# random layers of 128 channels (docs/performance.md; Barabasz et al. 2020 on why points matter).
F4 = Transform(pairs=(3 / 4, 4 / 3))
# Where the transformed operands are rounded to bfloat16, these are the best of such a grid: 0.87 of
# the error with F4's points, 0.45 of that with Lavin's.
F4_ROUNDED = Transform(pairs=(5 / 8, 3 / 2))


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


def transform_row(
    transform: Transform, column: tirx.Expr, term: Callable[[int], tirx.Expr]
) -> tirx.Expr:
    """Return one point of a row of weights, but for the point's `scale`, which is the output's.

    So it takes two operations at most: ``g_0 + a^2 g_2``, and ``a g_1`` added or subtracted.
    """
    values = [term(0)]
    for a in transform.pairs:
        even, odd = _sum([(1.0, term(0)), (a * a, term(2))]), _sum([(a, term(1))])
        values += [even + odd, even - odd]
    return select_row(column, [*values, term(2)])


def transform_output(
    transform: Transform,
    row: tirx.Expr,
    term: Callable[[int], tirx.Expr],
    *,
    scaled: bool = True,
) -> tirx.Expr:
    """Return one row of ``A^T`` times a vector: ``sum a_i^row m_i``, the last with infinity's.

    With ``scaled`` the weights were divided by the `scale` of each point; else it is done here.
    """
    scales = (1.0,) * len(transform.scale) if scaled else transform.scale
    values = []
    for power in range(transform.tile):
        terms = [(1 / scales[0], term(0))] if power == 0 else []
        for index, point in enumerate(transform.pairs):
            plus, minus = term(2 * index + 1), term(2 * index + 2)
            both = plus - minus if power % 2 else plus + minus
            terms.append((point**power / scales[2 * index + 1], both))
        if power == transform.tile - 1:
            terms.append((1.0, term(transform.side - 1)))
        values.append(_sum(terms))
    return select_row(row, values)
