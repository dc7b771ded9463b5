"""Lowers powers in float32: products and roots where the exponent allows, else 2**(y log2 x).

Rewrites ``relax.power``. Small whole exponents and 1/2 are products, a square root and a division.
Others go through float64, whose 53 bits hold ``y log2(x)`` with the 8 bits before the point that a
float32 result has and 30 behind it: LLVM makes vectors of it, where C's ``powf`` is a call for each
element. Runs at legalization. Numerics: relative error at most 4e-7 (tested against float64);
zeros, infinities, NaN and negative bases as in C (IEEE 754-2008, 9.2.1), but for roots: of -inf
they are NaN, and sqrt(-0) is -0.
"""

from __future__ import annotations

import math
from functools import partial

from tvm import relax, te, tirx

from .anchors import default_legalization, is_constant
from .elementary import is_number, mantissa_and_exponent

# log(m) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...) with s = (m - 1) / (m + 1), |s| <= 0.172: what is left
# out is below 2e-12. In units of log2(e), the highest power first.
_LOG2 = tuple(2 / (math.log(2) * k) for k in range(13, 0, -2))
# 2**r = e**(r ln 2) for |r| <= 1/2, Taylor's series: what is left out is below 3e-10.
_EXP2 = tuple(math.log(2) ** k / math.factorial(k) for k in range(8, -1, -1))
# Beyond these, a result is 0 or infinite in float32.
_LEAST, _MOST = -160.0, 130.0

# Exponents that take at most so many multiplications as products.
MOST_PRODUCT = 4


def _double(value: float) -> tirx.Expr:
    return tirx.const(value, "float64")


def _single(value: float) -> tirx.Expr:
    return tirx.const(value, "float32")


def _horner(coefficients: tuple[float, ...], x: tirx.Expr) -> tirx.Expr:
    total = _double(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _double(coefficient)
    return total


def _log2(x: tirx.Expr) -> tirx.Expr:
    """Return the base-2 logarithm of a positive float32 in float64; -inf for 0, inf for inf."""
    mantissa, n = mantissa_and_exponent(x)
    m = mantissa.astype("float64")
    s = (m - _double(1.0)) / (m + _double(1.0))
    value = n.astype("float64") + s * _horner(_LOG2, s * s)
    ends = tirx.Select(x > 0, x, _single(-math.inf)).astype("float64")
    inside = tirx.all(x > 0, x < _single(math.inf))
    return tirx.Select(inside, value, ends)


def _exp2(x: tirx.Expr) -> tirx.Expr:
    """Return ``2 ** x`` of a float64 in float32."""
    clipped = tirx.max(_double(_LEAST), tirx.min(_double(_MOST), x))
    n = tirx.floor(clipped + _double(0.5))
    whole = n.astype("int32").astype("int64")
    power = tirx.reinterpret("float64", (whole + 1023) << 52)
    return (_horner(_EXP2, clipped - n) * power).astype("float32")


def power(x: tirx.Expr, y: tirx.Expr) -> tirx.Expr:
    """Return ``x ** y`` in float32 without a call, as C's ``pow``.

    Examples
    --------
    ``power(2, 0.5)`` is 1.41421354, ``power(-2, 3)`` is -8, ``power(-2, 0.5)`` is NaN.
    """
    size = tirx.abs(x)
    value = _exp2(y.astype("float64") * _log2(size))
    value = tirx.Select(size.equal(_single(1.0)), _single(1.0), value)
    half = y * _single(0.5)
    whole = tirx.floor(y).equal(y)
    odd = tirx.all(whole, tirx.Not(tirx.floor(half).equal(half)))
    # The sign's bit, so that -0 counts; the bases below 0 that are not infinite need whole numbers.
    bits = tirx.reinterpret("int32", x)
    sign = tirx.const(-(2**31), "int32")
    signed = tirx.reinterpret("float32", tirx.reinterpret("int32", value) | (bits & sign))
    value = tirx.Select(odd, signed, value)
    nan = tirx.reinterpret("float32", tirx.const(0x7FC00000, "int32"))
    defined = tirx.any(x >= 0, whole, x.equal(_single(-math.inf)))
    value = tirx.Select(defined, value, nan)
    known = tirx.all(is_number(x), is_number(y))
    # Even of a NaN.
    one = tirx.any(y.equal(_single(0.0)), x.equal(_single(1.0)))
    return tirx.Select(one, _single(1.0), tirx.Select(known, value, nan))


def _product(x: tirx.Expr, times: int) -> tirx.Expr:
    """Return ``x ** times`` by squares, ``times`` at least 1."""
    half = x if times < 4 else _product(x, times // 2)
    if times == 1:
        return x
    square = half * half
    return square * x if times % 2 else square


def power_of_constant(x: tirx.Expr, exponent: float) -> tirx.Expr:
    """Return ``x ** exponent`` for an exponent that is known.

    Products for whole numbers up to `MOST_PRODUCT`, a root for 1/2, a division for those below 0.
    """
    if exponent == 0:
        return _single(1.0)
    times = abs(exponent)
    if times <= MOST_PRODUCT and times == int(times):
        # Divided first, so that no product vanishes whose inverse is finite.
        return _product(x if exponent > 0 else _single(1.0) / x, int(times))
    if exponent == -0.5:
        inverse = _single(1.0) / tirx.sqrt(x)
        return tirx.Select(x.equal(_single(0.0)), _single(math.inf), inverse)
    return tirx.sqrt(x) if exponent == 0.5 else power(x, _single(exponent))


def _powers(x: te.Tensor, *, exponent: float) -> te.Tensor:
    return te.compute(x.shape, lambda *i: power_of_constant(x[i], exponent), name="power")


def _broadcast_powers(x: te.Tensor, y: te.Tensor, *, shape: tuple[int, ...]) -> te.Tensor:
    def at(operand: te.Tensor, i: tuple[tirx.Expr, ...]) -> tirx.Expr:
        own = i[len(i) - len(operand.shape) :]
        sizes = [int(size) for size in operand.shape]
        return operand[tuple(v if n != 1 else 0 for v, n in zip(own, sizes, strict=True))]

    return te.compute(shape, lambda *i: power(at(x, i), at(y, i)), name="power")


def legalize_power(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize a power. See the module."""
    base, exponent = call.args
    if any(str(operand.ty.dtype) != "float32" for operand in (base, exponent)):
        return default_legalization(bb, call)
    shape = tuple(int(extent) for extent in call.ty.shape)
    same = tuple(int(extent) for extent in base.ty.shape) == shape
    if is_constant(exponent) and same and exponent.value.numpy().size == 1:
        value = float(exponent.value.numpy().reshape(-1)[0])
        make = partial(_powers, exponent=value)
        return bb.call_te(make, base, primfunc_name_hint="power")
    make = partial(_broadcast_powers, shape=shape)
    return bb.call_te(make, base, exponent, primfunc_name_hint="power")
