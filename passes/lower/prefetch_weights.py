"""Requests the weights that a kernel reads next while it computes with those that it has.

Rewrites loops that a schedule marked. With `PREFETCH` every vector that the loop reads from a
tensor of which it writes nothing is requested so many elements before it is needed. With
`PREFETCH_TILE`, ``[elements, passes, into]``, the loop reads one tile of weights in each of so many
passes, and the tile behind it is requested during them, a part in each pass, so that the stream
from memory never rests: all of it in the first pass would be more than memory gives.

A processor follows a stream by itself, but only to the end of a page. Runs on lowered host
functions, before `PromoteAccumulators`. Numerics: exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tvm
from tvm import sym, tirx
from tvm.ir.expr import TensorLoad
from tvm_ffi import structural_equal, structural_map, structural_walk

from hone.targets.schedule.blocks import LINE_BYTES, PREFETCH, PREFETCH_TILE

# Locality of LLVM's intrinsic: into the first level.
FIRST_LEVEL = 3


def line_of(tensor: tirx.Buffer) -> int:
    """Return the elements of a line of a cache, which one request brings: 16 of float32."""
    return LINE_BYTES // int(tvm.runtime.DataType(str(tensor.dtype)).itemsize)


def first_of_lines(loads: Sequence[TensorLoad]) -> list[TensorLoad]:
    """Return one of the vectors that begin within a line's length of one before, and the others.

    Two vectors of 16 elements of 16 bits, one behind the other, are one request.
    """
    analyzer = sym.Analyzer()
    kept: list[TensorLoad] = []

    def near(load: TensorLoad, other: TensorLoad) -> bool:
        if not load.source.same_as(other.source):
            return False
        apart = analyzer.simplify(load.indices[0].base - other.indices[0].base)
        return isinstance(apart, tirx.IntImm) and 0 <= int(apart) < line_of(load.source)

    for load in loads:
        if not any(near(load, other) for other in kept):
            kept.append(load)
    return kept


def streams(body: tirx.Stmt) -> list[TensorLoad]:
    """Return the vectors that a loop reads and does not write, each once."""
    found: list[TensorLoad] = []
    written: list[tirx.Buffer] = []

    def note(load: TensorLoad) -> None:
        is_vector = len(load.indices) == 1 and isinstance(load.indices[0], tirx.Ramp)
        if is_vector and not any(structural_equal(load, other) for other in found):
            found.append(load)

    structural_walk(
        body,
        ((TensorLoad, note), (tirx.BufferStore, lambda store: written.append(store.buffer))),
    )
    return [load for load in found if not any(load.source.same_as(own) for own in written)]


def request(
    tensor: tirx.Buffer, at: Sequence[tirx.Expr], locality: int, *, write: bool = False
) -> tirx.Stmt:
    """Return the request for the line of an element of a tensor.

    Parameters
    ----------
    tensor : Buffer
        What holds it.
    at : sequence of Expr
        Indices of the element; it may lie beyond the end.
    locality : int
        Of LLVM's ``llvm.prefetch``: 3 brings the line into the first level, 2 into the second.
    write : bool
        Whether the line will be written: it is then taken from other cores.
    """
    place = tirx.address_of(tirx.BufferLoad(tensor, list(at)))
    # The last one says that it is data.
    hints = [tirx.const(value, "int32") for value in (int(write), locality, 1)]
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", place, *hints))


def enclosing_loops(body: tirx.Stmt, loop: tirx.For) -> list[tirx.For]:
    """Return the loops around a loop, the innermost first."""
    found: list[tuple[int, tirx.For]] = []

    def note(other: tirx.For) -> None:
        inside: list[tirx.For] = []
        structural_walk(other.body, ((tirx.For, inside.append),))
        if any(inner.loop_var.same_as(loop.loop_var) for inner in inside):
            found.append((len(inside), other))

    structural_walk(body, ((tirx.For, note),))
    return [other for _, other in sorted(found, key=lambda row: row[0])]


def _counter(loops: Sequence[tirx.For]) -> tirx.Expr:
    """Return how many turns of nested loops, the innermost first, are done."""
    count = tirx.const(0, "int32")
    for loop in reversed(loops):
        count = count * int(loop.extent) + loop.loop_var
    return count


def _tile_requests(
    body: tirx.Stmt, loop: tirx.For, elements: int, passes: int, locality: int
) -> list[tirx.Stmt]:
    """Return the requests for a part of the next tile of weights, for each turn of the loop.

    With 2 vectors in a turn and 7 passes the first pass requests the first half of the tile, a
    line in each turn, the second pass the other half; later ones ask for what they read anyway.
    """
    read = streams(loop.body)
    first = read[0].indices[0]
    step = len(read) * int(first.lanes)
    around = enclosing_loops(body, loop)
    inner = [loop]
    while math.prod(int(each.extent) for each in inner) * step < elements:
        inner.append(around.pop(0))
    outer: list[tirx.For] = []
    while math.prod(int(each.extent) for each in outer) < passes:
        outer.append(around.pop(0))

    def start(variable: tirx.Var) -> tirx.Expr:
        gone = any(variable.same_as(each.loop_var) for each in (*inner, *outer))
        return tirx.const(0, "int32") if gone else variable

    lines = -(-step // line_of(read[0].source))
    stride = step // lines
    at_once = -(-lines // passes)
    following = structural_map(first.base, (tirx.Var, start)) + elements
    requests = []
    for index in range(at_once):
        part = _counter(outer) * at_once + index
        at = following + part * (elements // lines) + _counter(inner) * stride
        if passes * at_once > lines:
            at = tirx.Select(part < lines, at, first.base)
        requests.append(request(read[0].source, [at], locality))
    return requests


@tirx.transform.prim_func_pass(opt_level=0)
class PrefetchWeights:
    """Request what marked loops read, before they need it."""

    def transform_function(
        self,
        func: tirx.PrimFunc,
        _module: tvm.IRModule,
        _context: tvm.transform.PassContext,
    ) -> tirx.PrimFunc:
        """Return the function with requests in its marked loops."""

        def fetch(loop: tirx.For) -> tirx.For:
            annotations = dict(loop.annotations)
            distance = annotations.pop(PREFETCH, None)
            tile = annotations.pop(PREFETCH_TILE, None)
            if distance is not None:
                requests = [
                    request(load.source, [load.indices[0].base + distance], FIRST_LEVEL)
                    for load in first_of_lines(streams(loop.body))
                ]
            elif tile is not None:
                requests = _tile_requests(func.body, loop, *(int(number) for number in tile))
            else:
                return loop
            return tirx.For(
                loop.loop_var,
                loop.min,
                loop.extent,
                loop.kind,
                tirx.SeqStmt([loop.body, *requests]) if requests else loop.body,
                loop.thread_binding,
                annotations,
            )

        return func.with_body(structural_map(func.body, (tirx.For, fetch)))
