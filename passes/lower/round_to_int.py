"""Rounds float32 to int32 in one instruction where the processor has it.

Rewrites ``int32(round(x))`` in functions for x86, which LLVM makes a rounding and a truncating
conversion, to an operator of `hone.targets.word_intrinsics`. Runs on lowered host functions, before
`ImportIntrinsics`. Numerics: exact, ties to even as before; what does not fit int32 was no number
before either.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm_ffi import structural_map

from hone.targets.word_intrinsics import round_to_int

_ROUND = tvm.ir.Op.get("tirx.round")


@tirx.transform.prim_func_pass(opt_level=0)
class RoundToInt:
    """Let conversions round by themselves."""

    def transform_function(
        self,
        func: tirx.PrimFunc,
        _module: tvm.IRModule,
        _context: tvm.transform.PassContext,
    ) -> tirx.PrimFunc:
        """Return the function with one operator for a rounding and a conversion."""
        target = func.attrs.get("target") if func.attrs else None
        if target is None or "x86_64" not in str(target.attrs.get("mtriple", "")):
            return func

        def convert(cast: tirx.Cast) -> tirx.Expr:
            value = cast.value
            rounds = isinstance(value, tvm.ir.Call) and value.op.same_as(_ROUND)
            if not rounds or not str(cast.ty.dtype).startswith("int32"):
                return cast
            if not str(value.ty.dtype).startswith("float32"):
                return cast
            return round_to_int(value.args[0])

        return func.with_body(structural_map(func.body, (tirx.Cast, convert)))
