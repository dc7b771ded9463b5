"""Ends loops along the keys of an attention at the last key that a block of rows sees.

Rewrites loops with the annotation `KEYS`, whose turns depend on the loops with the annotation
`ROWS` around them; see `hone.targets.schedule.attention`. Runs on lowered host functions, where
nothing asks for constant extents any more. Numerics: exact, but a key that is not read hides its
NaN too.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm_ffi import structural_walk

from hone.targets.schedule.attention import KEYS, ROWS


def _turns(loop: tirx.For, row: tirx.Expr) -> tirx.Expr:
    """Return how many turns a loop makes for the block of rows that begins with a row."""
    wide, turns, more = (int(number) for number in loop.annotations[KEYS])
    keys = tirx.max(row + more, 0)
    needed = tirx.truncdiv(keys + (wide - 1), wide) * turns
    return tirx.min(loop.extent, needed.astype(str(loop.loop_var.ty.dtype)))


def _rewrite(statement: tirx.Stmt, row: tirx.Expr) -> tirx.Stmt:
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([_rewrite(part, row) for part in statement.seq])
    if isinstance(statement, tirx.AttrStmt):
        body = _rewrite(statement.body, row)
        return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, body)
    if isinstance(statement, tirx.IfThenElse):
        return tirx.IfThenElse(
            statement.condition,
            _rewrite(statement.then_case, row),
            None if statement.else_case is None else _rewrite(statement.else_case, row),
        )
    if not isinstance(statement, tirx.For):
        return statement
    notes = dict(statement.annotations)
    extent = _turns(statement, row) if KEYS in notes else statement.extent
    if ROWS in notes:
        count, step = (int(number) for number in notes[ROWS])
        # Some loops of lowered functions count in int64.
        row = row + tirx.truncmod(statement.loop_var.astype("int32"), count) * step
    return tirx.For(
        statement.loop_var,
        statement.min,
        extent,
        statement.kind,
        _rewrite(statement.body, row),
        statement.thread_binding,
        {key: value for key, value in notes.items() if key not in (KEYS, ROWS)},
        statement.step,
    )


@tirx.transform.prim_func_pass(opt_level=0)
class SkipHiddenKeys:
    """End annotated loops where nothing is left to be seen."""

    def transform_function(
        self,
        func: tirx.PrimFunc,
        _module: tvm.IRModule,
        _context: tvm.transform.PassContext,
    ) -> tirx.PrimFunc:
        """Return the function with shorter loops; the function itself where none is marked."""
        marked: list[tirx.For] = []

        def note(loop: tirx.For) -> None:
            if KEYS in loop.annotations:
                marked.append(loop)

        structural_walk(func.body, ((tirx.For, note),))
        if not marked:
            return func
        return func.with_body(_rewrite(func.body, tirx.const(0, "int32")))
