"""Requests the residual that is added to a register tile while the tile is summed.

A tile of 14 pixels and two vectors reads 28 lines of a residual when its sums are done, far apart:
from memory they take as long as a third of the sums, and nothing follows such a stream by itself.
Rewrites loops of sums that a schedule marked with `PREFETCH_RESIDUAL`: each turn requests a line of
what the next statement, the epilogue, reads of the function's arguments for each pixel. All at once
would fill the queue of the core's misses.

Runs on scheduled functions, where the epilogue's loops still say what it reads. Numerics: exact.
"""

from __future__ import annotations

import math

import tvm
from tvm import s_tir, tirx
from tvm.ir.expr import TensorLoad
from tvm.tirx.buffer import is_buffer_var
from tvm_ffi import structural_map, structural_walk

from hone.targets.schedule.blocks import LINE_BYTES, PREFETCH_RESIDUAL
from hone.targets.schedule.boxes import substituted

from .prefetch_weights import FIRST_LEVEL, request


def _arguments(func: tirx.PrimFunc) -> list[tirx.Buffer]:
    """Return the tensors that a function, or one that `RawKernels` rewrote, is given."""
    found = [parameter for parameter in func.params if is_buffer_var(parameter)]

    def note(statement: tirx.DeclBuffer) -> None:
        if any(statement.data.same_as(parameter) for parameter in func.params):
            found.append(statement.buffer)

    structural_walk(func.body, ((tirx.DeclBuffer, note),))
    return found


def _chain(statement: tirx.Stmt) -> tuple[list[tirx.For], tirx.Stmt]:
    """Return the loops around a statement, the outermost first, and what they repeat."""
    loops = []
    while isinstance(statement, tirx.For):
        loops.append(statement)
        statement = statement.body
    return loops, statement


def _uses(expressions: list[tirx.Expr], variable: tirx.Var) -> bool:
    found: list[tirx.Var] = []
    for expression in expressions:
        structural_walk(expression, ((tirx.Var, found.append),))
    return any(variable.same_as(each) for each in found)


def _loads(epilogue: tirx.Stmt, arguments: list[tirx.Buffer]) -> list[TensorLoad]:
    """Return what an epilogue loads of arguments in vectors of its own for each pixel."""
    loops, realize = _chain(epilogue)
    if not isinstance(realize, s_tir.SBlockRealize) or len(loops) < 3:
        return []
    axes = [axis.var for axis in realize.block.iter_vars]
    found: list[TensorLoad] = []

    def note(load: TensorLoad) -> None:
        if not any(load.source.same_as(argument) for argument in arguments):
            return
        indices = [substituted(index, axes, list(realize.iter_values)) for index in load.indices]
        of_pixels = any(
            int(loop.extent) > 1 and _uses(indices, loop.loop_var) for loop in loops[:-2]
        )
        if of_pixels and _uses(indices[-1:], loops[-1].loop_var):
            found.append(tirx.BufferLoad(load.source, indices))

    structural_walk(realize.block.body, ((TensorLoad, note),))
    return found


def _lines(load: TensorLoad, loops: list[tirx.For]) -> tuple[int, int]:
    """Return how many lines of a residual a tile reads for each pixel, and how many elements each.

    The last two loops are those of its vectors and lanes.
    """
    elements = LINE_BYTES // tvm.runtime.DataType(str(load.source.dtype)).itemsize
    channels = int(loops[-2].extent) * int(loops[-1].extent)
    return -(-channels // elements), elements


def _place(load: TensorLoad, loops: list[tirx.For], number: tirx.Expr) -> list[tirx.Expr]:
    """Return where the tile's line of a number begins; lines behind the last one are pixels beyond.

    With two lines for each pixel line 5 is the second one of pixel 2.
    """
    count, elements = _lines(load, loops)
    lanes = int(loops[-1].extent)
    offset = number % count * elements
    pixel = number // count
    values = [offset // lanes, offset % lanes]
    for position in range(len(loops) - 3, 0, -1):
        extent = int(loops[position].extent)
        values.insert(0, pixel % extent)
        pixel = pixel // extent
    values.insert(0, pixel)
    return [substituted(index, [loop.loop_var for loop in loops], values) for index in load.indices]


def _requests(
    load: TensorLoad, tile: list[tirx.For], around: list[tirx.For], loop: tirx.For, first: int
) -> list[tirx.Stmt]:
    """Return a turn's requests: from the ``first`` turn on each asks for the next line."""
    zero = tirx.const(0, str(loop.loop_var.ty.dtype))
    lines = math.prod(int(each.extent) for each in tile[:-2]) * _lines(load, tile)[0]
    done, passes = zero, 1
    for each in around:
        done = done * int(each.extent) + each.loop_var
        passes *= int(each.extent)
    share = -(-lines // passes)
    turns = int(loop.extent)
    at_once = -(-share // (turns - first))
    turn = loop.loop_var
    if first:
        turn = tirx.max(turn - first, zero)
    if (turns - first) * at_once > share:
        turn = tirx.min(turn, zero + (share - 1) // at_once)
    numbers = [done * share + turn * at_once + index for index in range(at_once)]
    return [request(load, _place(load, tile, number), FIRST_LEVEL) for number in numbers]


@tirx.transform.prim_func_pass(opt_level=0)
class PrefetchResidual:
    """Request residuals in marked loops."""

    def transform_function(
        self,
        func: tirx.PrimFunc,
        _module: tvm.IRModule,
        _context: tvm.transform.PassContext,
    ) -> tirx.PrimFunc:
        """Return the function with requests in its marked loops."""
        arguments = _arguments(func)

        def fetch(sequence: tirx.SeqStmt) -> tirx.SeqStmt:
            parts = list(sequence.seq)
            for position, epilogue in enumerate(parts[1:]):
                around, _ = _chain(parts[position])
                marked = next((x for x in around if PREFETCH_RESIDUAL in x.annotations), None)
                if marked is not None:
                    parts[position] = asking(parts[position], marked, epilogue)
            return tirx.SeqStmt(parts)

        def asking(sums: tirx.Stmt, marked: tirx.For, epilogue: tirx.Stmt) -> tirx.Stmt:
            loops, _ = _chain(sums)
            around = loops[: next(i for i, loop in enumerate(loops) if loop.same_as(marked))]
            tile, _ = _chain(epilogue)
            first = int(marked.annotations[PREFETCH_RESIDUAL])
            requests = [
                each
                for load in _loads(epilogue, arguments)
                for each in _requests(load, tile, around, marked, first)
            ]
            inner = tirx.SeqStmt([marked.body, *requests]) if requests else marked.body
            annotations = {k: v for k, v in marked.annotations.items() if k != PREFETCH_RESIDUAL}
            for loop in (marked, *reversed(around)):
                inner = tirx.For(
                    loop.loop_var,
                    loop.min,
                    loop.extent,
                    loop.kind,
                    inner,
                    loop.thread_binding,
                    annotations if loop.same_as(marked) else loop.annotations,
                )
            return inner

        return func.with_body(structural_map(func.body, (tirx.SeqStmt, fetch)))
