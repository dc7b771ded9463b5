"""Requests for slabs of weights: loops that share one ask for the next, an equal part each."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T  # noqa: N812

from hone.passes.lower.prefetch_slabs import PrefetchSlabs


# Slabs of 12 vectors are read by two loops, each of which makes two passes of three turns.
@T.prim_func(s_tir=True)
def before(w: T.Buffer((1024,)), y: T.Buffer((64,))):
    for k in range(5):
        for p in range(2):
            for c in T.serial(3, annotations={"hone.prefetch_slab": [192, 2]}):
                y[T.Ramp(p * 16, 1, 16)] = (
                    y[T.Ramp(p * 16, 1, 16)] + w[T.Ramp(k * 192 + c * 16, 1, 16)]
                )
        for p in range(2):
            for c in T.serial(3, annotations={"hone.prefetch_slab": [192, 2]}):
                y[T.Ramp(p * 16 + 32, 1, 16)] = (
                    y[T.Ramp(p * 16 + 32, 1, 16)] + w[T.Ramp(k * 192 + c * 16 + 96, 1, 16)]
                )


@T.prim_func(s_tir=True)
def expected(w: T.Buffer((1024,)), y: T.Buffer((64,))):
    for k in range(5):
        for p in range(2):
            for c in range(3):
                y[T.Ramp(p * 16, 1, 16)] = (
                    y[T.Ramp(p * 16, 1, 16)] + w[T.Ramp(k * 192 + c * 16, 1, 16)]
                )
                T.call_llvm_intrin(
                    "void", "llvm.prefetch",
                    T.address_of(w[k * 192 // 192 * 192 + 192 + (p * 3 + c) * 16]), 0, 2, 1,
                )  # fmt: skip
        for p in range(2):
            for c in range(3):
                y[T.Ramp(p * 16 + 32, 1, 16)] = (
                    y[T.Ramp(p * 16 + 32, 1, 16)] + w[T.Ramp(k * 192 + c * 16 + 96, 1, 16)]
                )
                T.call_llvm_intrin(
                    "void", "llvm.prefetch",
                    T.address_of(w[(k * 192 + 96) // 192 * 192 + 192 + ((p + 2) * 3 + c) * 16]),
                    0, 2, 1,
                )  # fmt: skip


@T.prim_func(s_tir=True)
def unmarked(w: T.Buffer((48,)), y: T.Buffer((16,))):
    for c in range(3):
        y[T.Ramp(0, 1, 16)] = y[T.Ramp(0, 1, 16)] + w[T.Ramp(c * 16, 1, 16)]


def requested(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    return PrefetchSlabs()(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}))["main"]


def simplified(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.tirx.transform.StmtSimplify()(module)["main"]


def test_every_line_of_the_next_slab_is_requested_once_during_this_one() -> None:
    tvm.ir.assert_structural_equal(simplified(requested(before)), simplified(expected))


def test_an_unmarked_loop_stays_as_it_is() -> None:
    after = requested(unmarked)
    tvm.ir.assert_structural_equal(after, unmarked.with_attr("global_symbol", "main"))
