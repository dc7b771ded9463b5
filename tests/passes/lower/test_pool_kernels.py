"""Pooling in both layouts against numpy: windows, strides, padding, ceil mode."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax

RunOp = Callable[..., tuple[np.ndarray, list[str]]]


def windows(
    x: np.ndarray, taps: tuple[int, int], strides: tuple[int, int],
    padding: tuple[int, int, int, int], value: float, *, ceil: bool = False,
) -> np.ndarray:  # fmt: skip
    """Return the windows ``[N, C, OH, OW, R, S]`` of a padded image."""
    top, left, bottom, right = padding
    more = []
    for size, tap, stride, pads in zip(
        x.shape[2:], taps, strides, ((top, bottom), (left, right)), strict=True
    ):
        rest = (size + sum(pads) - tap) % stride
        more.append((stride - rest) % stride if ceil else 0)
    padded = np.pad(
        x, ((0, 0), (0, 0), (top, bottom + more[0]), (left, right + more[1])),
        constant_values=value,
    )  # fmt: skip
    every = np.lib.stride_tricks.sliding_window_view(padded, taps, axis=(2, 3))
    return every[:, :, :: strides[0], :: strides[1]]


CASES = [
    ((1, 7, 13, 11), (3, 3), (2, 2), (1, 1, 1, 1)),
    ((3, 16, 9, 8), (2, 2), (2, 2), (0, 0, 0, 0)),
    ((1, 33, 10, 12), (5, 3), (1, 2), (2, 1, 2, 0)),
    ((2, 5, 1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
    ((1, 64, 7, 7), (7, 7), (1, 1), (3, 3, 3, 3)),
    # Few vectors of channels, which are taken together.
    ((2, 32, 11, 14), (3, 3), (2, 2), (1, 1, 1, 1)),
    ((1, 48, 28, 30), (3, 2), (1, 2), (1, 0, 1, 0)),
]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("x", "taps", "strides", "padding"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["max", "mean", "mean of all"])
def test_pooling_equals_the_oracle(
    kind: str, x: tuple[int, ...], taps: tuple[int, int], strides: tuple[int, int],
    padding: tuple[int, int, int, int], layout: str, run_op: RunOp, rng: np.random.Generator,
) -> None:  # fmt: skip
    data = rng.standard_normal(x).astype("float32")
    given = data if layout == "NCHW" else data.transpose(0, 2, 3, 1).copy()

    def make(v: relax.Expr) -> relax.Expr:
        where = {"pool_size": taps, "strides": strides, "padding": padding, "layout": layout}
        if kind == "max":
            return relax.op.nn.max_pool2d(v, **where)
        return relax.op.nn.avg_pool2d(v, **where, count_include_pad=kind == "mean of all")

    actual, rules = run_op(make, given)
    assert "window" in rules
    if kind == "max":
        exact = windows(data, taps, strides, padding, -np.inf).max((-2, -1))
    else:
        counted = np.ones_like(data) if kind == "mean" else np.ones((1, 1, *data.shape[2:]))
        outside = 0.0 if kind == "mean" else 1.0
        sums = windows(data.astype("float64"), taps, strides, padding, 0.0).sum((-2, -1))
        exact = sums / windows(counted, taps, strides, padding, outside).sum((-2, -1))
    if layout == "NHWC":
        exact = exact.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-6)


def test_maximum_in_ceil_mode_equals_the_oracle(run_op: RunOp, rng: np.random.Generator) -> None:
    data = rng.standard_normal((1, 19, 12, 11)).astype("float32")
    actual, rules = run_op(
        lambda v: relax.op.nn.max_pool2d(v, [3, 3], strides=2, padding=1, ceil_mode=True), data
    )
    assert "window" in rules
    exact = windows(data, (3, 3), (2, 2), (1, 1, 1, 1), -np.inf, ceil=True).max((-2, -1))
    np.testing.assert_array_equal(actual, exact)
