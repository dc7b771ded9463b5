"""Intrinsics of TIR for pairs of int16, summed in int32, for arithmetic modulo 2^32 and rounding.

A pair is one int32 word. TVM tells LLVM that sums of int32 never overflow, so whatever does, on
purpose, is a function in LLVM IR (`definitions`), which the code generator links and inlines.
Importing this module registers the operators and their lowering. Numerics: exact, modulo 2^32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum

import tvm
from tvm import te, tirx

from .half_intrinsics import register_operator
from .integer_dot import IntegerDot

_PREFIX = "hone_"


class WordDot(StrEnum):
    """How a processor adds the products of a pair of int16 to an int32."""

    VPDPWSSD = "vpdpwssd"
    """AVX512-VNNI or AVX-VNNI: 32 products in a 512-bit vector, added in the same instruction."""
    PMADDWD = "pmaddwd"
    """SSE2, AVX2 and AVX-512BW: as many products, and an addition."""


_OF_BYTES = {
    IntegerDot.VPDPBUSD: WordDot.VPDPWSSD,
    IntegerDot.TDPBUSD: WordDot.VPDPWSSD,
    IntegerDot.VPMADDWD: WordDot.PMADDWD,
}

_LANES = (4, 8, 16)
_VPDPWSSD = {bits: f"llvm.x86.avx512.vpdpwssd.{bits}" for bits in (128, 256, 512)}
_PMADDWD = {
    128: "llvm.x86.sse2.pmadd.wd",
    256: "llvm.x86.avx2.pmadd.wd",
    512: "llvm.x86.avx512.pmaddw.d.512",
}

_ROUND = "tirx.hone_round_to_int"
_WRAPPING = {"add": "add", "sub": "sub", "mul": "mul"}


def word_dot_of(dot: IntegerDot | None) -> WordDot | None:
    """Return the instruction beside a processor's instruction for bytes, None where none is known.

    Parameters
    ----------
    dot : IntegerDot or None
        See `hone.targets.integer_dot.integer_dot_of`.
    """
    return None if dot is None else _OF_BYTES.get(dot)


def _product_name(dot: WordDot) -> str:
    return f"tirx.hone_{dot}"


def _add_name(dot: WordDot) -> str:
    return f"tirx.hone_{dot}_add"


def _wrap_name(operation: str) -> str:
    return f"tirx.hone_wrapping_{operation}"


def word_product(dot: WordDot, left: tirx.Expr, right: tirx.Expr) -> tirx.Expr:
    """Return ``left[0] × right[0] + left[1] × right[1]`` of two pairs, each an int32 word."""
    return tirx.call_intrin("int32", _product_name(dot), left, right)


def word_sum(dot: WordDot) -> te.CommReducer:
    """Return the reduction modulo 2^32 that adds what `word_product` returns."""
    return te.comm_reducer(
        lambda total, pair: tirx.call_intrin("int32", _add_name(dot), total, pair),
        lambda dtype: tirx.const(0, dtype),
        name="word_sum",
    )


def wrapping_add(left: tirx.Expr, right: tirx.Expr) -> tirx.Expr:
    """Return the sum of two int32 modulo 2^32."""
    return tirx.call_intrin("int32", _wrap_name("add"), left, right)


def wrapping_subtract(left: tirx.Expr, right: tirx.Expr) -> tirx.Expr:
    """Return the difference of two int32 modulo 2^32."""
    return tirx.call_intrin("int32", _wrap_name("sub"), left, right)


def wrapping_multiply(value: tirx.Expr, factor: int) -> tirx.Expr:
    """Return an int32 times a constant, modulo 2^32."""
    wrapped = (factor + 2**31) % 2**32 - 2**31
    return tirx.call_intrin("int32", _wrap_name("mul"), value, tirx.const(wrapped, "int32"))


def round_to_int(value: tirx.Expr) -> tirx.Expr:
    """Return float32 as int32, rounded to nearest, ties to even: in the mode of the processor."""
    lanes = int(tvm.runtime.DataType(str(value.ty.dtype)).lanes)
    return tirx.call_intrin(_dtype(lanes), _ROUND, value)


def _lanes(call: tvm.ir.Call) -> int:
    return int(tvm.runtime.DataType(str(call.ty.dtype)).lanes)


def _dtype(lanes: int) -> str:
    return "int32" if lanes == 1 else f"int32x{lanes}"


def _zeros(lanes: int) -> tirx.Expr:
    zero = tirx.const(0, "int32")
    return zero if lanes == 1 else tirx.Broadcast(zero, lanes)


def _function(name: str, lanes: int, *arguments: tirx.Expr) -> tirx.Expr:
    return tirx.call_pure_extern(_dtype(lanes), f"{_PREFIX}{name}_{lanes}", *arguments)


def _lower_wrapping(operation: str) -> Callable[[tvm.ir.Call], tirx.Expr]:
    return lambda call: _function(f"wrapping_{operation}", _lanes(call), *call.args)


def _lower_product(dot: WordDot) -> Callable[[tvm.ir.Call], tirx.Expr]:
    return lambda call: _function(dot, _lanes(call), _zeros(_lanes(call)), *call.args)


def _lower_add(dot: WordDot) -> Callable[[tvm.ir.Call], tirx.Expr]:
    product = tvm.ir.Op.get(_product_name(dot))

    def lower(call: tvm.ir.Call) -> tirx.Expr:
        total, pair = call.args
        if isinstance(pair, tvm.ir.Call) and pair.op.same_as(product):
            return _function(dot, _lanes(call), total, *pair.args)
        return wrapping_add(total, pair)

    return lower


def _lower_round(call: tvm.ir.Call) -> tirx.Expr:
    return _function("round_to_int", _lanes(call), *call.args)


def _register() -> None:
    register_operator(_ROUND, _lower_round)
    for operation in _WRAPPING:
        register_operator(_wrap_name(operation), _lower_wrapping(operation))
    for dot in WordDot:
        register_operator(_product_name(dot), _lower_product(dot))
        register_operator(_add_name(dot), _lower_add(dot))


_register()


def _vector(base: str, lanes: int) -> str:
    return base if lanes == 1 else f"<{lanes} x {base}>"


def _define_wrapping(operation: str, lanes: int) -> str:
    vector = _vector("i32", lanes)
    return f"""
define {vector} @{_PREFIX}wrapping_{operation}_{lanes}({vector} %left, {vector} %right) {{
  %result = {_WRAPPING[operation]} {vector} %left, %right
  ret {vector} %result
}}
"""


def _define_round(lanes: int) -> str:
    name = "llvm.lrint.i32.f32" if lanes == 1 else f"llvm.lrint.v{lanes}i32.v{lanes}f32"
    whole, single = _vector("i32", lanes), _vector("float", lanes)
    return f"""
declare {whole} @{name}({single})
define {whole} @{_PREFIX}round_to_int_{lanes}({single} %value) {{
  %rounded = call {whole} @{name}({single} %value)
  ret {whole} %rounded
}}
"""


def _splat(value: int, lanes: int) -> str:
    return str(value) if lanes == 1 else f"<{', '.join([f'i32 {value}'] * lanes)}>"


def _define_dot(dot: WordDot, lanes: int) -> str:
    vector, halves = _vector("i32", lanes), _vector("i16", 2 * lanes)
    head = f"""
define {vector} @{_PREFIX}{dot}_{lanes}({vector} %total, {vector} %left, {vector} %right) {{"""
    if lanes not in _LANES:
        # One lane, or the rest of some channels that no vector divides: in plain arithmetic.
        bits = _splat(16, lanes)
        return f"""{head}
  %a = shl {vector} %left, {bits}
  %b = shl {vector} %right, {bits}
  %al = ashr {vector} %a, {bits}
  %bl = ashr {vector} %b, {bits}
  %ah = ashr {vector} %left, {bits}
  %bh = ashr {vector} %right, {bits}
  %low = mul {vector} %al, %bl
  %high = mul {vector} %ah, %bh
  %pair = add {vector} %low, %high
  %sum = add {vector} %total, %pair
  ret {vector} %sum
}}
"""
    if dot is WordDot.VPDPWSSD:
        name = _VPDPWSSD[32 * lanes]
        return f"""
declare {vector} @{name}({vector}, {vector}, {vector}){head}
  %sum = call {vector} @{name}({vector} %total, {vector} %left, {vector} %right)
  ret {vector} %sum
}}
"""
    name = _PMADDWD[32 * lanes]
    return f"""
declare {vector} @{name}({halves}, {halves}){head}
  %a = bitcast {vector} %left to {halves}
  %b = bitcast {vector} %right to {halves}
  %pair = call {vector} @{name}({halves} %a, {halves} %b)
  %sum = add {vector} %total, %pair
  ret {vector} %sum
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
    wrapping = {name: tvm.ir.Op.get(_wrap_name(name)) for name in _WRAPPING}
    dots = {
        dot: [tvm.ir.Op.get(n) for n in (_product_name(dot), _add_name(dot))] for dot in WordDot
    }
    rounding = tvm.ir.Op.get(_ROUND)
    for call in calls:
        lanes = 0
        if call.op.same_as(rounding):
            parts[_define_round(_lanes(call))] = None
        for name, operator in wrapping.items():
            if call.op.same_as(operator):
                parts[_define_wrapping(name, _lanes(call))] = None
        for dot, operators in dots.items():
            if any(call.op.same_as(operator) for operator in operators):
                lanes = _lanes(call)
                parts[_define_dot(dot, lanes)] = None
                # What is added may be no product, as in a sum that two loops share.
                parts[_define_wrapping("add", lanes)] = None
    return "".join(parts)
