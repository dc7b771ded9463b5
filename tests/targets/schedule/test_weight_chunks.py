"""Weights read in chunks: where the model takes them, and what the kernels compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm_ffi import structural_walk

from hone import pipeline
from hone.passes.lower.anchors import ANCHOR
from hone.passes.lower.conv2d import conv2d, pack_conv2d_weight
from hone.passes.lower.window import Window
from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import L2_BYTES_PER_CYCLE, Machine
from hone.targets.schedule.tile_model import Tile, choose_tile, chunk_of
from hone.targets.schedule.weight_chunks import (
    L1_SHARE,
    MOST_SUM_BYTES,
    WHOLE,
    chunk_cycles,
    pick_chunk,
)
from hone.targets.target import Target, resolve

AVX512 = Machine(
    lanes=16, accumulators=28, l1_bytes=48 << 10, l2_bytes=1 << 20, l3_bytes=32 << 20, threads=2
)
# Layers of ResNet-50: 3x3 of stride 2, then 1x1.
STRIDED = {"height": 7, "width": 7, "channels": 512, "depth": 512, "taps": 9}
REDUCING = {"height": 7, "width": 7, "channels": 512, "depth": 2048, "taps": 1}
WIDE = {"height": 14, "width": 14, "channels": 256, "depth": 1024, "taps": 1}


def chosen(machine: Machine, layer: dict[str, int]) -> tuple[Tile, int]:
    tile = choose_tile(machine, **layer, chunks=True)
    return tile, chunk_of(machine, tile, **layer)


def test_few_pixels_take_chunks_and_a_tile_of_weights_beyond_l2() -> None:
    two = Tile(rows=1, columns=7, vectors=2)
    assert choose_tile(AVX512, **STRIDED).vectors == 1  # two take 590 kB of 1 MiB
    assert chosen(AVX512, STRIDED) == (two, 128)
    assert chosen(AVX512, REDUCING) == (two, 128)


def test_rows_of_14_pixels_wait_for_nothing_and_stay_whole() -> None:
    tile, chunk = chosen(AVX512, WIDE)
    assert (tile, chunk) == (choose_tile(AVX512, **WIDE), WHOLE)


def test_weights_that_stay_in_a_cache_are_read_whole() -> None:
    assert AVX512.holding(AVX512.l3_bytes // 2).l3_holds
    assert not AVX512.holding(AVX512.l3_bytes // 2 + 1).l3_holds
    for bytes_of_model in (AVX512.l2_bytes // 2, AVX512.l3_bytes // 2):
        assert chosen(AVX512.holding(bytes_of_model), REDUCING)[1] == WHOLE
    assert AVX512.holding(1).weight_bytes_per_cycle == 2 * L2_BYTES_PER_CYCLE


def test_costs_are_those_of_the_docstring() -> None:
    layer = {"passes": 7, "taps": 1, "depth": 2048, "weight_bytes": 4 << 20}
    costs = chunk_cycles(AVX512, sums=14, vectors=2, **layer)
    assert costs[WHOLE] == pytest.approx(11_878, abs=1)
    assert costs[128] == 16 * 7 * 46
    # This chunk and the next one leave a quarter of L1 to the input.
    assert max(costs) * 128 <= L1_SHARE * AVX512.l1_bytes < 2 * max(costs) * 128


def test_sums_beyond_the_stack_and_single_passes_are_never_cut() -> None:
    layer = {"taps": 9, "depth": 512, "weight_bytes": 8 << 20}
    sums = MOST_SUM_BYTES // (AVX512.lanes * 4) // 28 * 28
    assert set(chunk_cycles(AVX512, sums=28, vectors=2, passes=sums // 28, **layer)) > {32}
    assert set(chunk_cycles(AVX512, sums=28, vectors=2, passes=sums // 28 + 1, **layer)) == {WHOLE}
    assert set(chunk_cycles(AVX512, sums=28, vectors=2, passes=1, **layer)) == {WHOLE}


def test_tuning_may_take_another_chunk_and_the_noted_one_comes_first() -> None:
    asked: dict[str, tuple[str, ...]] = {}
    layer = {"sums": 14, "vectors": 2, "passes": 7, "taps": 1, "depth": 2048}
    machine = replace(AVX512, asked=asked)
    assert pick_chunk(machine, 64, **layer, weight_bytes=4 << 20) == 64
    assert asked["chunk"] == ("64", "whole", "128", "32")
    other = replace(AVX512, decided=(("chunk", "whole"),))
    assert pick_chunk(other, 64, **layer, weight_bytes=4 << 20) == WHOLE
    # A note of another partition, in which every task has a single pass.
    assert pick_chunk(AVX512, 64, **{**layer, "passes": 1}, weight_bytes=4 << 20) == WHOLE


@dataclass(frozen=True, kw_only=True)
class Case:
    """A convolution that is summed in chunks, whatever the model says."""

    id: str
    image: tuple[int, int, int, int]
    channels: int
    taps: tuple[int, int]
    chunk: int
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    residual: bool = False


CASES = [
    Case(id="stride two", image=(1, 13, 11, 48), channels=128, taps=(3, 3), chunk=24,
         strides=(2, 2), padding=(1, 1, 1, 1)),
    Case(id="one tap, residual", image=(1, 7, 7, 96), channels=64, taps=(1, 1), chunk=32,
         residual=True),
    Case(id="batch of three, odd channels", image=(3, 7, 13, 34), channels=61, taps=(2, 1),
         chunk=17, padding=(1, 0, 0, 0), residual=True),
    Case(id="many channels", image=(1, 7, 7, 272), channels=509, taps=(1, 1), chunk=68),
]  # fmt: skip


def _oracle(case: Case, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Convolve in float64, tap by tap; weight is [K, R, S, C]."""
    top, left, bottom, right = case.padding
    wide = np.pad(data.astype("float64"), ((0, 0), (top, bottom), (left, right), (0, 0)))
    height = (wide.shape[1] - case.taps[0]) // case.strides[0] + 1
    width = (wide.shape[2] - case.taps[1]) // case.strides[1] + 1
    sums = np.zeros((len(data), height, width, len(weight)))
    for r in range(case.taps[0]):
        for s in range(case.taps[1]):
            window = wide[:, r :: case.strides[0], s :: case.strides[1]][:, :height, :width]
            sums += window @ weight[:, r, s].astype("float64").T
    return sums


def _module(case: Case, weight: np.ndarray, bias: np.ndarray, target: Target) -> tvm.IRModule:
    """Return the layer with bias, residual and relu, its sums noted to be cut."""
    window = Window(
        shape=case.image,
        taps=case.taps,
        strides=case.strides,
        padding=case.padding,
        dilation=(1, 1),
    )
    height, width = window.output
    machine = Machine.of(target, 2)
    layer = {"height": height, "width": width, "channels": case.channels, "depth": case.image[3]}
    tile = choose_tile(machine, **layer, taps=case.taps[0] * case.taps[1])
    builder = relax.BlockBuilder()
    data = relax.Var("data", relax.TensorType(case.image, "float32"))
    other = relax.Var(
        "other", relax.TensorType((case.image[0], height, width, case.channels), "float32")
    )
    inputs = [data, other] if case.residual else [data]
    with builder.function("main", inputs):
        with builder.dataflow():
            sums = builder.emit_te(
                lambda x, w: conv2d(
                    x,
                    w,
                    window,
                    channels=case.channels,
                    tile_columns=tile.columns,
                    channels_first=False,
                    chunk=case.chunk,
                ),
                data,
                relax.const(pack_conv2d_weight(weight, tile.vectors * machine.lanes)),
                primfunc_name_hint="conv2d",
                primfunc_attrs=ANCHOR,
            )
            value = builder.emit(relax.op.add(sums, relax.const(bias)))
            if case.residual:
                value = builder.emit(relax.op.add(value, other))
            result = builder.emit_output(relax.op.nn.relu(value))
        builder.emit_func_output(result)
    return builder.get()


def _scheduled(module: tvm.IRModule, target: Target, *decided: tuple[str, str]) -> tvm.IRModule:
    """Schedule a module; a task takes all rows, so that there are passes over its weights."""
    asked: dict[str, tuple[str, ...]] = {}
    machine = Machine.of(target, 2)
    ScheduleModule(replace(machine, asked=asked))(module)
    tasks = next((name for name in asked["tasks"] if name.startswith("1x")), asked["tasks"][0])
    return ScheduleModule(replace(machine, decided=(*decided, ("tasks", tasks))))(module)


def _loops(module: tvm.IRModule) -> list[int]:
    """Return the extents of the loops around the sums of a module's convolution."""
    kernels = [func for func in module.functions.values() if isinstance(func, tvm.tirx.PrimFunc)]
    schedule = tvm.s_tir.Schedule(tvm.IRModule({"main": kernels[0]}))
    sums = schedule.get_sblock("conv_acc_update")
    return [int(schedule.get(loop).extent) for loop in schedule.get_loops(sums)]


@pytest.fixture
def layer(rng: np.random.Generator, request: pytest.FixtureRequest) -> Sequence[np.ndarray]:
    """Return data, weight [K, R, S, C], bias, residual and the right result of a case."""
    case: Case = request.param
    data = rng.standard_normal(case.image).astype("float32")
    weight = rng.standard_normal((case.channels, *case.taps, case.image[3])).astype("float32")
    bias = rng.standard_normal((1, 1, 1, case.channels)).astype("float32")
    exact = _oracle(case, data, weight) + bias
    other = rng.standard_normal(exact.shape).astype("float32")
    return data, weight, bias, other, np.maximum(exact + (other if case.residual else 0), 0)


def _check(actual: np.ndarray, wanted: np.ndarray) -> None:
    # A float32 sum of n terms of size about 1 is off by at most n units of 2**-24 times the sum
    # of magnitudes.
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=2e-4)


PAIRS = [pytest.param(case, case, id=case.id) for case in CASES]


@pytest.mark.parametrize(("case", "layer"), PAIRS, indirect=["layer"])
def test_sums_in_chunks_equal_the_oracle(
    case: Case, layer: Sequence[np.ndarray], target: Target
) -> None:
    data, weight, bias, other, wanted = layer
    lowered = pipeline.lower(_module(case, weight, bias, target), target, threads=2)
    scheduled = _scheduled(lowered, target)
    # All that the loops of one register tile add up: a chunk of one tap.
    assert case.chunk in _loops(scheduled)
    assert case.chunk not in _loops(_scheduled(lowered, target, ("chunk", "whole")))
    executable = pipeline.build_executable(scheduled, target, threads=2)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    inputs = [data, other] if case.residual else [data]
    actual = machine["main"](*[tvm.runtime.tensor(value) for value in inputs]).numpy()
    _check(actual, wanted)


@pytest.mark.parametrize(("case", "layer"), PAIRS[1:3], indirect=["layer"])
def test_sums_in_chunks_equal_the_oracle_when_emulated(
    case: Case, layer: Sequence[np.ndarray], arm_emulator, tmp_path: Path
) -> None:
    data, weight, bias, other, wanted = layer
    target = resolve("rpi4")
    lowered = pipeline.lower(_module(case, weight, bias, target), target, threads=2)
    scheduled = _scheduled(lowered, target)
    assert case.chunk in _loops(scheduled)
    library = tmp_path / "lib.so"
    library.write_bytes(pipeline.link(scheduled, target, threads=2))
    (actual,) = arm_emulator.run(library, [data, other], cpu="cortex-a72", threads=2)
    _check(actual.reshape(wanted.shape), wanted)


def test_the_next_chunk_is_requested_during_the_passes_over_one(rng: np.random.Generator) -> None:
    target = resolve("x86-64-v3")
    case = Case(id="", image=(1, 7, 7, 256), channels=512, taps=(1, 1), chunk=64)
    weight = rng.standard_normal((case.channels, 1, 1, 256)).astype("float32")
    bias = np.zeros((1, 1, 1, case.channels), "float32")
    lowered = pipeline.lower(_module(case, weight, bias, target), target, threads=2)
    scheduled = _scheduled(lowered, target)
    marks: list[list[int]] = []

    def note(loop: tvm.tirx.For) -> None:
        if "hone.prefetch_tile" in loop.annotations:
            marks.append([int(number) for number in loop.annotations["hone.prefetch_tile"]])

    for func in scheduled.functions.values():
        if isinstance(func, tvm.tirx.PrimFunc):
            structural_walk(func.body, ((tvm.tirx.For, note),))
    machine = Machine.of(target, 2)
    tile = choose_tile(machine, height=7, width=7, channels=512, depth=256, taps=1)
    passes = 7 // tile.rows * -(-7 // tile.columns)
    assert marks == [[tile.vectors * machine.lanes * case.chunk, passes, 3]]
