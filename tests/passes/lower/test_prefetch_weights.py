"""Requests for weights: which loops get them, and for what."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.script import tirx as T  # noqa: N812

from hone import pipeline
from hone.passes.lower.prefetch_weights import PrefetchWeights
from hone.targets.schedule.machine import Machine, prefetch_distance
from hone.targets.target import resolve


@T.prim_func(s_tir=True)
def before(x: T.Buffer((3,)), w: T.Buffer((48,)), y: T.Buffer((16,))):
    for c in T.serial(3, annotations={"hone.prefetch": 80}):
        y[T.Ramp(0, 1, 16)] = y[T.Ramp(0, 1, 16)] + T.Broadcast(x[c], 16) * w[T.Ramp(c * 16, 1, 16)]


@T.prim_func(s_tir=True)
def expected(x: T.Buffer((3,)), w: T.Buffer((48,)), y: T.Buffer((16,))):
    for c in range(3):
        y[T.Ramp(0, 1, 16)] = y[T.Ramp(0, 1, 16)] + T.Broadcast(x[c], 16) * w[T.Ramp(c * 16, 1, 16)]
        T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(w[c * 16 + 80]), 0, 3, 1)


@T.prim_func(s_tir=True)
def unmarked(w: T.Buffer((48,)), y: T.Buffer((16,))):
    for c in range(3):
        y[T.Ramp(0, 1, 16)] = y[T.Ramp(0, 1, 16)] + w[T.Ramp(c * 16, 1, 16)]


def test_a_marked_loop_requests_what_it_reads_and_does_not_write() -> None:
    after = PrefetchWeights()(tvm.IRModule({"main": before.with_attr("global_symbol", "main")}))[
        "main"
    ]
    tvm.ir.assert_structural_equal(after, expected.with_attr("global_symbol", "main"))


def test_an_unmarked_loop_stays_as_it_is() -> None:
    module = tvm.IRModule({"main": unmarked})
    tvm.ir.assert_structural_equal(PrefetchWeights()(module), module)


def test_weights_are_requested_where_they_are_many_and_meet_few_rows() -> None:
    machine = Machine.of(resolve("x86-64-v3"), 2)
    many = machine.l2_bytes
    assert prefetch_distance(machine, rows=49, weight_bytes=many) * 4 == 32 * 1024
    assert prefetch_distance(machine, rows=56 * 56, weight_bytes=many) == 0
    assert prefetch_distance(machine, rows=1, weight_bytes=machine.l2_bytes // 2) == 0


def test_a_product_with_many_weights_asks_the_processor_for_them() -> None:
    target = resolve("x86-64-v3")
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 700), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            weight = relax.const(np.ones((700, 800), "float32"))
            result = builder.emit_output(relax.op.matmul(x, weight))
        builder.emit_func_output(result)
    lowered = pipeline.lower(builder.get(), target, threads=2)
    scheduled = pipeline.schedule(lowered, target, threads=2)
    executable = pipeline.build_executable(scheduled.module, target, threads=2)
    assert "prefetcht0" in executable.mod.imports[0].inspect_source("asm")
