"""Lowers sin and cos to polynomials that vectorize, at any size of their argument.

Rewrites ``relax.sin`` and ``relax.cos`` in float32; LLVM would call the C library once for each
element. Runs at legalization. Numerics: absolute error at most 1.2e-7 (tested against float64 over
all of float32); a NaN stays one, and infinities give NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import relax, te, tirx

from .anchors import default_legalization

# The bits of 2 / pi behind the point, as fdlibm's e_rem_pio2 has them.
_TWO_OVER_PI = 0xA2F9836E4E441529FC2757D1F534DDC0DB6295993C439041FE5163AB
_BITS = 224
# A float32 times so many bits is exact in float64; seven parts reach 2**-53 behind the point of a
# product with the largest float32.
_PART_BITS = 29
_PARTS = tuple(
    math.ldexp(_TWO_OVER_PI >> (_BITS - last) & ((1 << _PART_BITS) - 1), -last)
    for last in range(_PART_BITS, 7 * _PART_BITS + 1, _PART_BITS)
)
# sin r = r + r^3 P(r^2) and cos r = 1 - r^2 / 2 + r^4 Q(r^2) for |r| <= pi / 4: Cephes' sinf, cosf.
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
# Added to a whole number below 2**22, it leaves that in the lowest bits of the sum; a conversion
# of NaN to an integer would be undefined.
_ROUNDER = 1.5 * 2**23


def _const(value: float) -> tirx.Expr:
    return tirx.const(value, "float32")


def _horner(coefficients: tuple[float, ...], x: tirx.Expr) -> tirx.Expr:
    total = _const(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _const(coefficient)
    return total


def _quarters(size: tirx.Expr) -> tirx.Expr:
    """Return how many quarters of a turn a positive float32 is, less whole turns, in float64.

    Of each part of 2 / pi the product is exact, and so is what its whole turns leave: where a part
    holds nothing else, 0. ``[0, 28)``, since the turns of the sum stay.
    """
    wide = size.astype("float64")
    total = tirx.const(0.0, "float64")
    for part in reversed(_PARTS):
        product = wide * tirx.const(part, "float64")
        turns = tirx.floor(product * tirx.const(0.25, "float64"))
        total = total + (product - turns * tirx.const(4.0, "float64"))
    return total


def _wave(x: tirx.Expr, shift: int) -> tirx.Expr:
    """Return ``sin(|x| + shift pi / 2)``."""
    quarters = _quarters(tirx.abs(x))
    whole = tirx.floor(quarters + tirx.const(0.5, "float64"))
    r = ((quarters - whole) * tirx.const(math.pi / 2, "float64")).astype("float32")
    square = r * r
    sine = r * square * _horner(_SIN, square) + r
    cosine = square * square * _horner(_COS, square) - square * _const(0.5) + _const(1.0)
    number = tirx.reinterpret("int32", whole.astype("float32") + _const(_ROUNDER)) + shift

    def has(bit: int) -> tirx.Expr:
        return (number & tirx.const(bit, "int32")) > 0

    value = tirx.Select(has(1), cosine, sine)
    return tirx.Select(has(2), -value, value)


def sin(x: tirx.Expr) -> tirx.Expr:
    """Return the sine of a float32 without a call; ``sin(-0.0)`` is -0.0."""
    value = _wave(x, 0)
    # What is left is a zero or NaN.
    return tirx.Select(x > 0, value, tirx.Select(x < 0, -value, x))


def cos(x: tirx.Expr) -> tirx.Expr:
    """Return the cosine of a float32 without a call."""
    return _wave(x, 1)


def legalize_wave(
    function: Callable[[tirx.Expr], tirx.Expr], hint: str, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    """Legalize one ``relax.sin`` or ``relax.cos``. See the module."""
    if str(call.ty.dtype) != "float32":
        return default_legalization(bb, call)

    def wave(x: te.Tensor) -> te.Tensor:
        return te.compute(x.shape, lambda *i: function(x[i]), name=hint)

    return bb.call_te(wave, call.args[0], primfunc_name_hint=hint)
