"""Intrinsics of TIR for pairs of bfloat16: products summed in float32, and rounding.

TVM's LLVM code generator has no bfloat16 type. The instructions are therefore functions in LLVM
IR, which `definitions` writes and the code generator links and inlines; in TIR they are operators
that take pairs as int32 words and rounded values as uint16 bits. Importing this module registers
the operators and their lowering. Numerics: `round_bits` to nearest, ties to even; a sum rounds as
its instruction does (vdpbf16ps and bfdot round after each product or after each pair).
"""

from __future__ import annotations

from collections.abc import Iterable

import tvm
from tvm import te, tirx

from .half_dot import HalfDot

_ROUND = "tirx.hone_round_bf16"
_PREFIX = "hone_"

# (vector lengths, name of the LLVM intrinsic with its width in bits)
_FORMS = {
    HalfDot.VDPBF16PS: ((4, 8, 16), "llvm.x86.avx512bf16.dpbf16ps.{bits}"),
    HalfDot.BFDOT: ((2, 4), "llvm.aarch64.neon.bfdot.v{lanes}f32.v{pairs}bf16"),
}


def pair_name(dot: HalfDot) -> str:
    """Return the operator that `pair_product` calls."""
    return f"tirx.hone_{dot}"


def add_name(dot: HalfDot) -> str:
    """Return the operator that `pair_sum` calls."""
    return f"tirx.hone_{dot}_add"


def round_bits(value: tirx.Expr) -> tirx.Expr:
    """Return the bits (uint16) of a float32 rounded to bfloat16, by the processor's instruction."""
    return tirx.call_intrin("uint16", _ROUND, value)


def pair_product(dot: HalfDot, left: tirx.Expr, right: tirx.Expr) -> tirx.Expr:
    """Return ``left[0] × right[0] + left[1] × right[1]`` of two pairs, each an int32 word."""
    return tirx.call_intrin("float32", pair_name(dot), left, right)


def pair_sum(dot: HalfDot) -> te.CommReducer:
    """Return the reduction that adds what `pair_product` returns, in one instruction."""
    return te.comm_reducer(
        lambda total, pair: tirx.call_intrin("float32", add_name(dot), total, pair),
        lambda dtype: tirx.const(0, dtype),
        name="pair_sum",
    )


def _dtype(base: str, lanes: int) -> str:
    return base if lanes == 1 else f"{base}x{lanes}"


def _lanes(call: tvm.ir.Call) -> int:
    return int(tvm.runtime.DataType(str(call.ty.dtype)).lanes)


def _lower_round(call: tvm.ir.Call) -> tvm.ir.Call:
    lanes = _lanes(call)
    return tirx.call_pure_extern(
        _dtype("uint16", lanes), f"{_PREFIX}round_bf16_{lanes}", call.args[0]
    )


def _call_dot(dot: HalfDot, lanes: int, total: tirx.Expr, pair: tvm.ir.Call) -> tvm.ir.Call:
    return tirx.call_pure_extern(
        _dtype("float32", lanes), f"{_PREFIX}{dot}_{lanes}", total, *pair.args
    )


def _zeros(lanes: int) -> tirx.Expr:
    zero = tirx.const(0, "float32")
    return zero if lanes == 1 else tirx.Broadcast(zero, lanes)


def register_operator(name: str, lower: object) -> None:
    """Register an operator of TIR that is pure, may be vectorized and is lowered by a function."""
    tvm.ir._ffi_api.RegisterOp(name, "See hone.targets.half_intrinsics.")
    tvm.ir.register_op_attr(name, "TCallEffectKind", 2)  # pure
    tvm.ir.register_op_attr(name, "TVectorizable", True)
    tvm.ir.register_op_attr(name, "TScriptPrinterName", name.partition(".")[2])
    tvm.ir.register_op_attr(name, "llvm.FLowerIntrinsic", lower)


def _register() -> None:
    register_operator(_ROUND, _lower_round)
    for dot in _FORMS:

        def product(call: tvm.ir.Call, dot: HalfDot = dot) -> tvm.ir.Call:
            lanes = _lanes(call)
            return _call_dot(dot, lanes, _zeros(lanes), call)

        def add(call: tvm.ir.Call, dot: HalfDot = dot) -> tirx.Expr:
            total, pair = call.args
            if isinstance(pair, tvm.ir.Call) and pair.op.same_as(tvm.ir.Op.get(pair_name(dot))):
                return _call_dot(dot, _lanes(call), total, pair)
            return total + pair

        register_operator(pair_name(dot), product)
        register_operator(add_name(dot), add)


_register()


def _vector(base: str, lanes: int) -> str:
    return base if lanes == 1 else f"<{lanes} x {base}>"


def _define_round(lanes: int) -> str:
    single, half, bits = (_vector(base, lanes) for base in ("float", "bfloat", "i16"))
    return f"""
define {bits} @{_PREFIX}round_bf16_{lanes}({single} %value) {{
  %rounded = fptrunc {single} %value to {half}
  %bits = bitcast {half} %rounded to {bits}
  ret {bits} %bits
}}
"""


def _define_dot(dot: HalfDot, lanes: int) -> str:
    lengths, pattern = _FORMS[dot]
    if lanes not in lengths:
        raise ValueError(f"{dot} has vectors of {lengths} lanes, not of {lanes}")
    name = pattern.format(bits=32 * lanes, lanes=lanes, pairs=2 * lanes)
    single, word, half = _vector("float", lanes), _vector("i32", lanes), f"<{2 * lanes} x bfloat>"
    return f"""
declare {single} @{name}({single}, {half}, {half})
define {single} @{_PREFIX}{dot}_{lanes}({single} %total, {word} %left, {word} %right) {{
  %a = bitcast {word} %left to {half}
  %b = bitcast {word} %right to {half}
  %sum = call {single} @{name}({single} %total, {half} %a, {half} %b)
  ret {single} %sum
}}
"""


def _define_scalar_dot(dot: HalfDot) -> str:
    """Return a lane's sum as the first of a vector's, for loops that no template scheduled."""
    lanes = _FORMS[dot][0][0]
    single, word = _vector("float", lanes), _vector("i32", lanes)
    return f"""
define float @{_PREFIX}{dot}_1(float %total, i32 %left, i32 %right) {{
  %t = insertelement {single} zeroinitializer, float %total, i32 0
  %a = insertelement {word} zeroinitializer, i32 %left, i32 0
  %b = insertelement {word} zeroinitializer, i32 %right, i32 0
  %sums = call {single} @{_PREFIX}{dot}_{lanes}({single} %t, {word} %a, {word} %b)
  %sum = extractelement {single} %sums, i32 0
  ret float %sum
}}
"""


def definitions(calls: Iterable[tvm.ir.Call]) -> str:
    """Return LLVM IR of the functions that calls of this module's operators are lowered to.

    Parameters
    ----------
    calls : iterable of Call
        Of a TIR function's body; calls of other operators are passed over.

    Returns
    -------
    str
        Empty where nothing is needed; each function once.
    """
    parts: dict[str, None] = {}
    rounding = tvm.ir.Op.get(_ROUND)
    dots = {dot: [tvm.ir.Op.get(n) for n in (pair_name(dot), add_name(dot))] for dot in _FORMS}
    for call in calls:
        if call.op.same_as(rounding):
            parts[_define_round(_lanes(call))] = None
        for dot, operators in dots.items():
            if any(call.op.same_as(operator) for operator in operators):
                lanes = _lanes(call)
                parts[_define_dot(dot, _FORMS[dot][0][0] if lanes == 1 else lanes)] = None
                if lanes == 1:
                    parts[_define_scalar_dot(dot)] = None
    return "".join(parts)
