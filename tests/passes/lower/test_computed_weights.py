"""Convolutions and products with weights that the model computes, against numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax

RunOp = Callable[..., tuple[np.ndarray, list[str]]]


def conv_oracle(
    x: np.ndarray, weight: np.ndarray, *, stride: int, padding: int, groups: int
) -> np.ndarray:
    """Convolve [N, C, H, W] with [K, C / groups, R, S] in float64."""
    padded = np.pad(x.astype("float64"), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
    windows = windows[:, :, ::stride, ::stride]
    parts = [
        np.einsum("nchwrs,kcrs->nkhw", data, own.astype("float64"))
        for data, own in zip(
            np.split(windows, groups, axis=1), np.split(weight, groups), strict=True
        )
    ]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    ("x", "k", "taps", "stride", "groups", "rule"),
    [((1, 7, 13, 11), 5, (3, 3), 1, 1, "conv2d"), ((3, 33, 9, 8), 48, (1, 1), 2, 1, "conv2d"),
     ((1, 3, 1, 1), 17, (1, 1), 1, 1, "conv2d"), ((2, 16, 10, 9), 64, (5, 3), 1, 1, "conv2d"),
     ((1, 19, 13, 11), 19, (3, 3), 1, 19, "window"), ((1, 6, 8, 7), 9, (3, 3), 1, 3, "conv2d"),
     ((2, 32, 7, 7), 64, (3, 3), 2, 2, "conv2d")],
    ids=str,
)  # fmt: skip
def test_convolution_with_computed_weights_takes_the_template(
    x: tuple[int, ...], k: int, taps: tuple[int, int], stride: int, groups: int, rule: str,
    run_op: RunOp, rng: np.random.Generator,
) -> None:  # fmt: skip
    data = rng.standard_normal(x).astype("float32")
    weight = rng.standard_normal((k, x[1] // groups, *taps)).astype("float32")
    bias = rng.standard_normal((1, k, 1, 1)).astype("float32")

    def make(data: relax.Expr, weight: relax.Expr) -> relax.Expr:
        positive = relax.op.nn.relu(weight)
        y = relax.op.nn.conv2d(data, positive, strides=stride, padding=1, groups=groups)
        return relax.op.nn.relu(relax.op.add(y, relax.const(bias)))

    actual, rules = run_op(make, data, weight)
    assert rule in rules
    exact = conv_oracle(data, np.maximum(weight, 0), stride=stride, padding=1, groups=groups)
    # Sums of at most 297 products of size about 1.
    np.testing.assert_allclose(actual, np.maximum(exact + bias, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(
    ("left", "right"),
    [((37, 19), (19, 23)), ((1, 64), (64, 128)), ((5, 33), (33, 1)), ((64,), (64, 10)),
     ((7, 19), (19,)), ((19,), (19,)), ((2, 3, 5, 19), (19, 17)), ((2, 3, 5, 19), (1, 1, 19, 17)),
     ((2, 3, 5, 19), (3, 19, 17)), ((1, 3, 5, 19), (2, 1, 19, 16)), ((4, 19), (3, 19, 8)),
     ((3, 1, 19), (3, 19, 40)), ((2, 3, 4, 8), (8,))],
    ids=str,
)  # fmt: skip
def test_product_of_any_ranks_equals_the_oracle(
    left: tuple[int, ...], right: tuple[int, ...], constant: bool, run_op: RunOp,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    a = rng.standard_normal(left).astype("float32")
    b = rng.standard_normal(right).astype("float32")
    if constant:
        actual, rules = run_op(lambda x: relax.op.matmul(x, relax.const(b)), a)
    else:
        actual, rules = run_op(lambda x, y: relax.op.matmul(x, y), a, b)
    assert set(rules) - {"generic", "copies", "none"}  # a template of products, or of sums
    exact = np.matmul(a.astype("float64"), b)
    assert actual.shape == exact.shape
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-4)
