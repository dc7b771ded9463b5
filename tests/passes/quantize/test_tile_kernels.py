"""Integer kernels in AMX tiles, bit for bit against numpy, on real or emulated tiles."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from integer_oracle import conv_sums, requantized
from tvm import relax

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.lower import tile_sums
from hone.passes.lower.window import Window
from hone.passes.quantize import operators
from hone.passes.quantize.arithmetic import GUARD_BITS
from hone.passes.quantize.legalize import rules
from hone.passes.quantize.tile_kernels import PRODUCT
from hone.targets.features import missing
from hone.targets.integer_dot import IntegerDot, integer_dot_of
from hone.targets.schedule.cpu import Decision, ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_plan import TilePlan, TileWork, ranked_plans
from hone.targets.target import Target, resolve

GUARD = np.float32(2**GUARD_BITS)
TILE_FEATURES = ("amx-int8", "amx-tile", "avxvnni")


def with_tiles(name: str, *extra: str) -> Target:
    base = resolve(name)
    return replace(base, features=tuple(sorted({*base.features, *TILE_FEATURES, *extra})))


# Vectors of the epilogue: AVX-512 beside the tiles as on every processor that has them, and AVX2,
# which more machines can run.
TARGETS = {
    "x86-64-v4": with_tiles("x86-64-v4", "avx512vnni"),
    "x86-64-v3": with_tiles("x86-64-v3"),
}


def target_of(name: str) -> Target:
    needed = resolve(name)
    if lacking := missing(needed.features, needed.arch):
        pytest.skip(f"this machine lacks {', '.join(lacking)}")
    return TARGETS[name]


@dataclass(frozen=True)
class Ran:
    """What a kernel returned, and what it is made of."""

    got: np.ndarray
    rules: set[str]
    assembly: str


def run(build, arrays: list[np.ndarray], target: Target, *decided: tuple[str, str]) -> Ran:
    """Compile one operator whose inputs are parameters, with decided plans, and run it."""
    params = [
        relax.Var(f"p{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)
    ]
    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(build(*params))
        bb.emit_func_output(out)
    machine = replace(Machine.of(target, 2), decided=decided)
    module = apply(bb.get(), relax.transform.LegalizeOps(rules(machine)))
    decisions: list[Decision] = []
    module = ScheduleModule(machine, on_decision=decisions.append)(module)
    assert not [d.reason for d in decisions if d.reason]
    executable = pipeline.build_executable(module, target, threads=2)
    (library,) = (m for m in executable.mod.imports if m.kind == "llvm")
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    got = main(*[tvm.runtime.tensor(a) for a in arrays]).numpy()
    return Ran(got, {d.rule for d in decisions}, library.inspect_source("asm"))


@dataclass(frozen=True, kw_only=True)
class Conv:
    name: str
    shape: tuple[int, int, int, int]
    filters: tuple[int, int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    residual: bool = False
    out: str = "uint8"
    extreme: bool = False

    @property
    def window(self) -> Window:
        return Window(
            shape=self.shape,
            taps=self.filters[1:],
            strides=self.strides,
            dilation=self.dilation,
            padding=self.padding,
        )

    @property
    def work(self) -> TileWork:
        return tile_sums.conv2d_work(self.window, self.filters[0], PRODUCT)


CONVS = [
    Conv(name="plain", shape=(1, 9, 8, 32), filters=(48, 3, 3), padding=(1,) * 4),
    Conv(name="whole_tiles", shape=(1, 8, 8, 64), filters=(64, 3, 3), padding=(1,) * 4),
    Conv(name="batch", shape=(3, 5, 7, 20), filters=(33, 3, 3), padding=(1,) * 4, residual=True),
    Conv(name="strided", shape=(1, 9, 7, 24), filters=(40, 3, 3), strides=(2, 2), padding=(1,) * 4),
    Conv(name="stride_3_2", shape=(2, 11, 9, 8), filters=(7, 4, 2), strides=(3, 2)),
    Conv(name="dilated_4", shape=(1, 13, 9, 4), filters=(9, 3, 2), strides=(4, 1), dilation=(2, 3)),
    Conv(name="dilated", shape=(1, 9, 9, 12), filters=(6, 3, 3), dilation=(2, 2), padding=(2,) * 4),
    Conv(name="stem", shape=(1, 15, 13, 3), filters=(17, 7, 7), strides=(2, 2), padding=(3,) * 4),
    Conv(name="one_channel", shape=(1, 8, 8, 1), filters=(16, 3, 3), padding=(1,) * 4),
    Conv(name="lopsided", shape=(2, 5, 6, 5), filters=(7, 3, 2), padding=(0, 1, 2, 3)),
    Conv(name="one_pixel", shape=(1, 1, 1, 3), filters=(5, 3, 3), padding=(1,) * 4),
    Conv(name="pointwise", shape=(1, 7, 8, 96), filters=(24, 1, 1)),
    Conv(name="pointwise_batch", shape=(3, 4, 4, 64), filters=(72, 1, 1), residual=True),
    Conv(name="pointwise_prime", shape=(1, 7, 7, 37), filters=(19, 1, 1)),
    Conv(name="pointwise_stride", shape=(1, 7, 9, 32), filters=(16, 1, 1), strides=(2, 2)),
    Conv(name="pointwise_padded", shape=(1, 5, 5, 16), filters=(16, 1, 1), padding=(1, 0, 0, 1)),
    Conv(name="wide", shape=(1, 2, 37, 16), filters=(20, 1, 3), padding=(0, 1, 0, 1)),
    Conv(name="float_output", shape=(1, 5, 5, 4), filters=(6, 3, 3), out="float32"),
    Conv(name="signed_output", shape=(1, 5, 5, 4), filters=(6, 3, 3), out="int8"),
    # 255 × ±127 everywhere: sums that a 16-bit step would saturate.
    Conv(name="extreme", shape=(1, 4, 4, 72), filters=(16, 3, 3), padding=(1,) * 4, extreme=True),
    Conv(name="crowded_sets", shape=(1, 2, 3, 1024), filters=(16, 1, 1)),
]  # fmt: skip


def check_conv(case: Conv, target: Target, decided: str) -> Ran:
    """Run a convolution with a plan and compare it with the oracle."""
    rng = np.random.default_rng(7)
    filters, depth = case.filters[0], case.shape[3]
    data = rng.integers(0, 256, case.shape).astype(np.uint8)
    weight = rng.integers(-127, 128, (filters, *case.filters[1:], depth)).astype(np.int8)
    if case.extreme:
        data[:] = 255
        weight[:] = np.where(np.arange(filters) % 2, -127, 127)[:, None, None, None]
    zero_point = int(rng.integers(1, 256))
    bias = rng.integers(-5000, 5000, filters).astype(np.int32)
    acc = conv_sums(case, data, weight, zero_point) + bias
    multiplier = (rng.uniform(0.5, 1.5, filters) * 60 / np.abs(acc).max()).astype(np.float32)
    levels, rest = [zero_point], []
    if case.out != "float32":
        info = np.iinfo(case.out)
        levels += [int(rng.integers(info.min + 60, info.max - 60)), info.min + 9, info.max - 8]
    if case.residual:
        multiplier = multiplier * GUARD
        levels.append(77)
        residual = rng.integers(0, 256, acc.shape).astype(np.uint8)
        rest = [residual, np.array([0.37], np.float32) * GUARD]
    levels_array = np.array(levels, np.int32)

    def build(data, bias, multiplier, levels, *rest):
        return operators.conv2d_int8(
            data,
            relax.const(weight),
            bias,
            multiplier,
            levels,
            *rest,
            strides=case.strides,
            padding=case.padding,
            dilation=case.dilation,
            out_dtype=case.out,
        )

    arrays = [data, bias, multiplier, levels_array, *rest]
    ran = run(build, arrays, target, (case.work.name, decided))
    want = requantized(acc, multiplier, levels_array, case.out, *rest)
    assert ran.got.dtype == want.dtype
    np.testing.assert_array_equal(ran.got, want)
    return ran


def best(work: TileWork, target: Target) -> TilePlan:
    return ranked_plans(work, target.l1d_bytes)[0]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.name)
def test_conv2d_in_tiles_equals_the_oracle(amx, case: Conv, name: str) -> None:
    target = target_of(name)
    before = amx.counts()
    ran = check_conv(case, target, best(case.work, target).name)
    assert "tiles" in ran.rules
    assert instructions(ran.assembly) >= {"ldtilecfg", "tdpbusd", "tilestored", "tilerelease"}
    if before is not None:
        assert amx.counts()["tdpbusd"] > before["tdpbusd"]


def instructions(assembly: str) -> set[str]:
    return {line.split()[0] for line in assembly.splitlines() if line.startswith("\t")}


EVERY_PLAN = [
    (case, plan)
    for case in CONVS
    if case.name in ("batch", "pointwise", "pointwise_prime")
    for plan in ranked_plans(case.work, 48 << 10)
]


@pytest.mark.parametrize(
    ("case", "plan"), EVERY_PLAN, ids=[f"{c.name}-{p.name}" for c, p in EVERY_PLAN]
)
def test_every_plan_of_a_layer_computes_the_same(amx, case: Conv, plan: TilePlan) -> None:
    assert "tiles" in check_conv(case, target_of("x86-64-v3"), plan.name).rules


@dataclass(frozen=True, kw_only=True)
class Dense:
    name: str
    shape: tuple[int, ...]
    channels: int
    residual: bool = False


DENSES = [
    Dense(name="one_row", shape=(1, 64), channels=100),
    Dense(name="odd_depth", shape=(3, 7), channels=5),
    Dense(name="prime_rows", shape=(31, 12), channels=33),
    Dense(name="in_place", shape=(32, 128), channels=64),
    Dense(name="three_axes", shape=(2, 3, 6), channels=16),
    Dense(name="three_axes_residual", shape=(2, 8, 40), channels=17, residual=True),
]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("case", DENSES, ids=lambda case: case.name)
def test_dense_in_tiles_equals_the_oracle(amx, case: Dense, name: str) -> None:
    target = target_of(name)
    rng = np.random.default_rng(8)
    data = rng.integers(0, 256, case.shape).astype(np.uint8)
    weight = rng.integers(-127, 128, (case.channels, case.shape[-1])).astype(np.int8)
    bias = rng.integers(-9000, 9000, case.channels).astype(np.int32)
    acc = data.astype(np.int64) @ weight.astype(np.int64).T + bias
    multiplier = (rng.uniform(0.5, 2, case.channels) * 60 / np.abs(acc).max()).astype(np.float32)
    levels, rest = np.array([3, 119, 5, 250], np.int32), []
    if case.residual:
        multiplier, levels = multiplier * GUARD, np.array([*levels, 128], np.int32)
        residual = rng.integers(0, 256, acc.shape).astype(np.uint8)
        rest = [residual, np.array([0.25], np.float32) * GUARD]

    def build(data, bias, multiplier, levels, *rest):
        return operators.dense_int8(data, relax.const(weight), bias, multiplier, levels, *rest)

    rows = int(np.prod(case.shape[:-1]))
    work = tile_sums.dense_work(rows, case.shape[-1], case.channels, PRODUCT)
    decided = (work.name, best(work, target).name)
    ran = run(build, [data, bias, multiplier, levels, *rest], target, decided)
    assert "tiles" in ran.rules
    assert "tdpbusd" in instructions(ran.assembly)
    np.testing.assert_array_equal(ran.got, requantized(acc, multiplier, levels, "uint8", *rest))


def test_vectors_are_kept_when_tiles_do_not_pay() -> None:
    target = target_of("x86-64-v4")
    if lacking := missing(("avx512vnni",), target.arch):
        pytest.skip(f"this machine lacks {', '.join(lacking)}")
    case = next(case for case in CONVS if case.name == "one_channel")
    ran = check_conv(case, target, "what the model says")
    assert ran.rules == {"dot_conv2d"}
    assert "vpdpbusd" in instructions(ran.assembly)
    assert not re.search("tdpbusd|ldtilecfg", ran.assembly)


def test_requantization_stays_in_vectors_when_sums_come_from_tiles(amx) -> None:
    case = next(case for case in CONVS if case.name == "whole_tiles")
    target = target_of("x86-64-v4")
    words = instructions(check_conv(case, target, best(case.work, target).name).assembly)
    assert {"vcvtps2dq", "vpmovdb"} <= words
    assert not words & {"vcvttss2si", "vpextrd", "vpextrb", "vmulss"}


def test_integer_dot_is_tiles_where_a_target_has_them() -> None:
    dots = {name: integer_dot_of(target) for name, target in TARGETS.items()}
    assert set(dots.values()) == {IntegerDot.TDPBUSD}
    assert integer_dot_of(resolve("sapphirerapids")) == IntegerDot.TDPBUSD
    assert integer_dot_of(resolve("icelake-server")) == IntegerDot.VPDPBUSD


def test_packed_weights_have_zeros_around_when_nothing_divides() -> None:
    work = tile_sums.dense_work(5, 6, 3, PRODUCT)
    plan = best(work, resolve("sapphirerapids"))
    packed = tile_sums.pack_tiles(np.arange(1, 19, dtype=np.int8).reshape(3, 1, 6), plan)
    assert packed.shape == (1, 1, 1, plan.shape.right_tiles, 2, 16, 4)
    assert packed[0, 0, 0, 0, :, 1].ravel().tolist() == [7, 8, 9, 10, 11, 12, 0, 0]
    assert not packed[..., 3:, :].any()
