"""Requests the weights that a kernel reads next while it computes with those that it has.

Rewrites loops that a schedule marked with `PREFETCH`: every vector that the loop reads from a
tensor of which it writes nothing is requested so many elements before it is needed. A processor
follows a stream by itself, but only to the end of a page. Runs on lowered host functions, before
`PromoteAccumulators`. Numerics: exact.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.ir.expr import TensorLoad
from tvm_ffi import structural_equal, structural_map, structural_walk

from hone.targets.schedule.blocks import PREFETCH


def _streams(body: tirx.Stmt) -> list[TensorLoad]:
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


def _request(load: TensorLoad, distance: tirx.Expr) -> tirx.Stmt:
    at = tirx.BufferLoad(load.source, [load.indices[0].base + distance])
    # To read, into the first level, data.
    hints = [tirx.const(value, "int32") for value in (0, 3, 1)]
    return tirx.Evaluate(
        tirx.call_llvm_intrin("void", "llvm.prefetch", tirx.address_of(at), *hints)
    )


def _fetch(loop: tirx.For) -> tirx.For:
    annotations = dict(loop.annotations)
    distance = annotations.pop(PREFETCH, None)
    if distance is None:
        return loop
    requests = [_request(load, distance) for load in _streams(loop.body)]
    return tirx.For(
        loop.loop_var,
        loop.min,
        loop.extent,
        loop.kind,
        tirx.SeqStmt([loop.body, *requests]) if requests else loop.body,
        loop.thread_binding,
        annotations,
    )


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
        return func.with_body(structural_map(func.body, (tirx.For, _fetch)))
