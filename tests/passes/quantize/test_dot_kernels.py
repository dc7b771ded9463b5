"""Integer kernels of processors that sum products of bytes, bit for bit against numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from integer_oracle import conv_sums, requantized
from tvm import relax

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.lower.conv2d import Window
from hone.passes.quantize import operators
from hone.passes.quantize.arithmetic import GUARD_BITS
from hone.passes.quantize.dot_kernels import Rows, pack_conv2d, pack_dense
from hone.passes.quantize.legalize import rules
from hone.targets.features import missing
from hone.targets.integer_dot import IntegerDot, integer_dot_of
from hone.targets.schedule.cpu import Decision, ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target, resolve

GUARD = np.float32(2**GUARD_BITS)


def with_features(name: str, *extra: str) -> Target:
    base = resolve(name)
    return replace(base, features=tuple(sorted({*base.features, *extra})))


FORMS = {
    "vnni_512": (with_features("x86-64-v4", "avx512vnni"), IntegerDot.VPDPBUSD),
    "vnni_256": (with_features("x86-64-v3", "avxvnni"), IntegerDot.VPDPBUSD),
    "words_512": (resolve("x86-64-v4"), IntegerDot.VPMADDWD),
    "words_256": (resolve("x86-64-v3"), IntegerDot.VPMADDWD),
    "plain": (resolve("x86-64-v2"), None),
}


def target_of(form: str) -> Target:
    target = FORMS[form][0]
    lacking = missing(target.features, target.arch)
    if lacking:
        pytest.skip(f"this machine lacks {', '.join(lacking)}")
    return target


def compiled(build, arrays: list[np.ndarray], target: Target) -> tuple[np.ndarray, set[str]]:
    """Compile one operator whose inputs are parameters, run it; also its rules."""
    params = [
        relax.Var(f"p{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)
    ]
    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(build(*params))
        bb.emit_func_output(out)
    machine = Machine.of(target, 2)
    module = apply(bb.get(), relax.transform.LegalizeOps(rules(machine)))
    decisions: list[Decision] = []
    module = ScheduleModule(machine, on_decision=decisions.append)(module)
    assert not [d.reason for d in decisions if d.reason]
    vm = relax.VirtualMachine(pipeline.build_executable(module, target, threads=2), tvm.cpu())
    got = vm["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy()
    return got, {d.rule for d in decisions}


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


CONVS = [
    Conv(name="whole_groups", shape=(1, 6, 7, 8), filters=(32, 3, 3), padding=(1, 1, 1, 1)),
    Conv(name="filters_24", shape=(1, 5, 5, 12), filters=(24, 1, 1)),
    Conv(name="filters_10", shape=(2, 3, 4, 4), filters=(10, 2, 1)),
    Conv(name="one_channel", shape=(1, 8, 8, 1), filters=(16, 3, 3), padding=(1, 1, 1, 1)),
    Conv(name="stem", shape=(1, 15, 13, 3), filters=(17, 7, 7), strides=(2, 2), padding=(3,) * 4),
    Conv(name="five_channels", shape=(2, 5, 6, 5), filters=(7, 3, 2), padding=(0, 1, 2, 3)),
    Conv(name="pointwise_odd", shape=(1, 4, 5, 37), filters=(19, 1, 1)),
    Conv(name="pointwise_stride", shape=(1, 7, 7, 8), filters=(16, 1, 1), strides=(2, 2)),
    Conv(name="dilated", shape=(1, 9, 9, 4), filters=(6, 3, 3), dilation=(2, 2), padding=(2,) * 4),
    Conv(name="dilated_odd", shape=(1, 9, 8, 3), filters=(5, 3, 2), dilation=(2, 3)),
    Conv(name="prime_width", shape=(1, 2, 31, 4), filters=(33, 1, 1)),
    Conv(name="one_pixel", shape=(1, 1, 1, 3), filters=(5, 3, 3), padding=(1, 1, 1, 1)),
    Conv(name="residual", shape=(1, 5, 6, 8), filters=(9, 3, 3), padding=(1,) * 4, residual=True),
    Conv(name="float_output", shape=(1, 5, 5, 4), filters=(6, 3, 3), out="float32"),
    Conv(name="signed_output", shape=(1, 5, 5, 4), filters=(6, 3, 3), out="int8"),
    # 255 × ±127 everywhere: pairs that vpmaddubsw would saturate.
    Conv(name="extreme", shape=(1, 4, 4, 8), filters=(16, 3, 3), extreme=True),
    Conv(
        name="extreme_padded", shape=(1, 4, 4, 3), filters=(8, 3, 3), padding=(1,) * 4, extreme=True
    ),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.name)
def test_conv2d_equals_the_oracle_for_every_instruction(case: Conv, form: str) -> None:
    target = target_of(form)
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

    got, kernels = compiled(build, [data, bias, multiplier, levels_array, *rest], target)
    assert kernels <= ({"conv2d"} if form == "plain" else {"dot_conv2d", "winograd"})
    want = requantized(acc, multiplier, levels_array, case.out, *rest)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


@dataclass(frozen=True, kw_only=True)
class Depthwise:
    name: str
    shape: tuple[int, int, int, int]
    taps: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    residual: bool = False
    data: str = "uint8"
    extreme: bool = False

    @property
    def filters(self) -> tuple[int, int, int]:
        return (self.shape[3], *self.taps)


DEPTHWISE = [
    Depthwise(name="even_rows", shape=(1, 6, 5, 32)),
    Depthwise(name="odd_rows_of_batch_3", shape=(3, 7, 11, 16)),
    Depthwise(name="two_taps", shape=(1, 5, 6, 16), taps=(2, 1), padding=(0, 0, 0, 0)),
    Depthwise(name="five_taps", shape=(1, 9, 8, 16), taps=(5, 5), padding=(2, 2, 2, 2)),
    Depthwise(name="uneven_padding", shape=(1, 5, 6, 16), taps=(4, 2), padding=(0, 1, 3, 0)),
    Depthwise(name="columns_apart", shape=(1, 6, 9, 16), strides=(1, 2), dilation=(1, 2)),
    Depthwise(name="one_pixel", shape=(2, 1, 1, 16)),
    Depthwise(name="signed_data", shape=(1, 6, 5, 16), data="int8"),
    Depthwise(name="residual", shape=(1, 6, 5, 16), residual=True),
    Depthwise(name="extreme", shape=(1, 6, 5, 16), extreme=True),
    # These are summed tap by tap.
    Depthwise(name="stride_2", shape=(1, 9, 9, 16), strides=(2, 2)),
    Depthwise(name="rows_apart", shape=(1, 9, 9, 16), dilation=(2, 1)),
    Depthwise(name="five_channels", shape=(1, 6, 5, 5)),
    Depthwise(name="one_tap", shape=(1, 6, 5, 16), taps=(1, 3)),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", DEPTHWISE, ids=lambda case: case.name)
def test_depthwise_equals_the_oracle_for_every_instruction(case: Depthwise, form: str) -> None:
    target = target_of(form)
    rng = np.random.default_rng(3)
    info = np.iinfo(case.data)
    channels = case.shape[3]
    data = rng.integers(info.min, info.max + 1, case.shape).astype(case.data)
    weight = rng.integers(-127, 128, (channels, *case.taps, 1)).astype(np.int8)
    if case.extreme:
        data[:] = info.max
        weight[:] = np.where(np.arange(channels) % 2, -127, 127)[:, None, None, None]
    zero_point = int(rng.integers(info.min + 1, info.max + 1))
    bias = rng.integers(-5000, 5000, channels).astype(np.int32)
    acc = conv_sums(case, data, weight, zero_point, depthwise=True) + bias
    multiplier = (rng.uniform(0.5, 1.5, channels) * 60 / np.abs(acc).max()).astype(np.float32)
    levels = [zero_point, 130, 9, 247]
    rest = []
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
            groups=channels,
            out_dtype="uint8",
        )

    got, rules = compiled(build, [data, bias, multiplier, levels_array, *rest], target)
    want = requantized(acc, multiplier, levels_array, "uint8", *rest)
    assert rules == {"window"}
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(got)) > 2, "the case must not saturate"


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
    Dense(name="three_axes", shape=(2, 3, 6), channels=16),
    Dense(name="three_axes_residual", shape=(2, 3, 8), channels=17, residual=True),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", DENSES, ids=lambda case: case.name)
def test_dense_equals_the_oracle_for_every_instruction(case: Dense, form: str) -> None:
    target = target_of(form)
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

    got, kernels = compiled(build, [data, bias, multiplier, levels, *rest], target)
    assert ("dense" if form == "plain" else "dot_dense") in kernels
    np.testing.assert_array_equal(got, requantized(acc, multiplier, levels, "uint8", *rest))


@pytest.mark.parametrize("form", FORMS)
def test_integer_dot_is_the_best_that_a_target_lists(form: str) -> None:
    target, dot = FORMS[form]
    assert integer_dot_of(target) == dot


def test_integer_dot_is_for_signed_bytes_when_a_board_has_no_mixed_one() -> None:
    dots = {name: integer_dot_of(resolve(name)) for name in ("rpi4", "rpi5", "graviton3")}
    assert dots == {"rpi4": None, "rpi5": IntegerDot.SDOT, "graviton3": IntegerDot.USMMLA}
    assert IntegerDot.USMMLA.vector == IntegerDot.USDOT


def window(channels: int, taps: int, dilation: int = 1) -> Window:
    return Window(
        shape=(1, 9, 9, channels),
        taps=(2, taps),
        strides=(1, 1),
        dilation=(1, dilation),
        padding=(0, 0, 0, 0),
    )


def test_taps_are_joined_when_channels_do_not_fill_groups() -> None:
    joined = Rows.of(window(3, 7))
    assert joined == Rows(joined=True, taps=1, channels=3, groups=6)
    assert Rows.of(window(8, 3)) == Rows(joined=False, taps=3, channels=8, groups=2)
    assert Rows.of(window(3, 2, dilation=2)) == Rows(joined=False, taps=2, channels=4, groups=1)


def test_packed_weights_have_zeros_around_when_nothing_divides() -> None:
    weight = np.arange(1, 3 * 2 * 2 * 3 + 1, dtype=np.int8).reshape(3, 2, 2, 3)
    packed = pack_conv2d(weight, Rows.of(window(3, 2)), 4)
    assert packed.shape == (1, 2, 1, 2, 4, 4)
    # Filter 1, kernel row 1: six bytes in a run, then two zeros; filter 3 does not exist.
    assert packed[0, 1, 0, :, 1].ravel().tolist() == [*weight[1, 1].ravel().tolist(), 0, 0]
    assert not packed[..., 3, :].any()
    dense = pack_dense(np.arange(1, 16, dtype=np.int8).reshape(3, 5), 2)
    assert dense.shape == (2, 2, 2, 4)
    assert dense[1, :, 0].ravel().tolist() == [11, 12, 13, 14, 15, 0, 0, 0]


def test_requantization_stays_in_vectors_when_compiled_for_vnni() -> None:
    target = FORMS["vnni_512"][0]
    case = CONVS[0]
    weight = np.ones((case.filters[0], 3, 3, case.shape[3]), np.int8)
    types = [(case.shape, "uint8"), ((32,), "int32"), ((32,), "float32"), ((5,), "int32")]
    types += [((1, 6, 7, 32), "uint8"), ((1,), "float32")]
    params = [relax.Var(f"p{i}", relax.TensorType(*type)) for i, type in enumerate(types)]
    data, bias, multiplier, levels, *rest = params
    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            call = operators.conv2d_int8(
                data, relax.const(weight), bias, multiplier, levels, *rest, padding=(1,) * 4
            )
            out = bb.emit_output(call)
        bb.emit_func_output(out)
    lowered = pipeline.lower(bb.get(), target, threads=1)
    scheduled = pipeline.schedule(lowered, target, threads=1)
    executable = pipeline.build_executable(scheduled.module, target, threads=1)
    (library,) = (m for m in executable.mod.imports if m.kind == "llvm")
    assembly = library.inspect_source("asm").splitlines()
    words = {line.split()[0] for line in assembly if line.startswith("\t")}
    assert {"vpdpbusd", "vcvtps2dq", "vpmovdb"} <= words
    assert not words & {"vcvttss2si", "vpextrd", "vpextrb", "vmulss", "vpmulld", "vpmaddwd"}
