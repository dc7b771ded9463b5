"""Lowers exp, erf, tanh and what is built of them to polynomials that vectorize.

Rewrites ``relax.exp``, ``relax.erf``, ``relax.tanh``, ``relax.sigmoid``, ``relax.nn.silu`` and
``relax.nn.gelu`` in float32; LLVM would call the C library once for each element. Writes
``relax.nn.relu``, ``relax.clip`` and extrema with constants so that a NaN stays one, as in
onnxruntime. Runs at legalization. Numerics: relative error of exp at most 3e-7, absolute error of
erf and tanh at most 5e-7 (tested over the whole range against float64).
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
# Beyond these the float32 result would be denormal or infinite.
_LEAST, _MOST = -87.33654, 88.72283


def exp(x: tirx.Expr) -> tirx.Expr:
    """Return ``e ** x`` in float32 without a call.

    Results below the smallest normal number come out as that number, results above the largest
    as 3.4028e38.
    """

    def const(value: float) -> tirx.Expr:
        return tirx.const(value, "float32")

    # A comparison with NaN is false, and the second of two values is taken then.
    clipped = tirx.max(const(_LEAST), tirx.min(const(_MOST), x))
    n = tirx.floor(clipped * const(_LOG2E) + const(0.5))
    r = clipped - n * const(_LN2_HIGH) - n * const(_LN2_LOW)
    polynomial = const(_EXP[0])
    for coefficient in _EXP[1:]:
        polynomial = polynomial * r + const(coefficient)
    series = polynomial * (r * r) + r + const(1.0)
    # 2**n is put together in two halves, because n may be 128.
    whole = n.astype("int32")
    half = whole >> 1

    def power(exponent: tirx.Expr) -> tirx.Expr:
        return tirx.reinterpret("float32", (exponent + 127) << 23)

    return series * power(half) * power(whole - half)


def sigmoid(x: tirx.Expr) -> tirx.Expr:
    """Return ``1 / (1 + e ** -x)``."""
    one = tirx.const(1.0, "float32")
    return one / (one + exp(-x))


def _gelu(x: te.Tensor) -> te.Tensor:
    """Return ``x (1 + erf(x / sqrt 2)) / 2`` (Hendrycks and Gimpel 2016)."""
    scaled = te.compute(
        x.shape, lambda *i: x[i] * tirx.const(math.sqrt(0.5), "float32"), name="gelu_scaled"
    )
    error = topi.fast_erf(scaled)
    half = tirx.const(0.5, "float32")
    return te.compute(x.shape, lambda *i: half * x[i] * (error[i] + 1.0), name="gelu")


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
    "relax.sigmoid": partial(_legalize, _elementwise("sigmoid", sigmoid), "sigmoid"),
    "relax.nn.silu": partial(_legalize, _elementwise("silu", lambda x: x * sigmoid(x)), "silu"),
    "relax.erf": partial(_legalize, topi.fast_erf, "erf"),
    "relax.tanh": partial(_legalize, topi.fast_tanh, "tanh"),
    "relax.nn.gelu": partial(_legalize, _gelu, "gelu"),
}
"""Operator name → lowering, for ``relax.transform.LegalizeOps``."""
