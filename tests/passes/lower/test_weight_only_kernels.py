"""Kernels that decode their weights, against numpy, on shapes that fit no tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from tvm import relax

from hone.passes.quantize.decode_operator import Decoded
from hone.passes.quantize.weight_schemes import (
    Granularity,
    Scheme,
    WeightOptions,
    quantize_weights,
)

RunOp = Callable[..., tuple[np.ndarray, list[str]]]

INT4 = WeightOptions(bits=4)
INT4_GROUPS = WeightOptions(bits=4, granularity=Granularity.GROUP, group_size=32)
ODD_GROUPS = WeightOptions(
    bits=4, granularity=Granularity.GROUP, group_size=12, symmetric=False, power_of_two=True
)
INT8 = WeightOptions(bits=8, symmetric=False)
INT2 = WeightOptions(bits=2, granularity=Granularity.TENSOR, symmetric=False)
TERNARY = WeightOptions(scheme=Scheme.TERNARY, power_of_two=True)
BINARY = WeightOptions(scheme=Scheme.BINARY)
BINARY_GROUPS = WeightOptions(scheme=Scheme.BINARY, granularity=Granularity.GROUP, group_size=24)


def decoded(weight: np.ndarray, axis: int, options: WeightOptions) -> Decoded:
    first = np.moveaxis(weight, axis, 0)
    levels = quantize_weights(first.reshape(len(first), -1), options)
    return Decoded(levels=levels, shape=weight.shape, axis=axis)


@dataclass(frozen=True, kw_only=True)
class Product:
    id: str
    x: tuple[int, ...]
    k: int
    options: WeightOptions


PRODUCTS = [
    Product(id="one row, channel scales", x=(1, 64), k=48, options=INT4),
    Product(id="one row, one output", x=(1, 7), k=1, options=INT4),
    Product(id="one row, groups", x=(1, 128), k=40, options=INT4_GROUPS),
    Product(id="three rows, odd groups, a short last one", x=(3, 53), k=33, options=ODD_GROUPS),
    Product(id="five rows, odd groups, a short last one", x=(5, 53), k=33, options=ODD_GROUPS),
    Product(id="prime rows", x=(19, 37), k=70, options=INT8),
    Product(id="two bits, one scale", x=(2, 41), k=17, options=INT2),
    Product(id="ternary", x=(1, 96), k=24, options=TERNARY),
    Product(id="binary, depth fills no word", x=(1, 45), k=20, options=BINARY),
    Product(id="binary groups", x=(7, 61), k=35, options=BINARY_GROUPS),
    Product(id="batch of three", x=(3, 4, 24), k=9, options=INT4_GROUPS),
    Product(id="large enough for two threads", x=(1, 1000), k=520, options=INT4_GROUPS),
    Product(id="many rows for two threads", x=(64, 96), k=100, options=INT4),
]  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.id)
def test_a_product_equals_the_oracle_with_bias_and_relu(
    case: Product, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(case.x).astype("float32")
    weight = decoded(rng.standard_normal((case.x[-1], case.k)).astype("float32"), 1, case.options)
    bias = rng.standard_normal(case.k).astype("float32")

    def make(x: relax.Expr) -> relax.Expr:
        return relax.op.nn.relu(relax.op.add(relax.op.matmul(x, weight.call()), relax.const(bias)))

    actual, rules = run_op(make, x)
    assert "weight_only" in rules
    real = weight.real().astype("float64")
    exact = np.maximum(x.astype("float64") @ real + bias, 0)
    # A float32 sum of n terms is off by at most n units of 2**-24 times the sum of magnitudes; a
    # zero point or a scale adds two roundings to each term.
    bound = (case.x[-1] + 4) * 2.0**-23 * (np.abs(x).astype("float64") @ np.abs(real) + 1)
    assert (np.abs(actual - exact) <= bound).all()


@dataclass(frozen=True, kw_only=True)
class Conv:
    id: str
    x: tuple[int, int, int, int]
    k: int
    options: WeightOptions
    taps: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)


CONVS = [
    Conv(id="primes", x=(1, 13, 11, 7), k=5, options=INT4),
    Conv(id="one pixel", x=(1, 1, 1, 3), k=17, taps=(1, 1), padding=(0, 0, 0, 0), options=INT4),
    Conv(id="one channel, binary", x=(1, 8, 8, 1), k=16, options=BINARY),
    Conv(id="groups inside a tap", x=(1, 9, 9, 64), k=33, options=INT4_GROUPS),
    Conv(id="groups across taps", x=(3, 7, 6, 5), k=16, options=ODD_GROUPS),
    Conv(id="stride two, ternary", x=(1, 15, 13, 6), k=24, strides=(2, 2), options=TERNARY),
    Conv(id="uneven padding", x=(1, 8, 9, 8), k=8, padding=(2, 0, 1, 3), options=INT8),
    Conv(id="dilated, two bits", x=(1, 14, 12, 4), k=20, dilation=(3, 2), padding=(3, 2, 3, 2),
         options=INT2),
    Conv(id="binary groups, batch", x=(2, 6, 5, 32), k=19, options=BINARY_GROUPS),
    Conv(id="large enough for two threads", x=(1, 14, 14, 48), k=64, options=INT4),
]  # fmt: skip


def conv_oracle(x: np.ndarray, weight: np.ndarray, case: Conv) -> np.ndarray:
    """Convolve [N, H, W, C] with [K, R, S, C] in float64, tap by tap."""
    top, left, bottom, right = case.padding
    padded = np.pad(x.astype("float64"), ((0, 0), (top, bottom), (left, right), (0, 0)))
    _, taps_h, taps_w, _ = weight.shape
    height, width = (
        (padded.shape[1 + i] - case.dilation[i] * (case.taps[i] - 1) - 1) // case.strides[i] + 1
        for i in range(2)
    )
    out = np.zeros((x.shape[0], height, width, case.k))
    for r in range(taps_h):
        for s in range(taps_w):
            top, left = r * case.dilation[0], s * case.dilation[1]
            rows = slice(top, top + (height - 1) * case.strides[0] + 1, case.strides[0])
            columns = slice(left, left + (width - 1) * case.strides[1] + 1, case.strides[1])
            out += padded[:, rows, columns] @ weight[:, r, s].astype("float64").T
    return out


@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
def test_a_convolution_equals_the_oracle_with_residual_and_relu(
    case: Conv, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(case.x).astype("float32")
    shape = (case.k, *case.taps, case.x[-1])
    weight = decoded(rng.standard_normal(shape).astype("float32"), 0, case.options)
    real = weight.real()
    exact = conv_oracle(x, real, case)
    other = rng.standard_normal(exact.shape).astype("float32")

    def make(x: relax.Expr, other: relax.Expr) -> relax.Expr:
        y = relax.op.nn.conv2d(
            x, weight.call(), strides=case.strides, padding=case.padding, dilation=case.dilation,
            data_layout="NHWC", kernel_layout="OHWI",
        )  # fmt: skip
        return relax.op.nn.relu(relax.op.add(y, other))

    actual, rules = run_op(make, x, other)
    assert "conv2d" in rules
    terms = real[0].size + 4
    bound = terms * 2.0**-23 * (conv_oracle(np.abs(x), np.abs(real), case) + 1)
    assert (np.abs(actual - np.maximum(exact + other, 0)) <= bound).all()


@pytest.mark.parametrize("options", [INT4, ODD_GROUPS, INT8, INT2, TERNARY, BINARY], ids=str)
def test_rows_of_a_table_are_decoded_exactly(options, run_op, rng) -> None:
    table = decoded(rng.standard_normal((11, 29)).astype("float32"), 0, options)
    indices = np.array([[3, 10, 0], [3, 7, 1]], np.int64)

    def make(indices: relax.Expr) -> relax.Expr:
        return relax.op.take(table.call(), indices, axis=0)

    actual, _rules = run_op(make, indices)
    np.testing.assert_array_equal(actual, table.real()[indices])


@pytest.mark.parametrize(("mode", "rows"), [("clip", [0, 4, 0, 4]), ("wrap", [4, 4, 3, 0])])
def test_an_index_beyond_a_table_is_clipped_or_wrapped(mode, rows, run_op, rng) -> None:
    table = decoded(rng.standard_normal((5, 8)).astype("float32"), 0, INT4)
    indices = np.array([-1, 4, -2, 5], np.int32)

    actual, _rules = run_op(lambda i: relax.op.take(table.call(), i, axis=0, mode=mode), indices)
    np.testing.assert_array_equal(actual, table.real()[rows])


@pytest.mark.parametrize("options", [ODD_GROUPS, INT8, BINARY], ids=str)
def test_a_reader_without_a_kernel_gets_the_float_weight(options, run_op, rng) -> None:
    weight = decoded(rng.standard_normal((4, 3, 3, 2)).astype("float32"), 0, options)
    x = rng.standard_normal((4, 3, 3, 2)).astype("float32")

    def make(x: relax.Expr) -> relax.Expr:
        return relax.op.add(x, weight.call())

    actual, _rules = run_op(make, x)
    np.testing.assert_array_equal(actual, x + weight.real())


@pytest.mark.parametrize("options", [INT4_GROUPS, BINARY], ids=str)
def test_an_infinite_activation_is_not_lost(options, run_op, rng) -> None:
    weight = decoded(rng.standard_normal((37, 5)).astype("float32"), 1, options)
    x = rng.standard_normal((2, 37)).astype("float32")
    x[0, -1] = np.inf

    actual, _rules = run_op(lambda x: relax.op.matmul(x, weight.call()), x)
    assert not np.isfinite(actual[0]).any()
    assert np.isfinite(actual[1]).all()


def test_tiny_activations_of_the_last_field_count(run_op) -> None:
    # 2^-90 times the 2^-28 of a field is still a normal number.
    x = np.full((1, 8), 2.0**-90, np.float32)
    weight = decoded(np.ones((8, 3), np.float32), 1, INT4)
    actual, _rules = run_op(lambda x: relax.op.matmul(x, weight.call()), x)
    np.testing.assert_allclose(actual, x @ weight.real(), rtol=1e-5)
