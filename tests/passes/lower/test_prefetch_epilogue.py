"""Requests for what the end of a register tile touches: which lines, and in which kernels."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, sym
from tvm.script import tirx as T  # noqa: N812
from tvm_ffi import structural_walk

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.lower.prefetch_epilogue import PrefetchEpilogue
from hone.passes.lower.raw_kernels import RawKernels
from hone.targets.schedule.boxes import substituted
from hone.targets.target import resolve


# Two tiles of three pixels and two vectors: lines 0 to 5 of a tile, two of them for each pixel.
@T.prim_func(s_tir=True)
def tiles(x: T.Buffer((6, 20)), w: T.Buffer((20, 32)), r: T.Buffer((6, 64)), y: T.Buffer((6, 64))):
    T.func_attr({"tirx.noalias": True})
    sums = T.sblock_alloc_buffer((6, 64))
    for tile in range(2):
        for c in T.serial(20, annotations={"hone.prefetch_epilogue": [5, 2]}):
            for p, v in T.grid(3, 2):
                for lane in T.vectorized(16):
                    with T.sblock("sums"):
                        pixel = T.axis.spatial(6, tile * 3 + p)
                        k = T.axis.spatial(64, v * 16 + lane)
                        vc = T.axis.reduce(20, c)
                        sums[pixel, k] = sums[pixel, k] + x[pixel, vc] * w[vc, k]
        for p, v in T.grid(3, 2):
            for lane in T.vectorized(16):
                with T.sblock("end"):
                    pixel = T.axis.spatial(6, tile * 3 + p)
                    k = T.axis.spatial(64, v * 16 + lane)
                    y[pixel, k] = sums[pixel, k] + r[pixel, k] + w[0, k]


def _module(func: tvm.tirx.PrimFunc) -> tvm.IRModule:
    return tvm.IRModule({"main": func.with_attr("global_symbol", "main")})


def _asked(func: tvm.tirx.PrimFunc) -> list[tuple[str, tuple[tvm.tirx.Expr, ...], int]]:
    """Return tensor, indices and purpose (0 to read, 1 to write) of each request."""
    found: list[tuple[str, tuple[tvm.tirx.Expr, ...], int]] = []

    def note(call: tvm.ir.Call) -> None:
        if call.op == tvm.ir.Op.get("tirx.call_llvm_intrin"):
            load = call.args[1].args[0]
            found.append((str(load.source.name), tuple(load.indices), int(call.args[2])))

    structural_walk(func.body, ((tvm.ir.Call, note),))
    return found


def _loops(func: tvm.tirx.PrimFunc) -> dict[str, tvm.tirx.Var]:
    found: dict[str, tvm.tirx.Var] = {}

    def note(loop: tvm.tirx.For) -> None:
        found.setdefault(str(loop.loop_var.name), loop.loop_var)

    structural_walk(func.body, ((tvm.tirx.For, note),))
    return found


@pytest.mark.parametrize("raw", [False, True], ids=["tensors", "pointers"])
def test_lines_of_residual_and_result_are_requested_one_after_the_other(raw: bool) -> None:
    module = _module(tiles)
    func = apply(module, *([RawKernels()] if raw else []), PrefetchEpilogue())["main"]
    asked = _asked(func)
    assert {(name, write) for name, _, write in asked} == {("r", 0), ("y", 1)}, "no sums, no bias"
    loops, analyzer = _loops(func), sym.Analyzer()

    def line(at: tuple[tvm.tirx.Expr, ...], tile: int, c: int) -> tuple[int, ...]:
        names = {"tile": tile, "c": c}
        values = [tvm.tirx.const(value, str(loops[name].ty.dtype)) for name, value in names.items()]
        variables = [loops[name] for name in names]
        return tuple(int(analyzer.simplify(substituted(index, variables, values))) for index in at)

    for _, at, _ in asked:
        for tile in range(2):
            lines = [(tile * 3 + number // 2, number % 2 * 16) for number in range(6)]
            expected = [lines[0]] * 5 + [lines[min(turn // 2, 5)] for turn in range(15)]
            assert [line(at, tile, c) for c in range(20)] == expected


def test_the_mark_goes_and_an_unmarked_function_stays_as_it_is() -> None:
    after = PrefetchEpilogue()(_module(tiles))
    assert "hone.prefetch_epilogue" not in after.script()
    tvm.ir.assert_structural_equal(PrefetchEpilogue()(after), after)


def _residual_block(height: int, depth: int, channels: int, taps: int) -> tvm.IRModule:
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(channels, taps, taps, depth)).astype("float32")
    x = relax.Var("x", relax.TensorType((1, height, height, depth), "float32"))
    r = relax.Var("r", relax.TensorType((1, height, height, channels), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, r]):
        with builder.dataflow():
            y = relax.op.nn.conv2d(
                x,
                relax.const(weight, "float32"),
                padding=taps // 2,
                data_layout="NHWC",
                kernel_layout="OHWI",
            )
            y = builder.emit(relax.op.add(builder.emit(y), r))
            result = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(result)
    return builder.get()


def _assembly(target: str, module: tvm.IRModule) -> str:
    processor = resolve(target)
    lowered = pipeline.lower(module, processor, threads=2)
    scheduled = pipeline.schedule(lowered, processor, threads=2)
    executable = pipeline.build_executable(scheduled.module, processor, threads=2)
    return str(executable.mod.imports[0].inspect_source("asm"))


@pytest.mark.parametrize(
    ("target", "to_read", "to_write"),
    [("x86-64-v3", "prefetcht0", "prefetchw"), ("rpi4", "pldl1keep", "pstl1keep")],
)
@pytest.mark.parametrize(("height", "depth", "channels"), [(28, 24, 96), (53, 5, 24)])
def test_kernels_with_a_residual_ask_the_processor_for_both(
    target: str, to_read: str, to_write: str, height: int, depth: int, channels: int
) -> None:
    assembly = _assembly(target, _residual_block(height, depth, channels, 1))
    assert to_read in assembly
    assert to_write in assembly


@pytest.mark.parametrize(
    ("height", "depth", "channels", "taps"),
    [(7, 24, 96, 1), (28, 8, 96, 5)],
    ids=["the result stays in a core's cache", "long sums"],
)
def test_kernels_that_need_no_requests_get_none(
    height: int, depth: int, channels: int, taps: int
) -> None:
    assembly = _assembly("x86-64-v3", _residual_block(height, depth, channels, taps))
    assert "prefetch" not in assembly


@pytest.mark.parametrize(
    ("height", "depth", "channels"), [(28, 24, 96), (53, 5, 24), (41, 37, 41), (1, 64, 64)]
)
def test_requests_beyond_the_end_change_nothing(height: int, depth: int, channels: int) -> None:
    processor = resolve("host")
    module = _residual_block(height, depth, channels, 1)
    lowered = pipeline.lower(module, processor, threads=2)
    scheduled = pipeline.schedule(lowered, processor, threads=2)
    executable = pipeline.build_executable(scheduled.module, processor, threads=2)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(1, height, height, depth)).astype("float32")
    r = rng.normal(size=(1, height, height, channels)).astype("float32")
    run = relax.VirtualMachine(executable, tvm.cpu())["main"]
    result = run(tvm.runtime.tensor(x), tvm.runtime.tensor(r)).numpy()
    weight = np.random.default_rng(3).normal(size=(channels, 1, 1, depth)).astype("float32")
    expected = r.astype("float64") + x.astype("float64") @ weight[:, 0, 0].T.astype("float64")
    # 64 products of at most some 4 x 4 in float32, each rounded to 2**-24 of the sum.
    np.testing.assert_allclose(result, np.maximum(expected, 0), rtol=1e-4, atol=1e-4)
