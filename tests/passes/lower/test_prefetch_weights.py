"""Requests for weights: which loops get them, and for what."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax, sym
from tvm.script import tirx as T  # noqa: N812
from tvm_ffi import structural_walk

from hone import pipeline
from hone.passes.lower.prefetch_weights import PrefetchWeights
from hone.targets.schedule.boxes import substituted
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


@T.prim_func(s_tir=True)
def halves(w: T.Buffer((144,), "float16"), y: T.Buffer((48,), "float16")):
    for c in T.serial(3, annotations={"hone.prefetch": 80}):
        y[T.Ramp(0, 1, 16)] = y[T.Ramp(0, 1, 16)] + w[T.Ramp(c * 48, 1, 16)]
        y[T.Ramp(16, 1, 16)] = y[T.Ramp(16, 1, 16)] + w[T.Ramp(c * 48 + 16, 1, 16)]
        y[T.Ramp(32, 1, 16)] = y[T.Ramp(32, 1, 16)] + w[T.Ramp(c * 48 + 32, 1, 16)]


def test_vectors_of_16_bits_that_share_a_line_are_requested_once() -> None:
    module = tvm.IRModule({"main": halves.with_attr("global_symbol", "main")})
    after = PrefetchWeights()(module)["main"]
    found: list[str] = []

    def note(call: tvm.ir.Call) -> None:
        if call.op == tvm.ir.Op.get("tirx.address_of"):
            found.append(str(call.args[0].indices[0]))

    structural_walk(after.body, ((tvm.ir.Call, note),))
    assert found == ["c * 48 + 80", "c * 48 + 32 + 80"]


# Three passes over tiles of four steps of two vectors: a line of each step, half a tile in a pass.
@T.prim_func(s_tir=True)
def tiles(x: T.Buffer((12,)), w: T.Buffer((256,)), y: T.Buffer((192,))):
    for k, p in T.grid(2, 3):
        for c in T.serial(4, annotations={"hone.prefetch_tile": [128, 3, 2]}):
            for v in T.unroll(2):
                at: T.let[T.int32] = k * 96 + p * 32 + v * 16
                y[T.Ramp(at, 1, 16)] = (
                    y[T.Ramp(at, 1, 16)]
                    + T.Broadcast(x[p * 4 + c], 16) * w[T.Ramp(k * 128 + c * 32 + v * 16, 1, 16)]
                )


def test_the_next_tile_is_requested_in_parts_during_the_passes_over_one() -> None:
    module = tvm.IRModule({"main": tiles.with_attr("global_symbol", "main")})
    after = PrefetchWeights()(tvm.tirx.transform.UnrollLoop()(module))["main"]
    found: list[tvm.tirx.Expr] = []

    def note(call: tvm.ir.Call) -> None:
        if call.op == tvm.ir.Op.get("tirx.address_of"):
            found.append(call.args[0].indices[0])

    loops: list[tvm.tirx.Var] = []
    structural_walk(after.body, ((tvm.tirx.For, lambda loop: loops.append(loop.loop_var)),))
    structural_walk(after.body, ((tvm.ir.Call, note),))
    (index,) = found
    names = {str(variable.name): variable for variable in loops}

    def asked(k: int, p: int, c: int) -> int:
        values = {"k": k, "p": p, "c": c}
        return int(
            analyzer.simplify(
                substituted(
                    index,
                    list(names.values()),
                    [tvm.tirx.const(values[name], "int32") for name in names],
                )
            )
        )

    analyzer = sym.Analyzer()
    for k in range(2):
        lines = [asked(k, p, c) for p in range(3) for c in range(4)]
        assert lines[:8] == list(range(k * 128 + 128, k * 128 + 256, 16)), "the next tile, once"
        assert all(k * 128 <= at < k * 128 + 128 for at in lines[8:]), "then what is read anyway"


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
