"""Lowers 2-D resizing to copies and to weighted sums, of rows first and then of columns.

Rewrites ``relax.image.resize2d`` in NHWC and NCHW; ``tf_crop_and_resize`` and interpolation of
anything but float32 keep TVM's own legalization. Positions are fractions of integers, so that
indices and weights are exact, also at ties, where float32 positions are off by a rounding. Runs
after the layout is chosen and before fusion. Numerics: weights are rounded once to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from tvm import relax, te, tirx

from hone.targets.schedule.resize import FORM

from .anchors import ANCHOR, default_legalization

_ROUNDINGS = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Where output elements of an axis lie in the input: ``(o * step + start) / unit``.

    Parameters
    ----------
    step, start, unit : int
        See above; ``unit`` is positive.
    source, target : int
        Extents of the axis.
    """

    step: int
    start: int
    unit: int
    source: int
    target: int

    @classmethod
    def of(cls, source: int, target: int, mode: str) -> Positions | None:
        """Return the positions of a coordinate mode of ONNX; None for one that has no such form.

        From 2 to 4 elements, ``half_pixel`` gives ``(2 o - 1) / 4``: -1/4, 1/4, 3/4, 5/4.
        """
        scale, half = Fraction(source, target), Fraction(1, 2)
        if mode == "half_pixel" or (mode == "pytorch_half_pixel" and target > 1):
            line = (scale, scale * half - half)
        elif mode == "asymmetric":
            line = (scale, Fraction(0))
        elif mode == "align_corners":
            line = (Fraction(source - 1, max(target - 1, 1)), Fraction(0))
        elif mode == "tf_half_pixel_for_nn":
            line = (scale, scale * half)
        elif mode == "pytorch_half_pixel":
            line = (Fraction(0), Fraction(0))
        else:
            return None
        unit = math.lcm(line[0].denominator, line[1].denominator)
        return cls(
            step=int(line[0] * unit),
            start=int(line[1] * unit),
            unit=unit,
            source=source,
            target=target,
        )

    def below(self, at: tirx.Expr, *, plus: int = 0, unit: int | None = None) -> tirx.Expr:
        """Return ``floor((at * step + start) * unit + plus)`` over ``unit``, by default once."""
        factor = 1 if unit is None else unit
        wide = self._wide(at)
        line = wide * (self.step * factor) + (self.start * factor + plus)
        index = tirx.floordiv(line, self.unit * factor)
        return index if wide.same_as(at) else index.astype("int32")

    def _wide(self, at: tirx.Expr) -> tirx.Expr:
        """Return an index as int64 where the numerators of positions exceed int32."""
        most = max(abs(o * self.step + self.start) for o in (0, self.target)) + self.unit
        return at.astype("int64") if 2 * most >= 2**31 else at

    def nearest(self, at: tirx.Expr, rounding: str) -> tirx.Expr:
        """Return the index of the nearest element, inside the input."""
        plus = {
            "floor": 0,
            "ceil": 2 * self.unit - 2,
            "round_prefer_floor": self.unit - 1,
            "round_prefer_ceil": self.unit,
        }[rounding]
        numerators = [(o * self.step + self.start) * 2 + plus for o in (0, self.target - 1)]
        index = self.below(at, plus=plus, unit=2)
        return self._inside(index, *[n // (2 * self.unit) for n in numerators])

    @property
    def phases(self) -> int:
        """After how many elements positions have moved by one, if they divide the row; else 1."""
        period = self.unit // self.step if self.step and self.unit % self.step == 0 else 1
        return period if self.target % period == 0 else 1

    def ends(self, taps: int) -> tuple[int, int]:
        """Return how many elements interpolation reads before the input, and behind it."""
        before = taps // 2 - 1
        first = self.start // self.unit - before
        last = ((self.target - 1) * self.step + self.start) // self.unit - before + taps - 1
        return max(-first, 0), max(last - self.source + 1, 0)

    def tap(self, at: tirx.Expr, tap: int, taps: int) -> tirx.Expr:
        """Return the index of a tap of an interpolation, which may lie outside the input."""
        return self.below(at) + (tap - taps // 2 + 1)

    def clamped(self, index: tirx.Expr, taps: int) -> tirx.Expr:
        """Return the nearest index inside the input."""
        before, behind = self.ends(taps)
        return self._inside(index, -before, self.source - 1 + behind)

    def _inside(self, index: tirx.Expr, least: int, most: int) -> tirx.Expr:
        if most >= self.source:
            index = tirx.min(index, self.source - 1)
        return tirx.max(index, 0) if least < 0 else index

    def fraction(self, at: tirx.Expr) -> tirx.Expr:
        """Return how far behind the element below it a position lies, in float32."""
        rest = tirx.floormod(self._wide(at) * self.step + self.start, self.unit)
        return tirx.Cast("float32", rest) * tirx.const(1 / self.unit, "float32")


Weights = Callable[[Positions, tirx.Expr], list[tirx.Expr]]


def _linear(axis: Positions, at: tirx.Expr) -> list[tirx.Expr]:
    t = axis.fraction(at)
    return [tirx.const(1, "float32") - t, t]


def _cubic(alpha: float, exclude: bool, axis: Positions, at: tirx.Expr) -> list[tirx.Expr]:
    """Return the weights of four taps (Keys, 1981); ``exclude`` those outside the input."""
    one, t = tirx.const(1, "float32"), axis.fraction(at)

    def near(d: tirx.Expr) -> tirx.Expr:
        return ((alpha + 2) * d - (alpha + 3)) * d * d + one

    def far(d: tirx.Expr) -> tirx.Expr:
        return ((alpha * d - 5 * alpha) * d + 8 * alpha) * d - 4 * alpha

    weights = [far(t + one), near(t), near(one - t), far(one + one - t)]
    if not exclude:
        return weights
    for tap, weight in enumerate(weights):
        index = axis.tap(at, tap, 4)
        inside = tirx.all(index >= 0, index < axis.source)
        weights[tap] = tirx.Select(inside, weight, tirx.const(0, "float32"))
    total = weights[0] + weights[1] + weights[2] + weights[3]
    return [weight / total for weight in weights]


def nearest(
    data: te.Tensor, *, rows: Positions, columns: Positions, rounding: str, channels_last: bool
) -> te.Tensor:
    """Return the nearest elements of ``[N, H, W, C]`` or ``[N, C, H, W]``."""

    def at(n: tirx.Var, *i: tirx.Var) -> tirx.Expr:
        if channels_last:
            return data[n, rows.nearest(i[0], rounding), columns.nearest(i[1], rounding), i[2]]
        return data[n, i[0], rows.nearest(i[1], rounding), columns.nearest(i[2], rounding)]

    shape = _shape(data, rows, columns, channels_last)
    form = _form(columns, channels_last)
    return te.compute(shape, at, name="resize_out", attrs=form)


def interpolate(
    data: te.Tensor,
    *,
    rows: Positions,
    columns: Positions,
    taps: int,
    weights: Weights,
    channels_last: bool,
) -> te.Tensor:
    """Return the weighted sums of two or four rows, and then of columns.

    In NCHW a row has what columns read outside the input: where the output's width is a multiple,
    loops over it then run through memory.
    """
    n, *rest = (int(extent) for extent in data.shape)
    before, behind = (0, 0) if channels_last else columns.ends(taps)
    width = columns.source + before + behind
    h, c = rows.target, rest[2] if channels_last else rest[0]

    def row(b: tirx.Var, *i: tirx.Var) -> tirx.Expr:
        y = i[0] if channels_last else i[1]
        total = None
        for tap, weight in enumerate(weights(rows, y)):
            source = rows.clamped(rows.tap(y, tap, taps), taps)
            if channels_last:
                value = data[b, source, i[1], i[2]]
            else:
                value = data[b, i[0], source, columns.clamped(i[2] - before, taps)]
            total = value * weight if total is None else total + value * weight
        return total

    whole = (n, h, width, c) if channels_last else (n, c, h, width)
    summed = te.compute(whole, row, name="resize_rows")

    def column(b: tirx.Var, *i: tirx.Var) -> tirx.Expr:
        x = i[1] if channels_last else i[2]
        total = None
        for tap, weight in enumerate(weights(columns, x)):
            source = columns.tap(x, tap, taps)
            if channels_last:
                value = summed[b, i[0], columns.clamped(source, taps), i[2]]
            else:
                value = summed[b, i[0], i[1], source + before]
            total = value * weight if total is None else total + value * weight
        return total

    form = _form(columns, channels_last, (before, behind))
    shape = _shape(data, rows, columns, channels_last)
    return te.compute(shape, column, name="resize_out", attrs=form)


def _form(
    columns: Positions, channels_last: bool, ends: tuple[int, int] = (0, 0)
) -> dict[str, list[int]]:
    """Return what the schedule cannot see (`hone.targets.schedule.resize.FORM`)."""
    return {FORM: [int(channels_last), columns.phases, *ends]}


def _shape(
    data: te.Tensor, rows: Positions, columns: Positions, channels_last: bool
) -> tuple[int, ...]:
    n, *rest = (int(extent) for extent in data.shape)
    size = (rows.target, columns.target)
    return (n, *size, rest[2]) if channels_last else (n, rest[0], *size)


def _interpolation(
    rows: Positions, columns: Positions, taps: int, weights: Weights, channels_last: bool
) -> Callable[[te.Tensor], te.Tensor]:
    return partial(
        interpolate,
        rows=rows,
        columns=columns,
        taps=taps,
        weights=weights,
        channels_last=channels_last,
    )


def legalize_resize2d(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize one ``relax.image.resize2d`` call. See the module."""
    attrs, dtype = call.attrs, str(call.ty.dtype)
    layout, method = str(attrs.layout), str(attrs.method)
    if layout not in ("NHWC", "NCHW") or str(call.args[0].ty.dtype) != dtype:
        return default_legalization(bb, call)
    first = 1 if layout == "NHWC" else 2
    given, wanted = call.args[0].ty.shape, call.ty.shape
    mode = str(attrs.coordinate_transformation_mode)
    rows, columns = (
        Positions.of(int(given[axis]), int(wanted[axis]), mode) for axis in (first, first + 1)
    )
    if rows is None or columns is None:
        return default_legalization(bb, call)
    make: Callable[[te.Tensor], te.Tensor]
    last = layout == "NHWC"
    if method == "nearest_neighbor" and str(attrs.rounding_method) in _ROUNDINGS:
        rounding = str(attrs.rounding_method)
        make = partial(nearest, rows=rows, columns=columns, rounding=rounding, channels_last=last)
    elif method == "linear" and dtype == "float32":
        make = _interpolation(rows, columns, 2, _linear, last)
    elif method == "cubic" and dtype == "float32":
        weights = partial(_cubic, float(attrs.cubic_alpha), bool(attrs.cubic_exclude))
        make = _interpolation(rows, columns, 4, weights, last)
    else:
        return default_legalization(bb, call)
    return bb.call_te(
        make, call.args[0], primfunc_name_hint=f"resize_{method}", primfunc_attrs=ANCHOR
    )
