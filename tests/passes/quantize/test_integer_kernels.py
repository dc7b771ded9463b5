"""The compiled integer operators against an independent numpy oracle, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax

import hone.passes.quantize.legalize  # noqa: F401  registers the lowering
from hone.errors import ModelError
from hone.passes.apply import apply
from hone.passes.quantize import operators
from hone.passes.quantize.arithmetic import GUARD_BITS
from hone.passes.quantize.legalize import rules
from hone.passes.quantize.qparams import UINT8, choose_qparams, quantize
from hone.targets.schedule.cpu import Decision, ScheduleModule
from hone.targets.schedule.machine import Machine

GUARD = np.float32(2**GUARD_BITS)
Build = Callable[..., relax.Call]


def run(build: Build, arrays: list[np.ndarray], machine: Machine | None = None) -> np.ndarray:
    """Compile one operator, whose inputs are parameters, and run it; scheduled for a machine."""
    params = [
        relax.Var(f"p{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)
    ]
    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(build(*params))
        bb.emit_func_output(out)
    module = apply(bb.get(), relax.transform.LegalizeOps(rules(machine) if machine else None))
    if machine:
        decisions: list[Decision] = []
        module = ScheduleModule(machine, on_decision=decisions.append)(module)
        assert {d.rule for d in decisions} <= {"conv2d", "window", "dense", "generic"}
        assert not any(d.reason for d in decisions)
    vm = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    return vm["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy()


def level(acc: np.ndarray, multiplier: np.ndarray, levels: np.ndarray, dtype: str) -> np.ndarray:
    """Requantize by the specification, written again from its text."""
    assert np.abs(acc).max() < 2**31
    zero_point, low, high = (int(x) for x in levels)
    steps = np.rint(acc.astype(np.int32).astype(np.float32) * multiplier)
    return np.clip(steps.astype(np.float64) + zero_point, low, high).astype(dtype)


def fixed(value: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    return np.rint(value.astype(np.int32).astype(np.float32) * multiplier).astype(np.int64)


def level_of_fixed(total: np.ndarray, levels: np.ndarray, dtype: str) -> np.ndarray:
    zero_point, low, high = (int(x) for x in levels)
    rounded = np.floor_divide(total + 2 ** (GUARD_BITS - 1), 2**GUARD_BITS)
    return np.clip(rounded + zero_point, low, high).astype(dtype)


@dataclass(frozen=True, kw_only=True)
class Conv:
    name: str
    shape: tuple[int, int, int, int] = (1, 5, 6, 3)
    filters: tuple[int, int, int] = (5, 3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    depthwise: bool = False
    residual: bool = False
    data: str = "uint8"
    out: str = "uint8"
    bounds: tuple[int, int] | None = None


CONVS = [
    Conv(name="awkward_channels"),
    Conv(name="exact_tile", shape=(1, 4, 4, 4), filters=(16, 1, 1)),
    Conv(name="two_tiles", shape=(1, 4, 4, 2), filters=(18, 1, 1)),
    Conv(name="stride_2", strides=(2, 2), padding=(1, 1, 1, 1)),
    Conv(name="stride_mixed", strides=(2, 1)),
    Conv(name="dilation_2", shape=(1, 7, 8, 3), dilation=(2, 2), padding=(2, 2, 2, 2)),
    Conv(name="asymmetric_padding", padding=(0, 1, 2, 3)),
    Conv(name="batch_3", shape=(3, 4, 5, 2), padding=(1, 1, 1, 1)),
    Conv(name="image_1x1", shape=(2, 1, 1, 7), filters=(5, 1, 1)),
    Conv(name="image_1x1_padded", shape=(1, 1, 1, 3), padding=(1, 1, 1, 1)),
    Conv(name="one_channel", shape=(1, 4, 5, 1), filters=(1, 2, 2)),
    Conv(name="depthwise", shape=(2, 6, 5, 5), depthwise=True, padding=(1, 1, 1, 1)),
    Conv(name="depthwise_stride", shape=(1, 7, 7, 3), depthwise=True, strides=(2, 2)),
    Conv(name="depthwise_residual", shape=(1, 4, 4, 3), depthwise=True, residual=True),
    Conv(name="residual", padding=(1, 1, 1, 1), residual=True),
    Conv(name="signed_data", data="int8", padding=(1, 0, 0, 1)),
    Conv(name="signed_output", out="int8"),
    Conv(name="float_output", out="float32", padding=(1, 1, 1, 1)),
    Conv(name="relu6_bounds", bounds=(17, 120)),
]


def conv_oracle(case: Conv, data, weight, bias, multiplier, levels, residual=None, r_mult=None):
    n, _, _, c = case.shape
    k, taps_h, taps_w = case.filters if not case.depthwise else (c, *case.filters[1:])
    top, left, bottom, right = case.padding
    padded = np.pad(
        data.astype(np.int64),
        ((0, 0), (top, bottom), (left, right), (0, 0)),
        constant_values=int(levels[0]),
    )
    span = [case.dilation[i] * ((taps_h, taps_w)[i] - 1) + 1 for i in range(2)]
    oh = (padded.shape[1] - span[0]) // case.strides[0] + 1
    ow = (padded.shape[2] - span[1]) // case.strides[1] + 1
    acc = np.zeros((n, oh, ow, k), np.int64)
    for r in range(taps_h):
        for s in range(taps_w):
            y, x = r * case.dilation[0], s * case.dilation[1]
            patch = padded[
                :,
                y : y + case.strides[0] * (oh - 1) + 1 : case.strides[0],
                x : x + case.strides[1] * (ow - 1) + 1 : case.strides[1],
            ]
            w = weight[:, r, s].astype(np.int64)
            acc += patch * w[:, 0] if case.depthwise else patch @ w.T
    acc += bias
    if case.out == "float32":
        return acc.astype(np.int32).astype(np.float32) * multiplier
    if residual is None:
        return level(acc, multiplier, levels[1:4], case.out)
    total = fixed(acc, multiplier) + fixed(residual - levels[4], r_mult)
    return level_of_fixed(total, levels[1:4], case.out)


def conv_arguments(case: Conv, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    info = np.iinfo(case.data)
    c = case.shape[3]
    k = c if case.depthwise else case.filters[0]
    depth = 1 if case.depthwise else c
    data = rng.integers(info.min, info.max + 1, case.shape).astype(case.data)
    weight = rng.integers(-127, 128, (k, *case.filters[1:], depth)).astype(np.int8)
    bias = rng.integers(-5000, 5000, k).astype(np.int32)
    out = np.iinfo(case.out) if case.out != "float32" else None
    zero_point = int(rng.integers(info.min, info.max + 1))
    # Most sums land inside the output's range, some outside.
    spread = 60 * np.sqrt(depth * np.prod(case.filters[1:])) * 127
    multiplier = (rng.uniform(0.5, 1.5, k) * 80 / spread).astype(np.float32)
    if out is None:
        return [data, weight, bias, multiplier, np.array([zero_point], np.int32)]
    low, high = case.bounds or (out.min, out.max)
    levels = [zero_point, int(rng.integers(out.min, out.max + 1)), low, high]
    arguments = [data, weight, bias, multiplier]
    if not case.residual:
        return [*arguments, np.array(levels, np.int32)]
    arguments[3] = multiplier * GUARD
    arguments.append(np.array([*levels, 77], np.int32))
    window = conv_oracle(
        Conv(**{**case.__dict__, "residual": False}), data, weight, bias, multiplier, levels
    )
    residual = rng.integers(0, 256, window.shape).astype(np.uint8)
    return [*arguments, residual, np.array([0.37], np.float32) * GUARD]


def build_conv(case: Conv, weight: np.ndarray) -> Build:
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
            groups=case.shape[3] if case.depthwise else 1,
            out_dtype=case.out,
        )

    return build


NARROW = Machine(lanes=4, accumulators=12, l1_bytes=32 << 10, l2_bytes=1 << 20, threads=2)


@pytest.mark.parametrize("machine", [None, NARROW], ids=["naive", "scheduled"])
@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.name)
def test_conv2d_int8_equals_the_oracle_when_compiled(case: Conv, machine: Machine | None) -> None:
    arguments = conv_arguments(case)
    got = run(build_conv(case, arguments[1]), [arguments[0], *arguments[2:]], machine)
    want = conv_oracle(case, *arguments)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(got)) > min(got.size // 4, 8), "the case must not saturate"


@dataclass(frozen=True, kw_only=True)
class Dense:
    name: str
    shape: tuple[int, ...] = (3, 7)
    channels: int = 5
    residual: bool = False
    out: str = "uint8"


DENSES = [
    Dense(name="awkward"),
    Dense(name="one_row", shape=(1, 33), channels=10),
    Dense(name="wide", shape=(2, 5), channels=37),
    Dense(name="three_axes", shape=(2, 3, 7)),
    Dense(name="three_axes_residual", shape=(2, 3, 7), residual=True),
    Dense(name="residual", residual=True),
    Dense(name="float_output", out="float32"),
]


@pytest.mark.parametrize("machine", [None, NARROW], ids=["naive", "scheduled"])
@pytest.mark.parametrize("case", DENSES, ids=lambda case: case.name)
def test_dense_int8_equals_the_oracle_when_compiled(case: Dense, machine: Machine | None) -> None:
    rng = np.random.default_rng(1)
    depth = case.shape[-1]
    data = rng.integers(0, 256, case.shape).astype(np.uint8)
    weight = rng.integers(-127, 128, (case.channels, depth)).astype(np.int8)
    bias = rng.integers(-9000, 9000, case.channels).astype(np.int32)
    multiplier = rng.uniform(0.5, 2, case.channels).astype(np.float32) / np.float32(80 * depth)
    levels = np.array([3, 119, 5, 250], np.int32)
    acc = data.astype(np.int64) @ weight.astype(np.int64).T + bias
    rest: list[np.ndarray] = []
    if case.out == "float32":
        want = acc.astype(np.int32).astype(np.float32) * multiplier
        levels = levels[:1]
    elif case.residual:
        residual = rng.integers(0, 256, acc.shape).astype(np.uint8)
        rest = [residual, np.array([0.25], np.float32) * GUARD]
        multiplier = multiplier * GUARD
        levels = np.array([*levels, 128], np.int32)
        total = fixed(acc, multiplier) + fixed(residual.astype(np.int64) - 128, rest[1])
        want = level_of_fixed(total, levels[1:4], "uint8")
    else:
        want = level(acc, multiplier, levels[1:], "uint8")

    def build(data, bias, multiplier, levels, *rest):
        return operators.dense_int8(
            data, relax.const(weight), bias, multiplier, levels, *rest, out_dtype=case.out
        )

    got = run(build, [data, bias, multiplier, levels, *rest], machine)
    np.testing.assert_array_equal(got, want)


def test_add_int8_equals_the_oracle_for_every_pair_of_levels() -> None:
    left, right = (a.astype(np.uint8) for a in np.meshgrid(np.arange(256), np.arange(256)))
    multipliers = np.array([0.7311, 0.25], np.float32) * GUARD
    levels = np.array([13, 200, 97, 97, 255], np.int32)
    got = run(operators.add_int8, [left, right, multipliers, levels])
    total = fixed(left.astype(np.int64) - 13, multipliers[0])
    total += fixed(right.astype(np.int64) - 200, multipliers[1])
    np.testing.assert_array_equal(got, level_of_fixed(total, levels[2:], "uint8"))
    # The bound of the specification: half a level and 2**-GUARD_BITS.
    exact = (left - 13.0) * np.float32(0.7311) + (right - 200.0) * 0.25 + 97
    inside = (exact > 97) & (exact < 255)
    assert np.abs(got - exact)[inside].max() <= 0.5 + 2**-GUARD_BITS


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (0, 1, 1, 0)], ids=["valid", "padded"])
def test_avg_pool2d_int8_equals_the_oracle(padding: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, (2, 5, 6, 3)).astype(np.uint8)
    multiplier = np.array([1.3 / 6], np.float32)
    levels = np.array([40, 30, 0, 255], np.int32)

    def build(data, multiplier, levels):
        return operators.avg_pool2d_int8(
            data, multiplier, levels, pool_size=(2, 3), strides=(2, 1), padding=padding
        )

    got = run(build, [data, multiplier, levels])
    top, left, bottom, right = padding
    padded = np.pad(
        data.astype(np.int64), ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=40
    )
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2, 3), axis=(1, 2))[:, ::2]
    want = level(windows.sum((-1, -2)) - 6 * 40, multiplier, levels[1:], "uint8")
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("axis", "keepdims"), [((1, 2), True), ((1, 2), False), ((-1,), False), ((0, 2), True)]
)
def test_mean_int8_equals_the_oracle(axis: tuple[int, ...], keepdims: bool) -> None:
    data = np.random.default_rng(3).integers(0, 256, (2, 3, 4, 5)).astype(np.uint8)
    count = int(np.prod([data.shape[a] for a in axis]))
    multiplier = np.array([2.1 / count], np.float32)
    levels = np.array([100, 128, 0, 255], np.int32)

    def build(data, multiplier, levels):
        return operators.mean_int8(data, multiplier, levels, axis=axis, keepdims=keepdims)

    got = run(build, [data, multiplier, levels])
    acc = (data.astype(np.int64) - 100).sum(axis, keepdims=keepdims)
    np.testing.assert_array_equal(got, level(acc, multiplier, levels[1:], "uint8"))


def test_requantize_rounds_ties_to_even_and_saturates() -> None:
    # One weight of 1 and one of 127: the accumulator takes any value in steps of 1.
    data = np.zeros((8, 2), np.uint8)
    data[:, 0] = [1, 3, 5, 7, 0, 0, 0, 0]
    data[:, 1] = [0, 0, 0, 0, 1, 2, 3, 255]
    weight = np.array([[1, 127]], np.int8)
    arguments = [
        data,
        np.array([0], np.int32),
        np.array([0.5], np.float32),
        np.array([0, 10, 0, 255], np.int32),
    ]

    def build(data, bias, multiplier, levels):
        return operators.dense_int8(data, relax.const(weight), bias, multiplier, levels)

    # 0.5 → 0, 1.5 → 2, 2.5 → 2, 3.5 → 4; 63.5 → 64, 127, 190.5 → 190; the last saturates.
    want = [10, 12, 12, 14, 74, 137, 200, 255]
    np.testing.assert_array_equal(run(build, arguments)[:, 0], want)


def test_quantize_equals_numpy_when_values_tie_overflow_or_are_infinite() -> None:
    qparams = choose_qparams(-1.0, 3.0, type=UINT8, symmetric=False)
    rng = np.random.default_rng(4)
    ties = (np.arange(-70, 300) + 0.5).astype(np.float32) * qparams.scale
    x = np.concatenate([ties, rng.normal(0, 2, 500).astype(np.float32), [np.inf, -np.inf, 1e38]])
    x = x.astype(np.float32)
    arguments = [x, qparams.scale, qparams.zero_point]
    np.testing.assert_array_equal(run(operators.quantize, arguments), quantize(x, qparams))


def test_quantize_gives_the_lowest_level_when_a_value_is_nan() -> None:
    x = np.array([np.nan, 0.0], np.float32)
    arguments = [x, np.array(0.5, np.float32), np.array(9, np.int32)]
    assert run(operators.quantize, arguments).tolist() == [0, 9]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32"])
def test_dequantize_equals_the_formula(dtype: str) -> None:
    q = np.arange(-100, 100).astype(dtype)
    scale, zero_point = np.array(0.0371, np.float32), np.array(7, np.int32)
    want = (q.astype(np.int32) - 7).astype(np.float32) * scale
    np.testing.assert_array_equal(run(operators.dequantize, [q, scale, zero_point]), want)


def test_weights_stay_int8_and_packed_when_lowered() -> None:
    case = CONVS[0]
    arguments = conv_arguments(case)
    params = [
        relax.Var(f"p{i}", relax.TensorType(a.shape, str(a.dtype)))
        for i, a in enumerate([arguments[0], *arguments[2:]])
    ]
    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(build_conv(case, arguments[1])(*params))
        bb.emit_func_output(out)
    lowered = apply(bb.get(), relax.transform.LegalizeOps(), relax.transform.FoldConstant())
    constants: list[tuple[str, tuple[int, ...]]] = []

    def visit(node: relax.Expr) -> None:
        if isinstance(node, tvm.ir.GenericConst):
            constants.append((str(node.ty.dtype), tuple(int(e) for e in node.ty.shape)))

    relax.analysis.post_order_visit(lowered["main"], visit)
    assert constants == [("int8", (1, 3, 3, 3, 16))]


def test_lowering_refuses_when_the_weight_is_not_constant() -> None:
    case = CONVS[0]
    arguments = conv_arguments(case)

    def build(data, weight, *rest):
        return operators.conv2d_int8(data, weight, *rest)

    with pytest.raises(ModelError) as error:
        run(build, arguments)
    assert str(error.value) == "hone.conv2d_int8: the weights must be constant to be packed"
