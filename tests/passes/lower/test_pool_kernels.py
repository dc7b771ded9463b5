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
    # Long rows, whose ends are loops of their own in NCHW.
    ((3, 5, 7, 67), (3, 3), (1, 1), (1, 1, 1, 1)),
    ((1, 3, 1, 41), (1, 5), (1, 3), (0, 2, 0, 1)),
    ((1, 2, 11, 53), (5, 4), (3, 2), (2, 3, 2, 0)),
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
    # Short rows fill no vectors: they are turned, and turned back.
    columns = (x[3] + padding[1] + padding[3] - taps[1]) // strides[1] + 1
    assert ("pooling" if layout == "NCHW" and columns >= 8 else "window") in rules
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


@pytest.mark.parametrize("width", [11, 38])
def test_maximum_in_ceil_mode_equals_the_oracle(
    width: int, run_op: RunOp, rng: np.random.Generator
) -> None:
    data = rng.standard_normal((1, 19, 12, width)).astype("float32")
    actual, rules = run_op(
        lambda v: relax.op.nn.max_pool2d(v, [3, 3], strides=2, padding=1, ceil_mode=True), data
    )
    assert ("pooling" if width > 20 else "window") in rules
    exact = windows(data, (3, 3), (2, 2), (1, 1, 1, 1), -np.inf, ceil=True).max((-2, -1))
    np.testing.assert_array_equal(actual, exact)


@pytest.mark.parametrize("width", [13, 37])
def test_dilated_maximum_equals_the_oracle(
    width: int, run_op: RunOp, rng: np.random.Generator
) -> None:
    data = rng.standard_normal((2, 3, 9, width)).astype("float32")
    actual, rules = run_op(
        lambda v: relax.op.nn.max_pool2d(v, [3, 2], padding=[3, 1, 3, 1], dilation=[2, 3]), data
    )
    assert rules == ["pooling"]
    padded = np.pad(data, ((0, 0), (0, 0), (3, 3), (1, 1)), constant_values=-np.inf)
    every = np.lib.stride_tricks.sliding_window_view(padded, (5, 4), axis=(2, 3))
    np.testing.assert_array_equal(actual, every[..., ::2, ::3].max((-2, -1)))


def test_what_follows_joins_the_kernel_over_planes(run_op: RunOp, rng: np.random.Generator) -> None:
    data, other = (rng.standard_normal((1, 5, 9, 33)).astype("float32") for _ in range(2))
    actual, rules = run_op(
        lambda x, y: relax.op.nn.relu(
            relax.op.add(relax.op.nn.avg_pool2d(x, [3, 3], padding=1, count_include_pad=False), y)
        ),
        data,
        other,
    )
    assert rules == ["pooling"]
    sums = windows(data.astype("float64"), (3, 3), (1, 1), (1, 1, 1, 1), 0.0).sum((-2, -1))
    taps = windows(np.ones_like(data), (3, 3), (1, 1), (1, 1, 1, 1), 0.0).sum((-2, -1))
    np.testing.assert_allclose(actual, np.maximum(sums / taps + other, 0), rtol=1e-5, atol=1e-6)


def test_an_infinity_at_the_border_stays_in_its_windows(run_op: RunOp) -> None:
    data = np.zeros((1, 1, 8, 16), np.float32)
    data[0, 0, 0, 0] = np.inf
    actual, _ = run_op(lambda v: relax.op.nn.avg_pool2d(v, [3, 3], padding=1), data)
    expected = np.zeros((8, 16), np.float32)
    expected[:2, :2] = np.inf
    np.testing.assert_array_equal(actual[0, 0], expected)
