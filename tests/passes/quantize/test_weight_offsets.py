"""Weights with zero points of their own: the operators against a numpy oracle, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from integer_oracle import conv_sums, requantized
from tvm import relax

from hone import pipeline
from hone.errors import ModelError
from hone.passes.quantize import operators
from hone.passes.quantize.arithmetic import GUARD_BITS
from hone.passes.quantize.weight_offsets import WindowSums, fit_weights, largest_sums
from hone.targets.features import missing
from hone.targets.target import Target, resolve

GUARD = np.float32(2**GUARD_BITS)
FACTOR = np.array([0.37], np.float32) * GUARD


def with_features(name: str, *extra: str) -> Target:
    base = resolve(name)
    return replace(base, features=tuple(sorted({*base.features, *extra})))


TARGETS = {
    "host": resolve("host"),
    "vnni_512": with_features("x86-64-v4", "avx512vnni"),
    "v3": resolve("x86-64-v3"),
    "v2": resolve("x86-64-v2"),
}


@dataclass(frozen=True, kw_only=True)
class Conv:
    name: str
    shape: tuple[int, int, int, int]
    filters: tuple[int, int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    residual: bool = False
    depthwise: bool = False


CONVS = [
    Conv(name="padded", shape=(1, 5, 7, 3), filters=(5, 3, 3), padding=(1, 0, 2, 1)),
    Conv(name="pointwise", shape=(3, 1, 1, 37), filters=(19, 1, 1), residual=True),
    Conv(name="strided", shape=(2, 7, 8, 8), filters=(16, 3, 2), strides=(2, 1), residual=True,
         padding=(1, 1, 1, 1)),
    Conv(name="pointwise strided", shape=(1, 7, 7, 4), filters=(7, 1, 1), strides=(2, 2)),
    Conv(name="dilated", shape=(1, 9, 8, 4), filters=(6, 2, 3), dilation=(3, 2)),
    Conv(name="depthwise", shape=(1, 7, 6, 5), filters=(5, 3, 3), padding=(1,) * 4,
         depthwise=True),
]  # fmt: skip


class Network:
    """Layers side by side, each with its arguments as parameters and its expected result."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)
        self.builder = relax.BlockBuilder()
        self.arrays: list[np.ndarray] = []
        self.params: list[relax.Var] = []
        self.expected: list[np.ndarray] = []

    def parameter(self, array: np.ndarray) -> relax.Var:
        self.arrays.append(array)
        type_ = relax.TensorType(array.shape, str(array.dtype))
        self.params.append(relax.Var(f"p{len(self.params)}", type_))
        return self.params[-1]

    def weights(self, *shape: int) -> np.ndarray:
        """Levels of uint8 less a zero point for each channel, the ends of the range included."""
        levels = self.rng.integers(0, 256, shape)
        levels.reshape(shape[0], -1)[:, 0] = np.where(np.arange(shape[0]) % 2, 255, 0)
        points = self.rng.choice([0, 7, 128, 200, 255], (shape[0], *[1] * (len(shape) - 1)))
        return levels - points

    def constants(self, acc: np.ndarray, *, residual: bool) -> tuple[np.ndarray, np.ndarray]:
        multiplier = self.rng.uniform(0.5, 1.5, acc.shape[-1]) * 90 / np.abs(acc).max()
        levels = [131, 119, 4, 251]
        if residual:
            return multiplier.astype(np.float32) * GUARD, np.array([*levels, 77], np.int32)
        return multiplier.astype(np.float32), np.array(levels, np.int32)

    def conv(self, case: Conv) -> relax.Call:
        data = self.rng.integers(0, 256, case.shape).astype(np.uint8)
        weight = self.weights(*case.filters, 1 if case.depthwise else case.shape[3])
        bias = self.rng.integers(-5000, 5000, case.filters[0]).astype(np.int32)
        acc = conv_sums(case, data, weight, 131, depthwise=case.depthwise) + bias
        multiplier, levels = self.constants(acc, residual=case.residual)
        stored, offsets = fit_weights(weight, depthwise=case.depthwise)
        x = self.parameter(data)
        rest = []
        residual = None
        if case.residual:
            residual = self.rng.integers(0, 256, acc.shape).astype(np.uint8)
            rest = [self.parameter(residual), self.parameter(FACTOR)]
        self.expected.append(requantized(acc, multiplier, levels, "uint8", residual, FACTOR))
        geometry = {"strides": case.strides, "padding": case.padding, "dilation": case.dilation}
        under = None
        if not case.depthwise:
            under = WindowSums(self.builder.emit).of_windows(
                x, case.name, zero_point=131, taps=case.filters[1:], **geometry
            )
        return operators.conv2d_int8(
            x,
            relax.const(stored),
            self.parameter(bias),
            self.parameter(multiplier),
            self.parameter(levels),
            *rest,
            weight_offsets=None if offsets is None else self.parameter(offsets),
            window_sums=under,
            groups=case.shape[3] if case.depthwise else 1,
            **geometry,
        )

    def dense(self, shape: tuple[int, ...], channels: int, *, residual: bool) -> relax.Call:
        data = self.rng.integers(0, 256, shape).astype(np.uint8)
        weight = self.weights(channels, shape[-1])
        bias = self.rng.integers(-5000, 5000, channels).astype(np.int32)
        acc = data.astype(np.int64) @ weight.T + bias
        multiplier, levels = self.constants(acc, residual=residual)
        stored, offsets = fit_weights(weight, depthwise=False)
        x = self.parameter(data)
        rest, added = [], None
        if residual:
            added = self.rng.integers(0, 256, acc.shape).astype(np.uint8)
            rest = [self.parameter(added), self.parameter(FACTOR)]
        self.expected.append(requantized(acc, multiplier, levels, "uint8", added, FACTOR))
        return operators.dense_int8(
            x,
            relax.const(stored),
            self.parameter(bias),
            self.parameter(multiplier),
            self.parameter(levels),
            *rest,
            weight_offsets=self.parameter(offsets),
            window_sums=WindowSums(self.builder.emit).of_rows(x, "dense"),
        )

    def module(self) -> tvm.IRModule:
        """All layers in one function."""
        builder = self.builder
        results: list[relax.Expr] = []
        with builder.function("main"):
            with builder.dataflow():
                results += [builder.emit(self.conv(case)) for case in CONVS]
                results.append(builder.emit(self.dense((3, 7), 5, residual=False)))
                results.append(builder.emit(self.dense((2, 3, 12), 17, residual=True)))
                out = builder.emit_output(relax.Tuple(results))
            builder.emit_func_output(out, self.params)
        return builder.get()


@pytest.mark.parametrize("name", TARGETS)
def test_weights_with_zero_points_equal_the_oracle(name: str) -> None:
    target = TARGETS[name]
    lacking = missing(target.features, target.arch)
    if lacking:
        pytest.skip(f"this machine lacks {', '.join(lacking)}")
    network = Network()
    module = network.module()
    scheduled = pipeline.schedule(pipeline.lower(module, target, threads=2), target, threads=2)
    assert not [d.reason for d in scheduled.decisions if d.reason]
    executable = pipeline.build_executable(scheduled.module, target, threads=2)
    vm = relax.VirtualMachine(executable, tvm.cpu())
    found = vm["main"](*[tvm.runtime.tensor(a) for a in network.arrays])
    for got, want in zip(found, network.expected, strict=True):
        np.testing.assert_array_equal(got.numpy(), want)
        assert len(np.unique(want)) > 10, "the case must not saturate"


def test_stored_weights_and_offsets_are_the_weights() -> None:
    weight = np.array([[-4, 243], [-128, 127], [-255, 0], [5, 200]])
    stored, offsets = fit_weights(weight, depthwise=False)
    assert offsets is not None
    assert (stored.dtype, offsets.tolist()) == (np.int8, [116, 0, -127, 73])
    np.testing.assert_array_equal(stored + offsets[:, None], weight)
    wide, none = fit_weights(weight, depthwise=True)
    assert (wide.dtype, none) == (np.int16, None)
    np.testing.assert_array_equal(wide, weight)


def test_weights_of_int8_have_no_offsets() -> None:
    stored, offsets = fit_weights(np.array([[-128, 127], [3, 4]]), depthwise=True)
    assert (stored.dtype, offsets) == (np.int8, None)


def test_weights_of_more_than_eight_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="span 256 numbers, not 257"):
        fit_weights(np.array([[0, 256]]), depthwise=False)


def test_largest_sums_count_what_offsets_add_before_it_cancels() -> None:
    found = largest_sums(np.array([[-120, 127]], np.int8), np.array([9.0]), np.array([116]))
    assert found.tolist() == [255 * 247 + 9 + 116 * 510]


def test_sums_of_two_layers_that_read_one_tensor_alike_are_taken_once() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 5, 5, 3), "uint8"))
    geometry = {"strides": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1)}
    with builder.function("main", [x]):
        with builder.dataflow():
            found = WindowSums(builder.emit)
            first = found.of_windows(x, "a", zero_point=7, taps=(3, 3), **geometry)
            again = found.of_windows(x, "b", zero_point=7, taps=(3, 3), **geometry)
            other = found.of_windows(x, "c", zero_point=8, taps=(3, 3), **geometry)
            out = builder.emit_output(first)
        builder.emit_func_output(out)
    assert first.same_as(again)
    assert not first.same_as(other)
    assert [int(extent) for extent in first.ty.shape] == [1, 5, 5, 1]


def test_offsets_are_refused_without_sums_and_in_depthwise_convolutions() -> None:
    def tensor(*shape: int, dtype: str) -> relax.Expr:
        return relax.const(np.zeros(shape, dtype))

    arguments = [
        relax.Var("x", relax.TensorType((1, 5, 5, 3), "uint8")),
        tensor(3, 3, 3, 1, dtype="int8"),
        tensor(3, dtype="int32"),
        tensor(3, dtype="float32"),
        tensor(4, dtype="int32"),
    ]
    offsets = tensor(3, dtype="int32")
    with pytest.raises(ModelError, match="offsets of the weights and the sums that they multiply"):
        operators.conv2d_int8(*arguments, groups=3, weight_offsets=offsets)
    under = relax.Var("s", relax.TensorType((1, 3, 3, 1), "int32"))
    with pytest.raises(ModelError, match="one filter for each channel have no offsets"):
        operators.conv2d_int8(*arguments, groups=3, weight_offsets=offsets, window_sums=under)
