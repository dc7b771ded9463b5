"""Gives each function the LLVM IR of the intrinsics that it calls.

Rewrites host functions whose body calls an operator of `hone.targets.half_intrinsics`,
`hone.targets.word_intrinsics` or `hone.targets.adder_intrinsics`: the code generator links and
inlines what stands in ``pragma_import_llvm``. Runs just before ``LowerTVMBuiltin``, which is before
these operators are lowered. Numerics: exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import tvm
from tvm import tirx
from tvm.ir.expr import TensorLoad

from hone.targets import adder_intrinsics, half_intrinsics, word_intrinsics


def _expressions(statement: tirx.Stmt) -> Iterator[tirx.Expr]:
    """Yield what a statement stores, evaluates or binds; indices call no intrinsics."""
    if isinstance(statement, tirx.BufferStore | tirx.Bind | tirx.Evaluate):
        yield statement.value
    elif isinstance(statement, tirx.SeqStmt):
        for part in statement.seq:
            yield from _expressions(part)
    elif isinstance(statement, tirx.For | tirx.AttrStmt | tirx.While):
        yield from _expressions(statement.body)
    elif isinstance(statement, tirx.IfThenElse):
        yield from _expressions(statement.then_case)
        if statement.else_case is not None:
            yield from _expressions(statement.else_case)


def _calls(expression: tirx.Expr, seen: set[int]) -> Iterator[tvm.ir.Call]:
    """Yield the calls in an expression, shared ones once."""
    key = expression.__chandle__()
    if key in seen or isinstance(expression, TensorLoad):
        return
    seen.add(key)
    parts: list[tirx.Expr] = []
    if isinstance(expression, tvm.ir.Call):
        yield expression
        parts = list(expression.args)
    elif isinstance(expression, tirx.Select):
        parts = [expression.true_value, expression.false_value]
    elif isinstance(expression, tirx.Cast | tirx.Broadcast):
        parts = [expression.value]
    elif isinstance(expression, tirx.Let):
        parts = [expression.value, expression.body]
    elif hasattr(expression, "a") and hasattr(expression, "b"):
        parts = [expression.a, expression.b]
    for part in parts:
        yield from _calls(part, seen)


@tirx.transform.prim_func_pass(opt_level=0)
class ImportIntrinsics:
    """Attach the definitions of called intrinsics to a function."""

    def transform_function(
        self,
        func: tirx.PrimFunc,
        _module: tvm.IRModule,
        _context: tvm.transform.PassContext,
    ) -> tirx.PrimFunc:
        """Return the function with its imports, or the very same function."""
        seen: set[int] = set()
        calls = [call for value in _expressions(func.body) for call in _calls(value, seen)]
        text = "".join(
            module.definitions(calls)
            for module in (half_intrinsics, word_intrinsics, adder_intrinsics)
        )
        if not text:
            return func
        anywhere = tirx.IntImm("int32", 0)
        return func.with_body(
            tirx.AttrStmt(anywhere, "pragma_import_llvm", tvm.ir.StringImm(text), func.body)
        )
