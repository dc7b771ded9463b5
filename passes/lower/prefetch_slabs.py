"""Requests the slab of weights that a kernel reads next while it computes with the one it has.

Rewrites loops that a schedule marked with `PREFETCH_SLAB`, ``[elements, passes]``: they stand one
behind the other, and each reads parts of one slab of so many elements in so many passes. Their
turns request the slab behind it, each turn an equal part, so that the stream from memory never
rests. Slabs lie one behind the other from the start of the tensor. Runs on lowered host functions,
before `PromoteAccumulators`. Numerics: exact.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm_ffi import structural_map, structural_walk

from hone.targets.schedule.blocks import PREFETCH_SLAB

from .prefetch_weights import enclosing_loops, line_of, request, streams

# Locality of LLVM's intrinsic: into the second level.
SECOND_LEVEL = 2


def _marked(body: tirx.Stmt) -> list[tirx.For]:
    """Return the marked loops of a function, in program order."""
    found: list[tirx.For] = []

    def note(loop: tirx.For) -> None:
        if PREFETCH_SLAB in loop.annotations:
            found.append(loop)

    structural_walk(body, ((tirx.For, note),))
    return found


def _requests(body: tirx.Stmt, loop: tirx.For, place: int, loops: int) -> list[tirx.Stmt]:
    """Return the requests of a turn of one of so many loops that share a slab.

    Worked number: 3 x 256 vectors of 16 are 768 lines; six loops of 128 turns request one each.
    """
    elements, passes = (int(number) for number in loop.annotations[PREFETCH_SLAB])
    stream = streams(loop.body)[0]
    turns, parts = int(loop.extent), loops * passes
    line = line_of(stream.source)
    at_once = -(-elements // (line * parts * turns))
    outer = enclosing_loops(body, loop)[0].loop_var if passes > 1 else 0

    def start(variable: tirx.Var) -> tirx.Expr:
        return tirx.const(0, "int32") if variable.same_as(loop.loop_var) else variable

    first = structural_map(stream.indices[0].base, (tirx.Var, start))
    slab = tirx.floordiv(first, elements) * elements + elements
    turn = (outer + place * passes) * turns + loop.loop_var
    return [
        request(stream.source, [slab + (turn * at_once + index) * line], SECOND_LEVEL)
        for index in range(at_once)
    ]


@tirx.transform.prim_func_pass(opt_level=0)
class PrefetchSlabs:
    """Request the next slab of weights in loops that share one."""

    def transform_function(
        self,
        func: tirx.PrimFunc,
        _module: tvm.IRModule,
        _context: tvm.transform.PassContext,
    ) -> tirx.PrimFunc:
        """Return the function with requests in its marked loops."""
        marked = _marked(func.body)

        def fetch(loop: tirx.For) -> tirx.For:
            if PREFETCH_SLAB not in loop.annotations:
                return loop
            place = next(i for i, other in enumerate(marked) if other.same_as(loop))
            requests = _requests(func.body, loop, place, len(marked))
            annotations = {k: v for k, v in loop.annotations.items() if k != PREFETCH_SLAB}
            return tirx.For(
                loop.loop_var,
                loop.min,
                loop.extent,
                loop.kind,
                tirx.SeqStmt([loop.body, *requests]),
                loop.thread_binding,
                annotations,
            )

        return func.with_body(structural_map(func.body, (tirx.For, fetch)))
