"""An intrinsic of TIR that adds two vectors on the units that multiply.

Some cores have units for additions beside those for multiply-adds (`Target.separate_adders`). A
kernel with more additions than products keeps both busy if it adds in both: ``value × 1 + term``
is the sum, rounded once, on the units that multiply. LLVM would make an addition of it; so it is an
instruction with a rounding mode of its own, which LLVM leaves as it stands. Importing this module
registers the operator and its lowering. Numerics: exact, the same as an addition.
"""

from __future__ import annotations

from collections.abc import Iterable

import tvm
from tvm import tirx

from .half_intrinsics import register_operator

SUM = "tirx.hone_sum_by_product"
"""The operator that `sum_by_product` calls."""
_FUNCTION = "hone_sum_by_product"

# Lanes of the only vectors that have the instruction; others are added as usual.
LANES = 16


def sum_by_product(value: tirx.Expr, term: tirx.Expr) -> tirx.Expr:
    """Return ``value + term`` in float32, by a multiply-add where it is a vector of 16 lanes."""
    return tirx.call_intrin("float32", SUM, value, term)


def _lower(call: tvm.ir.Call) -> tirx.Expr:
    dtype = str(call.ty.dtype)
    if int(tvm.runtime.DataType(dtype).lanes) != LANES:
        return call.args[0] + call.args[1]
    return tirx.call_pure_extern(dtype, _FUNCTION, *call.args)


register_operator(SUM, _lower)


def _definition() -> str:
    vector = f"<{LANES} x float>"
    ones = ", ".join(["float 1.0"] * LANES)
    # 8: to nearest, without exceptions.
    return f"""
declare {vector} @llvm.x86.avx512.vfmadd.ps.512({vector}, {vector}, {vector}, i32)
define {vector} @{_FUNCTION}({vector} %value, {vector} %term) {{
  %sum = call {vector} @llvm.x86.avx512.vfmadd.ps.512(
    {vector} %value, {vector} <{ones}>, {vector} %term, i32 8)
  ret {vector} %sum
}}
"""


def definitions(calls: Iterable[tvm.ir.Call]) -> str:
    """Return LLVM IR of the function that calls of this module's operator are lowered to.

    Parameters
    ----------
    calls : iterable of Call
        Of a TIR function's body; calls of other operators are passed over.

    Returns
    -------
    str
        Empty where nothing is needed.
    """
    operator = tvm.ir.Op.get(SUM)
    return (
        _definition()
        if any(
            call.op.same_as(operator)
            and int(tvm.runtime.DataType(str(call.ty.dtype)).lanes) == LANES
            for call in calls
        )
        else ""
    )
