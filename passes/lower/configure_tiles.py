"""Configures AMX tiles around the loops that use them.

Rewrites loops with the annotation `CONFIGURE`: each thread that runs iterations of the loop loads
the configuration of its tiles before and releases them afterwards. Runs on host functions, before
parallel loops become functions of their own. Numerics: exact.

A processor has no tiles until they are configured, and a thread keeps its configuration, which
the kernel saves with the thread's registers as long as it is not released.
"""

from __future__ import annotations

import tvm
from tvm import tirx

from hone.targets.tile_intrinsics import CONFIGURE, instruction
from hone.targets.tile_product import tile_configuration


def _within_tiles(body: tirx.Stmt, rows: int, groups: int, left_tiles: int) -> tirx.Stmt:
    """Return a statement with its tiles configured before it and released after it."""
    content = tile_configuration(rows, groups, left_tiles)
    words = [content[at : at + 4] for at in range(0, len(content), 4)]
    buffer = tirx.decl_buffer((len(words),), "int32", "tile_configuration")
    stores = [
        tirx.BufferStore(buffer, tirx.const(int.from_bytes(word, "little"), "int32"), [at])
        for at, word in enumerate(words)
    ]
    return tirx.SeqStmt(
        [
            tirx.AllocBuffer(buffer, {"disable_lower_builtin": tirx.IntImm("int32", 1)}),
            *stores,
            tirx.Evaluate(instruction("ldtilecfg", buffer.data)),
            body,
            tirx.Evaluate(instruction("tilerelease")),
        ]
    )


def _loop(statement: tirx.For) -> tirx.Stmt:
    numbers = statement.annotations.get(CONFIGURE)
    notes = {key: value for key, value in statement.annotations.items() if key != CONFIGURE}
    parallel = statement.kind == tirx.ForKind.PARALLEL
    body = _rewrite(statement.body)
    if numbers is not None and parallel:
        body = _within_tiles(body, *(int(number) for number in numbers))
    loop = tirx.For(
        statement.loop_var,
        statement.min,
        statement.extent,
        statement.kind,
        body,
        statement.thread_binding,
        notes,
        statement.step,
    )
    if numbers is None or parallel:
        return loop
    return _within_tiles(loop, *(int(number) for number in numbers))


def _rewrite(statement: tirx.Stmt) -> tirx.Stmt:
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([_rewrite(part) for part in statement.seq])
    if isinstance(statement, tirx.For):
        return _loop(statement)
    if isinstance(statement, tirx.AttrStmt):
        return tirx.AttrStmt(
            statement.node, statement.attr_key, statement.value, _rewrite(statement.body)
        )
    if isinstance(statement, tirx.IfThenElse):
        return tirx.IfThenElse(
            statement.condition,
            _rewrite(statement.then_case),
            None if statement.else_case is None else _rewrite(statement.else_case),
        )
    return statement


def _uses_tiles(statement: tirx.Stmt) -> bool:
    """Say whether a loop with the annotation is where `_rewrite` looks for one."""
    if isinstance(statement, tirx.SeqStmt):
        return any(_uses_tiles(part) for part in statement.seq)
    if isinstance(statement, tirx.For):
        return CONFIGURE in statement.annotations or _uses_tiles(statement.body)
    if isinstance(statement, tirx.AttrStmt):
        return _uses_tiles(statement.body)
    if isinstance(statement, tirx.IfThenElse):
        parts = [statement.then_case, statement.else_case]
        return any(part is not None and _uses_tiles(part) for part in parts)
    return False


@tirx.transform.prim_func_pass(opt_level=0)
class ConfigureTiles:
    """Load and release the tile configuration around annotated loops."""

    def transform_function(
        self,
        func: tirx.PrimFunc,
        _module: tvm.IRModule,
        _context: tvm.transform.PassContext,
    ) -> tirx.PrimFunc:
        """Return the function with its tiles configured; the function itself where it has none."""
        return func.with_body(_rewrite(func.body)) if _uses_tiles(func.body) else func
