"""Binary weights with binary activations, against numpy: integers, so exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax

from hone.passes.lower.weight_signs import pack_signs
from hone.passes.quantize.binarize import binarize
from hone.passes.quantize.decode_operator import Decoded
from hone.passes.quantize.weight_schemes import WeightLevels

RunOp = Callable[..., tuple[np.ndarray, list[str]]]


def signs(values: np.ndarray) -> np.ndarray:
    return np.where(values >= 0, 1, -1).astype(np.int64)


def of_signs(weight: np.ndarray, axis: int) -> Decoded:
    """Return binary weights with scales 1, 2, 1, 2, …, which keep sums integer."""
    first = np.moveaxis(weight, axis, 0)
    scale = np.resize(np.array([1.0, 2.0], np.float32), (len(first), 1))
    levels = WeightLevels(
        levels=signs(first).reshape(len(first), -1).astype(np.int8),
        scale=scale,
        zero_point=None,
        bits=1,
        group=first[0].size,
    )
    return Decoded(levels=levels, shape=weight.shape, axis=axis)


def test_a_bit_stands_for_each_minus_one() -> None:
    levels = np.ones((2, 33), np.int8)
    levels[0, [0, 5, 32]] = -1
    assert pack_signs(levels).tolist() == [[1 + 32, 1], [0, 0]]


@pytest.mark.parametrize(
    ("x", "k"), [((1, 64), 48), ((1, 7), 3), ((3, 70), 19), ((2, 3, 33), 40), ((64, 96), 100)]
)
def test_a_product_of_signs_is_exact(x, k, run_op: RunOp, rng) -> None:
    data = rng.standard_normal(x).astype("float32")
    data.reshape(-1)[:2] = 0.0, -0.0
    weight = of_signs(rng.standard_normal((x[-1], k)), 1)
    actual, rules = run_op(lambda v: relax.op.matmul(binarize(v), weight.call()), data)
    assert "weight_only" in rules
    np.testing.assert_array_equal(actual, signs(data) @ weight.real())


@pytest.mark.parametrize(
    ("x", "k", "taps", "strides", "dilation"),
    [
        ((1, 9, 8, 7), 5, (3, 3), (1, 1), (1, 1)),
        ((3, 7, 6, 33), 18, (3, 2), (2, 1), (1, 1)),
        ((1, 1, 1, 3), 17, (1, 1), (1, 1), (1, 1)),
        ((1, 11, 9, 64), 40, (3, 3), (1, 1), (2, 3)),
    ],
)
def test_a_convolution_of_signs_is_exact(x, k, taps, strides, dilation, run_op: RunOp, rng) -> None:
    data = rng.standard_normal(x).astype("float32")
    weight = of_signs(rng.standard_normal((k, *taps, x[-1])), 0)

    def make(v: relax.Expr) -> relax.Expr:
        return relax.op.nn.conv2d(
            binarize(v), weight.call(), strides=strides, dilation=dilation,
            data_layout="NHWC", kernel_layout="OHWI",
        )  # fmt: skip

    actual, rules = run_op(make, data)
    assert rules == ["conv2d"]
    span = [d * (t - 1) + 1 for d, t in zip(dilation, taps, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(signs(data), span, axis=(1, 2))
    windows = windows[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]
    np.testing.assert_array_equal(actual, np.einsum("nhwcrs,krsc->nhwk", windows, weight.real()))


def test_signs_without_a_kernel_are_floats(run_op: RunOp, rng) -> None:
    data = rng.standard_normal((3, 5)).astype("float32")
    data[0, 0] = np.nan
    actual, _rules = run_op(lambda v: relax.op.negative(binarize(v)), data)
    np.testing.assert_array_equal(actual, np.where(data >= 0, -1, 1))


def test_padded_signs_fall_back_to_floats(run_op: RunOp, rng) -> None:
    data = rng.standard_normal((1, 5, 4, 3)).astype("float32")
    weight = of_signs(rng.standard_normal((4, 3, 3, 3)), 0)

    def make(v: relax.Expr) -> relax.Expr:
        return relax.op.nn.conv2d(
            binarize(v), weight.call(), padding=1, data_layout="NHWC", kernel_layout="OHWI"
        )

    actual, _rules = run_op(make, data)
    padded = np.pad(signs(data), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    np.testing.assert_array_equal(actual, np.einsum("nhwcrs,krsc->nhwk", windows, weight.real()))
