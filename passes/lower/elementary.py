"""Lowers exp, log, erf, tanh and what is built of them to polynomials that vectorize.

Rewrites ``relax.exp``, ``relax.log``, ``relax.erf``, ``relax.tanh``, ``relax.sigmoid``,
``relax.nn.silu`` and ``relax.nn.gelu`` in float32; LLVM would call the C library once for each
element. Writes ``relax.nn.relu``, ``relax.clip``, ``relax.sign`` and extrema with constants so that
a NaN stays one, as in onnxruntime. Runs at legalization. Numerics: relative error of exp at most
3e-7, absolute error of erf and tanh at most 5e-7, log within 2 ulp (tested against float64); a NaN
stays one everywhere, and infinities give the limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from tvm import relax, te, tirx, topi

from .anchors import default_legalization, is_constant

# exp(x) = 2**n exp(r) with n = round(x / ln 2), |r| <= ln(2) / 2; ln 2 in two parts so that r is
# exact (Cody and Waite 1980). The polynomial is that of Cephes' expf, relative error 2e-8.
_LOG2E = 1.44269504088896341
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
# Where the product of the two halves of the power has become 0 or infinite.
_LEAST, _MOST = -104.0, 88.9

# 2**r for |r| <= 1/2, the constant 1 left out: least squares, reweighted until the largest relative
# error is least, 9e-8.
_EXP2 = (
    1.3264726043e-03,
    9.6715127223e-03,
    5.5507337471e-02,
    2.4022242084e-01,
    6.9314697760e-01,
)

# Below this `exp2_below_0` is 0, and below the next one `exp_below_0`: n is -127, and the power's
# bits are all 0.
_LEAST_EXPONENT = -127.0
_LEAST_POWER = -88.0
# Added to a number below 2**22, it leaves n + 127 in the lowest bits of the sum's representation.
_ROUNDER = 1.5 * 2**23 + 127

# log(1 + f) = f - f^2 / 2 + f^3 P(f) for sqrt(1/2) <= 1 + f < sqrt 2: that of Cephes' logf.
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
# Bits of sqrt(1/2), of the smallest normal number and of a NaN.
_ROOT_HALF = 0x3F3504F3
_NORMAL = 0x00800000
_NAN = 0x7FC00000

# x P(x^2) / Q(x^2), the highest power first: Eigen's minimax fits for float32. At their bounds
# both give 1 exactly, with and without fused multiply-adds; without a bound they grow again.
_ERF = (
    (
        -2.72614225801306e-10,
        2.77068142495902e-08,
        -2.10102402082508e-06,
        -5.69250639462346e-05,
        -7.34990630326855e-04,
        -2.95459980854025e-03,
        -1.60960333262415e-02,
    ),
    (
        -1.45660718464996e-05,
        -2.13374055278905e-04,
        -1.68282697438203e-03,
        -7.37332916720468e-03,
        -1.42647390514189e-02,
    ),
)
_ERF_BOUND = 4.0
_TANH = (
    (
        -2.76076847742355e-16,
        2.00018790482477e-13,
        -8.60467152213735e-11,
        5.12229709037114e-08,
        1.48572235717979e-05,
        6.37261928875436e-04,
        4.89352455891786e-03,
    ),
    (
        1.19825839466702e-06,
        1.18534705686654e-04,
        2.26843463243900e-03,
        4.89352518554385e-03,
    ),
)
_TANH_BOUND = 9.0

# P(m) = Phi(-m) ** (-1/8) for the distribution Phi of a normal variable, the highest power first:
# least squares, reweighted until the largest error of m Phi(-m) is least (5e-8 up to 5.5). Beyond
# it grows, and at the bound m / P**8 is 1e-27.
_GELU = (
    3.13592535e-06,
    -1.74551473e-05,
    1.02171418e-04,
    1.32978154e-04,
    1.05200903e-03,
    9.38353905e-03,
    4.88368072e-02,
    1.08759808e-01,
    1.09050778e00,
)
_GELU_BOUND = 14.0


def _const(value: float) -> tirx.Expr:
    return tirx.const(value, "float32")


def _within(least: float, most: float, x: tirx.Expr) -> tirx.Expr:
    # A comparison with NaN is false, and the second of two values is taken then.
    return tirx.max(_const(least), tirx.min(_const(most), x))


def _horner(coefficients: tuple[float, ...], x: tirx.Expr) -> tirx.Expr:
    total = _const(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _const(coefficient)
    return total


def _odd_ratio(
    fit: tuple[tuple[float, ...], tuple[float, ...]], bound: float, x: tirx.Expr
) -> tirx.Expr:
    clipped = _within(-bound, bound, x)
    square = clipped * clipped
    return clipped * _horner(fit[0], square) / _horner(fit[1], square)


def exp(x: tirx.Expr) -> tirx.Expr:
    """Return ``e ** x`` in float32 without a call.

    Results below the smallest normal number are zeros where the processor flushes denormals, as in
    packages. ``e ** -inf`` is 0, and beyond 88.72 the result is infinite.
    """
    clipped = _within(_LEAST, _MOST, x)
    n = tirx.floor(clipped * _const(_LOG2E) + _const(0.5))
    r = clipped - n * _const(_LN2_HIGH) - n * _const(_LN2_LOW)
    series = _horner(_EXP, r) * (r * r) + r + _const(1.0)
    # 2**n is put together in two halves, because n is between -150 and 128.
    whole = n.astype("int32")
    half = whole >> 1

    def power(exponent: tirx.Expr) -> tirx.Expr:
        return tirx.reinterpret("float32", (exponent + 127) << 23)

    return series * power(half) * power(whole - half)


def exp_below_0(x: tirx.Expr) -> tirx.Expr:
    """Return ``e ** x`` in float32 for ``x <= 0``, as softmax needs it: 15 operations, not 26.

    Results below the smallest normal number are zeros, or denormals down to ``e ** -87.7``.
    """
    clipped = tirx.max(_const(_LEAST_POWER), x)
    # Rounds to whole numbers, and makes the bits of the power on the way. TVM's simplifier takes
    # (a + b) - b for a, in floats too; it does not look through the bits.
    bits = tirx.reinterpret("int32", clipped * _const(_LOG2E) + _const(_ROUNDER))
    n = tirx.reinterpret("float32", bits) - _const(_ROUNDER)
    r = clipped - n * _const(_LN2_HIGH) - n * _const(_LN2_LOW)
    series = _horner(_EXP, r) * (r * r) + r + _const(1.0)
    return series * tirx.reinterpret("float32", bits << 23)


def exp2_below_0(x: tirx.Expr) -> tirx.Expr:
    """Return ``2 ** x`` in float32 for ``x <= 0``: 6 products, where `exp_below_0` has 12.

    Where a factor goes into something before, the logarithm of 2 can join it. Relative error 2e-7;
    results below the smallest normal number are zeros, or denormals down to ``2 ** -126.5``.
    """
    clipped = tirx.max(_const(_LEAST_EXPONENT), x)
    bits = tirx.reinterpret("int32", clipped + _const(_ROUNDER))
    r = clipped - (tirx.reinterpret("float32", bits) - _const(_ROUNDER))
    series = _horner((*_EXP2, 1.0), r)
    return series * tirx.reinterpret("float32", bits << 23)


def mantissa_and_exponent(x: tirx.Expr) -> tuple[tirx.Expr, tirx.Expr]:
    """Return m in float32, from the root of 1/2 to that of 2, and n in int32: ``m 2**n = x``.

    ``x`` is normal and positive; of all that lies below, the smallest normal number is taken, and
    of what is infinite or NaN something finite.
    """
    bits = tirx.max(tirx.const(_NORMAL, "int32"), tirx.reinterpret("int32", x))
    n = (bits - tirx.const(_ROOT_HALF, "int32")) >> 23
    return tirx.reinterpret("float32", bits - (n << 23)), n


def log(x: tirx.Expr) -> tirx.Expr:
    """Return the natural logarithm in float32 without a call, within 2 ulp (Cephes' logf).

    That of 0 is -inf, of what is negative NaN; of a denormal, -inf where the processor takes it for
    0, as in packages, else that of the smallest normal number. ``log(2) = 0.693147``.
    """
    mantissa, n = mantissa_and_exponent(x)
    power = n.astype("float32")
    f = mantissa - _const(1.0)
    square = f * f
    rest = f * square * _horner(_LOG, f) + power * _const(_LN2_LOW) - square * _const(0.5)
    value = f + rest + power * _const(_LN2_HIGH)
    nan = tirx.reinterpret("float32", tirx.const(_NAN, "int32"))
    below = tirx.Select(x.equal(_const(0.0)), _const(-math.inf), nan)
    return tirx.Select(x > 0, tirx.Select(x < _const(math.inf), value, x), below)


def is_number(x: tirx.Expr) -> tirx.Expr:
    """Say whether a float32 is no NaN.

    TVM's simplifier takes ``x == x`` for true, in floats too; it does not look through the bits.
    """
    size = tirx.reinterpret("int32", x) & tirx.const(0x7FFFFFFF, "int32")
    return size <= tirx.const(0x7F800000, "int32")


def sigmoid(x: tirx.Expr) -> tirx.Expr:
    """Return ``1 / (1 + e ** -x)``."""
    return _const(1.0) / (_const(1.0) + exp(-x))


def erf(x: tirx.Expr) -> tirx.Expr:
    """Return the error function in float32 without a call; 1 and -1 beyond 4."""
    return _odd_ratio(_ERF, _ERF_BOUND, x)


def tanh(x: tirx.Expr) -> tirx.Expr:
    """Return the hyperbolic tangent in float32 without a call; 1 and -1 beyond 9."""
    return _odd_ratio(_TANH, _TANH_BOUND, x)


def _squared(x: tirx.Expr) -> tirx.Expr:
    """Return the square of an expression that is written once.

    Written twice it doubles with each square, and LLVM makes slower loops of what is left of it:
    behind a product by halves gelu took 40 us instead of 7.
    """
    own = tirx.Var("x", "float32")
    return tirx.Let(own, x, own * own)


def gelu(x: tirx.Expr) -> tirx.Expr:
    """Return ``x (1 + erf(x / sqrt 2)) / 2`` (Hendrycks and Gimpel 2016): one division, no erf.

    ``max(x, 0) - |x| / P(|x|)**8``, in the manner of Abramowitz and Stegun 7.1.28; off by at most
    3e-7. NaN for minus infinity, as the formula and onnxruntime have it. ``gelu(1) = 0.841345``.
    """
    own = tirx.Var("x", "float32")
    size = tirx.Var("size", "float32")
    power = _horner(_GELU, size)
    for _ in range(3):
        power = _squared(power)
    # Not the maximum of x and 0, which would be a number for minus infinity.
    value = own - tirx.min(own, _const(0.0)) - size / power
    return tirx.Let(own, x, tirx.Let(size, tirx.min(_const(_GELU_BOUND), tirx.abs(own)), value))


def sign(x: tirx.Expr) -> tirx.Expr:
    """Return 1, -1, or ``x`` where that is a zero or NaN."""
    return tirx.Select(x > 0, _const(1.0), tirx.Select(x < 0, _const(-1.0), x))


def _elementwise(name: str, function: Callable[[tirx.Expr], tirx.Expr]) -> Callable[..., te.Tensor]:
    return lambda x: te.compute(x.shape, lambda *i: function(x[i]), name=name)


def _legalize(
    make: Callable[..., te.Tensor], hint: str, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    if str(call.ty.dtype) != "float32":
        return default_legalization(bb, call)
    return bb.call_te(make, call.args[0], primfunc_name_hint=hint)


def _bound(
    least: tirx.Expr | None, most: tirx.Expr | None, x: te.Tensor, *, name: str
) -> te.Tensor:
    """Return ``x`` bounded; a NaN stays one, because the bound comes first. See `exp`."""

    def element(*i: tirx.Var) -> tirx.Expr:
        value = x[i] if most is None else tirx.min(most, x[i])
        return value if least is None else tirx.max(least, value)

    return te.compute(x.shape, element, name=name)


def _is_float(call: relax.Call) -> bool:
    return "float" in str(call.ty.dtype)


def _legalize_relu(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    if not _is_float(call):
        return default_legalization(bb, call)
    zero = tirx.const(0.0, str(call.ty.dtype))
    make = partial(_bound, zero, None, name="relu")
    return bb.call_te(make, call.args[0], primfunc_name_hint="relu")


def _legalize_clip(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    data, least, most = call.args
    if not _is_float(call):
        return default_legalization(bb, call)
    bounds = [tirx.const(float(bound.value), str(call.ty.dtype)) for bound in (least, most)]
    return bb.call_te(partial(_bound, *bounds, name="clip"), data, primfunc_name_hint="clip")


def _legalize_extremum(
    extremum: Callable[[tirx.Expr, tirx.Expr], te.Tensor],
    hint: str,
    bb: relax.BlockBuilder,
    call: relax.Call,
) -> relax.Expr:
    """Legalize a maximum or minimum, a constant first. See `exp`."""
    left, right = call.args
    if not is_constant(right) or is_constant(left) or not _is_float(call):
        return default_legalization(bb, call)
    return bb.call_te(extremum, right, left, primfunc_name_hint=hint)


ELEMENTARY_RULES: dict[str, Callable[[relax.BlockBuilder, relax.Call], relax.Expr]] = {
    "relax.nn.relu": _legalize_relu,
    "relax.clip": _legalize_clip,
    "relax.maximum": partial(_legalize_extremum, topi.maximum, "maximum"),
    "relax.minimum": partial(_legalize_extremum, topi.minimum, "minimum"),
    "relax.exp": partial(_legalize, _elementwise("exp", exp), "exp"),
    "relax.log": partial(_legalize, _elementwise("log", log), "log"),
    "relax.sigmoid": partial(_legalize, _elementwise("sigmoid", sigmoid), "sigmoid"),
    "relax.nn.silu": partial(_legalize, _elementwise("silu", lambda x: x * sigmoid(x)), "silu"),
    "relax.erf": partial(_legalize, _elementwise("erf", erf), "erf"),
    "relax.tanh": partial(_legalize, _elementwise("tanh", tanh), "tanh"),
    "relax.sign": partial(_legalize, _elementwise("sign", sign), "sign"),
    "relax.nn.gelu": partial(_legalize, _elementwise("gelu", gelu), "gelu"),
}
"""Operator name → lowering, for ``relax.transform.LegalizeOps``."""
