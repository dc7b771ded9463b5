"""The arithmetic of hone's integer kernels, as TIR expressions.

One specification for every target, so that host, board and numpy agree to the last bit.

**Requantize.** From an int32 accumulator to a level::

    level = round_half_even(clamp(float32(acc) × multiplier, low - zp, high - zp)) + zp

with ``float32(acc)`` rounded to nearest even and one float32 product. Clamping comes first: the
bounds are integers, so it commutes with rounding, and the conversion to int32 cannot overflow.
A float32 multiplier has 24 significant bits, as many as fixed-point multipliers of gemmlowp keep
in practice, and the steps are one instruction each on every vector unit (``vcvtdq2ps vmulps
vminps vmaxps vcvtps2dq``; ``scvtf fmul fmin fmax frintn fcvtzs``).

There is no float *addition*: LLVM contracts a product and a sum into one fused operation where the
processor has it (measured: 28% of results differ in the last bit), which would make the result
depend on the processor.

**Sum of two requantized tensors** (residuals). Both are brought to fixed point with `GUARD_BITS`
fractional bits, added as integers, and rounded once more, half up::

    fixed(a) = round_half_even(float32(a) × (multiplier × 2**GUARD_BITS))
    level    = clamp(((fixed(a) + fixed(b) + 2**(GUARD_BITS - 1)) >> GUARD_BITS) + zp, low, high)

which is off the real sum by at most 1/2 + 2**-GUARD_BITS levels. Whoever makes the multipliers
checks that no fixed-point term exceeds `FIXED_LIMIT`, so that the sum fits int32.

Worked number: acc = 1000, multiplier = 0.0125, zp = 3: 12.5 → 12 (tie, to even) → level 15. With a
residual of 10 levels times 0.25: 3200 + 640 = 3840 = 15.0 × 256 → level 18.

Source: Jacob et al., CVPR 2018, section 2.2, with the multiplier in float32 as in oneDNN and FBGEMM
instead of a fixed-point one.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr

GUARD_BITS = 8
FIXED_LIMIT = 1 << 30


def as_int32(value: Expr) -> Expr:
    """Convert a level to int32, in which all sums are taken."""
    return tirx.Cast("int32", value)


def real(value: Expr, multiplier: Expr) -> Expr:
    """Return ``float32(value) × multiplier``."""
    return tirx.Cast("float32", value) * multiplier


def _round(value: Expr) -> Expr:
    """Round half to even.

    ``tirx.round`` is the same instruction as ``tirx.nearbyint`` (tested on ties), and the only one
    of the two that TVM keeps in vectors: with the other, the whole expression becomes scalar code.
    """
    return tirx.round(value)


def requantize(
    acc: Expr, multiplier: Expr, *, zero_point: Expr, low: Expr, high: Expr, dtype: str
) -> Expr:
    """Return the level of an int32 accumulator. See the module."""
    least, most = tirx.Cast("float32", low - zero_point), tirx.Cast("float32", high - zero_point)
    steps = tirx.max(tirx.min(real(acc, multiplier), most), least)
    return tirx.Cast(dtype, tirx.Cast("int32", _round(steps)) + zero_point)


def fixed_point(value: Expr, multiplier: Expr) -> Expr:
    """Return an int32 with `GUARD_BITS` fractional bits, which the multiplier already carries."""
    return tirx.Cast("int32", _round(real(value, multiplier)))


def round_fixed_point(fixed: Expr, *, zero_point: Expr, low: Expr, high: Expr, dtype: str) -> Expr:
    """Return the level of a fixed-point sum. See the module."""
    half = tirx.const(1 << (GUARD_BITS - 1), "int32")
    level = ((fixed + half) >> tirx.const(GUARD_BITS, "int32")) + zero_point
    return tirx.Cast(dtype, tirx.max(tirx.min(level, high), low))


def quantize(value: Expr, inverse_scale: Expr, zero_point: Expr, *, dtype: str) -> Expr:
    """Return the level of a float32; NaN becomes the lowest level."""
    lowest = tirx.Cast("int32", tirx.min_value(dtype))
    highest = tirx.Cast("int32", tirx.max_value(dtype))
    least, most = (tirx.Cast("float32", bound - zero_point) for bound in (lowest, highest))
    # A comparison with NaN is false, so both answer with their second operand.
    steps = tirx.min(tirx.max(value * inverse_scale, least), most)
    return tirx.Cast(dtype, tirx.Cast("int32", _round(steps)) + zero_point)
