"""Lowers 2-D pooling over NCHW: rows of a window are joined first, columns of the joined row then.

For images that stand alone in NCHW, between no convolutions: both loops run along a row of the
image through memory, where windows over channels would want two transpositions. Called by
`hone.passes.lower.pool2d`; scheduled by `hone.targets.schedule.pooling`.
Numerics: maxima are exact, a NaN may be passed over; sums are taken rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tvm import te, tirx

from hone.targets.schedule.pooling import FORM

from .half import is_half
from .window import Window

# Rows shorter than this fill no vectors. Windows larger than this are more code than loops.
LEAST_COLUMNS = 8
MOST_TAPS = 16

Join = Callable[[tirx.Expr, tirx.Expr], tirx.Expr]
OnlyIf = Callable[[tirx.Expr, tirx.Expr], tirx.Expr]


def fits_planes(window: Window) -> bool:
    """Say whether pooling is better done along the rows of an image."""
    return window.output[1] >= LEAST_COLUMNS and max(window.taps) <= MOST_TAPS


def max_pool_planes(data: te.Tensor, window: Window) -> te.Tensor:
    """Return the window maximum of ``[N, C, H, W]``; ``window`` has its shape as NHWC."""
    dtype = "float32" if is_half(data) else str(data.dtype)
    least = tirx.min_value(dtype)
    choose = None if window.dilation[0] == 1 else partial(_or_least, least)
    rows, width = _joined_rows(data, window, tirx.max, least, choose)
    joined = _joined_columns(rows, window, tirx.max)
    return te.compute(
        _shape(window), joined, name="pool_out", attrs={FORM: [*width, 0, 0, window.strides[1]]}
    )


def avg_pool_planes(data: te.Tensor, window: Window, *, padding_counts: bool) -> te.Tensor:
    """Return the window mean of ``[N, C, H, W]``; padding is part of a window, or is not.

    Where it is not, columns whose windows lie inside the image are a loop of their own, in which
    the count of taps is the same for a whole row.
    """

    def add(a: tirx.Expr, b: tirx.Expr) -> tirx.Expr:
        return a + b

    rows, width = _joined_rows(data, window, add, tirx.const(0, "float32"), _or_zero)
    joined = _joined_columns(rows, window, add)
    one = tirx.const(1, "float32")

    def taps(at: tirx.Expr, axis: int) -> tirx.Expr:
        """Return how many taps of a window lie in the image along an axis."""
        first = at * window.strides[axis] - window.padding[axis]
        end = tirx.min(first + window.taps[axis], window.shape[1 + axis])
        return end - tirx.max(first, 0)

    def mean(n: tirx.Var, c: tirx.Var, y: tirx.Var, x: tirx.Var) -> tirx.Expr:
        if padding_counts or not any(window.padding):
            size = tirx.const(1 / (window.taps[0] * window.taps[1]), "float32")
        else:
            size = one / (taps(y, 0) * taps(x, 1)).astype("float32")
        return joined(n, c, y, x) * size

    edges = (0, 0) if padding_counts else _partial_columns(window)
    return te.compute(
        _shape(window), mean, name="pool_out", attrs={FORM: [*width, *edges, window.strides[1]]}
    )


def _shape(window: Window) -> tuple[int, int, int, int]:
    return (window.shape[0], window.shape[3], *window.output)


def _joined_rows(
    data: te.Tensor, window: Window, join: Join, outside: tirx.Expr, only_if: OnlyIf | None
) -> tuple[te.Tensor, tuple[int, int]]:
    """Return the rows of each window joined, and how many columns lie before and behind the image.

    Columns outside the image hold ``outside``. A row outside is the nearest one of the image, which
    ``only_if`` hides; None where it may count twice, because the window has it anyway.
    """
    n, height, width, c = window.shape
    top, left, _, _ = window.padding
    out_h, out_w = window.output
    read = (out_w - 1) * window.strides[1] + (window.taps[1] - 1) * window.dilation[1] + 1
    behind = max(read - left - width, 0)

    def row(b: tirx.Var, ch: tirx.Var, y: tirx.Var, x: tirx.Var) -> tirx.Expr:
        column = tirx.min(tirx.max(x - left, 0), width - 1)
        total = None
        for tap in range(window.taps[0]):
            least = tap * window.dilation[0] - top
            most = (out_h - 1) * window.strides[0] + least
            at = y * window.strides[0] + least
            value = data[b, ch, tirx.min(tirx.max(at, 0), height - 1), column]
            if is_half(data):
                value = value.astype("float32")
            if only_if is not None and (least < 0 or most >= height):
                value = only_if(tirx.all(at >= 0, at < height), value)
            total = value if total is None else join(total, value)
        if left or behind:
            total = tirx.Select(tirx.all(x >= left, x < left + width), total, outside)
        return total

    rows = te.compute((n, c, out_h, read), row, name="pool_rows")
    return rows, (left, behind)


def _or_least(least: tirx.Expr, condition: tirx.Expr, value: tirx.Expr) -> tirx.Expr:
    return tirx.Select(condition, value, least)


def _or_zero(condition: tirx.Expr, value: tirx.Expr) -> tirx.Expr:
    """Return a float32 or 0 by its bits: LLVM makes branches of a choice, and no vectors then."""
    mask = tirx.const(0, "int32") - tirx.Cast("int32", condition)
    return tirx.reinterpret("float32", tirx.reinterpret("int32", value) & mask)


def _joined_columns(
    rows: te.Tensor, window: Window, join: Join
) -> Callable[[tirx.Var, tirx.Var, tirx.Var, tirx.Var], tirx.Expr]:
    def column(n: tirx.Var, c: tirx.Var, y: tirx.Var, x: tirx.Var) -> tirx.Expr:
        total = None
        for tap in range(window.taps[1]):
            value = rows[n, c, y, x * window.strides[1] + tap * window.dilation[1]]
            total = value if total is None else join(total, value)
        return total

    return column


def _partial_columns(window: Window) -> tuple[int, int]:
    """Return how many columns at the two ends have windows that lie partly outside the image."""
    left, stride, count = window.padding[1], window.strides[1], window.output[1]
    before = min(-(-left // stride), count)
    whole = (window.shape[2] + left - window.taps[1]) // stride + 1
    return before, max(count - max(whole, before), 0)
