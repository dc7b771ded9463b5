"""Requests what the end of a register tile reads and writes while the tile is summed.

A tile of 14 pixels and two vectors stores 28 lines when its sums are done, far apart, and reads as
many where a residual is added. From memory, or from the cache of another core, they take as long as
a third of the sums, and nothing follows such streams by itself. Rewrites loops of sums that a
schedule marked with `PREFETCH_EPILOGUE`: each turn requests a line of each tensor that the next
statement, the epilogue, reads or writes for each pixel. All at once would wait for each other.

Runs on scheduled functions, where the epilogue's loops still say what it does. Numerics: exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import tvm
from tvm import s_tir, tirx
from tvm.ir.expr import TensorLoad
from tvm.tirx.buffer import is_buffer_var
from tvm_ffi import structural_map, structural_walk

from hone.targets.schedule.blocks import LINE_BYTES, PREFETCH_EPILOGUE
from hone.targets.schedule.boxes import substituted

from .prefetch_weights import FIRST_LEVEL, request


@dataclass(frozen=True, kw_only=True)
class _Access:
    """A tensor that an epilogue touches for each pixel.

    Parameters
    ----------
    tensor : Buffer
        An argument of the function.
    indices : list of Expr
        In terms of the loops of the epilogue.
    write : bool
        Whether it is the result.
    """

    tensor: tirx.Buffer
    indices: list[tirx.Expr]
    write: bool


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


def _accesses(epilogue: tirx.Stmt, arguments: list[tirx.Buffer]) -> list[_Access]:
    """Return what an epilogue touches of arguments in vectors of its own for each pixel."""
    loops, realize = _chain(epilogue)
    if not isinstance(realize, s_tir.SBlockRealize) or len(loops) < 3:
        return []
    axes = [axis.var for axis in realize.block.iter_vars]
    found: list[_Access] = []

    def note(tensor: tirx.Buffer, at: list[tirx.Expr], *, write: bool) -> None:
        if not any(tensor.same_as(argument) for argument in arguments):
            return
        indices = [substituted(index, axes, list(realize.iter_values)) for index in at]
        of_pixels = any(
            int(loop.extent) > 1 and _uses(indices, loop.loop_var) for loop in loops[:-2]
        )
        if of_pixels and _uses(indices[-1:], loops[-1].loop_var):
            found.append(_Access(tensor=tensor, indices=indices, write=write))

    structural_walk(
        realize.block.body,
        (
            (TensorLoad, lambda load: note(load.source, list(load.indices), write=False)),
            (tirx.BufferStore, lambda to: note(to.buffer, list(to.indices), write=True)),
        ),
    )
    return found


def _lines(access: _Access, tile: list[tirx.For]) -> tuple[int, int]:
    """Return how many lines of a tensor a tile touches for each pixel, and their elements.

    The last two loops are those of its vectors and lanes.
    """
    elements = LINE_BYTES // tvm.runtime.DataType(str(access.tensor.dtype)).itemsize
    channels = int(tile[-2].extent) * int(tile[-1].extent)
    return -(-channels // elements), elements


def _place(access: _Access, tile: list[tirx.For], number: tirx.Expr) -> list[tirx.Expr]:
    """Return where the tile's line of a number begins; lines behind the last one are pixels beyond.

    With two lines for each pixel line 5 is the second one of pixel 2.
    """
    count, elements = _lines(access, tile)
    lanes = int(tile[-1].extent)
    offset = number % count * elements
    pixel = number // count
    values = [offset // lanes, offset % lanes]
    for loop in reversed(tile[1:-2]):
        values.insert(0, pixel % int(loop.extent))
        pixel = pixel // int(loop.extent)
    values.insert(0, pixel)
    return [
        substituted(index, [loop.loop_var for loop in tile], values) for index in access.indices
    ]


def _requests(access: _Access, tile: list[tirx.For], loop: tirx.For) -> list[tirx.Stmt]:
    """Return a turn's requests: from the marked turn on each group of turns asks for a line."""
    zero = tirx.const(0, str(loop.loop_var.ty.dtype))
    first, apart = (int(number) for number in loop.annotations[PREFETCH_EPILOGUE])
    lines = math.prod(int(each.extent) for each in tile[:-2]) * _lines(access, tile)[0]
    turns = int(loop.extent) - first
    at_once = -(-lines // (turns // apart))
    turn = loop.loop_var
    if first:
        turn = tirx.max(turn - first, zero)
    turn = turn // apart
    if turns > -(-lines // at_once) * apart:
        turn = tirx.min(turn, zero + (lines - 1) // at_once)
    numbers = [turn * at_once + index for index in range(at_once)]
    return [
        request(access.tensor, _place(access, tile, number), FIRST_LEVEL, write=access.write)
        for number in numbers
    ]


def _asking(
    sums: tirx.Stmt, marked: tirx.For, epilogue: tirx.Stmt, arguments: list[tirx.Buffer]
) -> tirx.Stmt:
    """Return a nest of loops whose marked one requests what the epilogue touches."""
    loops, _ = _chain(sums)
    around = loops[: next(i for i, loop in enumerate(loops) if loop.same_as(marked))]
    tile, _ = _chain(epilogue)
    requests = [
        each
        for access in _accesses(epilogue, arguments)
        for each in _requests(access, tile, marked)
    ]
    body = tirx.SeqStmt([marked.body, *requests]) if requests else marked.body
    for loop in (marked, *reversed(around)):
        body = tirx.For(
            loop.loop_var,
            loop.min,
            loop.extent,
            loop.kind,
            body,
            loop.thread_binding,
            {key: value for key, value in loop.annotations.items() if key != PREFETCH_EPILOGUE},
        )
    return body


@tirx.transform.prim_func_pass(opt_level=0)
class PrefetchEpilogue:
    """Request what epilogues touch in marked loops."""

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
                loops, _ = _chain(parts[position])
                marked = next((x for x in loops if PREFETCH_EPILOGUE in x.annotations), None)
                if marked is not None:
                    parts[position] = _asking(parts[position], marked, epilogue, arguments)
            return tirx.SeqStmt(parts)

        return func.with_body(structural_map(func.body, (tirx.SeqStmt, fetch)))
