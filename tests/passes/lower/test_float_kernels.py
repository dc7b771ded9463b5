"""Every float kernel against a numpy oracle, on shapes that fit no tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import erf

import numpy as np
import pytest
from tvm import relax

RunOp = Callable[..., tuple[np.ndarray, list[str]]]


def conv_oracle(
    x: np.ndarray,
    weight: np.ndarray,
    *,
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> np.ndarray:
    """Convolve [N, C, H, W] with [K, C / groups, R, S] in float64, tap by tap."""
    top, left, bottom, right = padding
    padded = np.pad(x.astype("float64"), ((0, 0), (0, 0), (top, bottom), (left, right)))
    channels, depth, taps_h, taps_w = weight.shape
    height = (padded.shape[2] - dilation[0] * (taps_h - 1) - 1) // strides[0] + 1
    width = (padded.shape[3] - dilation[1] * (taps_w - 1) - 1) // strides[1] + 1
    out = np.zeros((x.shape[0], channels, height, width))
    per_group = channels // groups
    for k in range(channels):
        first = k // per_group * depth
        for r in range(taps_h):
            for s in range(taps_w):
                rows = slice(
                    r * dilation[0], r * dilation[0] + (height - 1) * strides[0] + 1, strides[0]
                )
                cols = slice(
                    s * dilation[1], s * dilation[1] + (width - 1) * strides[1] + 1, strides[1]
                )
                window = padded[:, first : first + depth, rows, cols]
                out[:, k] += np.einsum("nchw,c->nhw", window, weight[k, :, r, s].astype("float64"))
    return out


@dataclass(frozen=True, kw_only=True)
class Conv:
    id: str
    x: tuple[int, int, int, int]
    k: int
    taps: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    rule: str = "conv2d"


CONVS = [
    Conv(id="primes", x=(1, 7, 13, 11), k=5),
    Conv(id="one pixel", x=(1, 3, 1, 1), k=17, taps=(1, 1), padding=(0, 0, 0, 0)),
    Conv(id="channels one over a vector", x=(1, 17, 9, 9), k=33),
    Conv(id="batch of three", x=(3, 5, 7, 6), k=16),
    Conv(id="stride two, odd size", x=(1, 6, 15, 13), k=24, strides=(2, 2)),
    Conv(id="one by one, strided", x=(1, 32, 9, 9), k=48, taps=(1, 1), strides=(2, 2),
         padding=(0, 0, 0, 0)),
    Conv(id="uneven padding", x=(1, 4, 8, 9), k=8, padding=(2, 0, 1, 3)),
    Conv(id="dilated", x=(1, 4, 14, 12), k=20, dilation=(3, 2), padding=(3, 2, 3, 2)),
    Conv(id="tall taps", x=(1, 3, 17, 19), k=10, taps=(7, 2), padding=(3, 0, 3, 1)),
    Conv(id="large enough for two threads", x=(1, 24, 29, 31), k=40, rule="winograd"),
    Conv(id="winograd, batch of three, odd size", x=(3, 48, 13, 11), k=37, rule="winograd"),
    Conv(id="winograd, no padding", x=(1, 64, 16, 16), k=64, padding=(0, 0, 0, 0),
         rule="winograd"),
    Conv(id="winograd, uneven padding", x=(1, 32, 17, 9), k=48, padding=(2, 0, 1, 3),
         rule="winograd"),
    Conv(id="winograd, weights larger than the image", x=(1, 128, 7, 7), k=144, rule="winograd"),
    Conv(id="weights requested ahead", x=(1, 509, 3, 5), k=277, taps=(1, 1),
         padding=(0, 0, 0, 0)),
    Conv(id="depthwise", x=(1, 19, 13, 11), k=19, groups=19, rule="window"),
    Conv(id="depthwise, stride two, batch", x=(2, 32, 12, 14), k=32, groups=32, strides=(2, 2),
         rule="window"),
    Conv(id="grouped", x=(1, 6, 8, 7), k=9, groups=3),
    Conv(id="grouped, vectors in a group", x=(3, 24, 9, 7), k=72, groups=2, strides=(2, 2)),
    Conv(id="grouped, one by one", x=(1, 32, 5, 5), k=32, taps=(1, 1), padding=(0, 0, 0, 0),
         groups=8),
    Conv(id="depthwise with multiplier", x=(1, 5, 8, 7), k=10, groups=5),
]  # fmt: skip


@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
def test_conv2d_equals_the_oracle_with_bias_residual_and_relu(
    case: Conv, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(case.x).astype("float32")
    weight = rng.standard_normal((case.k, case.x[1] // case.groups, *case.taps)).astype("float32")
    bias = rng.standard_normal((1, case.k, 1, 1)).astype("float32")
    exact = conv_oracle(
        x, weight, strides=case.strides, padding=case.padding, dilation=case.dilation,
        groups=case.groups,
    )  # fmt: skip
    other = rng.standard_normal(exact.shape).astype("float32")

    def make(x: relax.Expr, other: relax.Expr) -> relax.Expr:
        y = relax.op.nn.conv2d(
            x, relax.const(weight), strides=case.strides, padding=case.padding,
            dilation=case.dilation, groups=case.groups,
        )  # fmt: skip
        return relax.op.nn.relu(relax.op.add(relax.op.add(y, relax.const(bias)), other))

    actual, rules = run_op(make, x, other)
    assert any(rule.startswith(case.rule) for rule in rules)
    # A float32 sum of n terms of size about 1 is off by at most n units of 2**-24 times the sum
    # of magnitudes; F(4x4) by some 1.4e-6 of the largest output.
    atol = max(1e-4, 3e-6 * float(np.abs(exact).max()))
    np.testing.assert_allclose(actual, np.maximum(exact + bias + other, 0), rtol=1e-4, atol=atol)


@pytest.mark.parametrize(
    ("x", "k"),
    [((1, 7), 3), ((1, 64), 10), ((5, 33), 17), ((197, 24), 40), ((2, 37, 19), 23),
     ((64, 1, 9), 16), ((1, 128, 96), 160), ((3, 701), 809), ((1, 517), 10), ((1, 1, 103), 37),
     ((1, 36), 64)],
    ids=str,
)  # fmt: skip
def test_dense_equals_the_oracle_with_bias(
    x: tuple[int, ...], k: int, run_op: RunOp, rng: np.random.Generator
) -> None:
    data = rng.standard_normal(x).astype("float32")
    weight = rng.standard_normal((x[-1], k)).astype("float32")
    bias = rng.standard_normal(k).astype("float32")
    actual, rules = run_op(
        lambda v: relax.op.add(relax.op.matmul(v, relax.const(weight)), relax.const(bias)), data
    )
    assert {"dense", "single_row", "pairs"} & set(rules)
    # One row and few channels: several sums at once, of which 517 elements leave five over.
    assert "single_row" in rules or x not in ((1, 64), (1, 517))
    np.testing.assert_allclose(actual, data.astype("float64") @ weight + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 5, 7), (2, 7, 3)), ((1, 3, 37, 16), (1, 3, 16, 37)), ((3, 16, 16), (3, 16, 32)),
     ((1, 1, 1), (1, 1, 1)), ((1, 4, 128, 64), (1, 4, 64, 128))],
    ids=str,
)  # fmt: skip
def test_batch_matmul_equals_the_oracle_when_both_sides_are_activations(
    left: tuple[int, ...], right: tuple[int, ...], run_op: RunOp, rng: np.random.Generator
) -> None:
    a = rng.standard_normal(left).astype("float32")
    b = rng.standard_normal(right).astype("float32")
    actual, rules = run_op(
        lambda a, b: relax.op.multiply(relax.op.matmul(a, b), relax.const(0.5)), a, b
    )
    assert rules == ["batch_matmul"]
    np.testing.assert_allclose(actual, 0.5 * (a.astype("float64") @ b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize(
    ("x", "pool", "strides", "padding"),
    [((1, 5, 8, 8), 2, 2, 0), ((1, 19, 13, 11), 3, 2, 1), ((2, 16, 7, 9), 3, 1, 1)],
    ids=str,
)
def test_max_pool_equals_the_oracle(
    x: tuple[int, ...], pool: int, strides: int, padding: int, dtype: str, run_op: RunOp,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    data = (rng.standard_normal(x) * 50 + 100).clip(0, 255).astype(dtype)
    low = 0 if dtype == "uint8" else -np.inf
    p = padding
    padded = np.pad(data.astype("float64"), ((0, 0), (0, 0), (p, p), (p, p)), constant_values=low)
    views = np.lib.stride_tricks.sliding_window_view(padded, (pool, pool), axis=(2, 3))
    exact = views[:, :, ::strides, ::strides].max(axis=(4, 5))

    def make(v: relax.Expr) -> relax.Expr:
        nhwc = relax.op.permute_dims(v, [0, 2, 3, 1])
        pooled = relax.op.nn.max_pool2d(
            nhwc, (pool, pool), (strides, strides), (p, p, p, p), layout="NHWC"
        )
        return relax.op.permute_dims(pooled, [0, 3, 1, 2])

    actual, rules = run_op(make, data)
    assert "window" in rules
    np.testing.assert_array_equal(actual, exact)


@pytest.mark.parametrize(
    "make",
    [
        relax.op.nn.relu,
        lambda x: relax.op.clip(x, -1.0, 6.0),
        lambda x: relax.op.maximum(x, relax.const(0.0, "float32")),
        lambda x: relax.op.minimum(x, relax.const(0.0, "float32")),
        relax.op.exp,
        relax.op.sigmoid,
        lambda x: relax.op.nn.softmax(x, axis=-1),
        lambda x: relax.op.max(x, axis=-1),
    ],
    ids=["relu", "clip", "maximum", "minimum", "exp", "sigmoid", "softmax", "max"],
)
def test_nan_stays_nan_in_vectors_and_in_what_is_left_over(
    make: Callable[[relax.Expr], relax.Expr], run_op: RunOp
) -> None:
    actual, _ = run_op(make, np.full((3, 37), np.nan, "float32"))
    assert np.isnan(actual).all()


SWEEP = np.concatenate(
    [np.linspace(-87, 88, 20011), np.linspace(-1, 1, 5003), [-1e30, 1e30]]
).astype("float32")


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("erf", np.vectorize(erf)),
        ("tanh", np.tanh),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-np.clip(x, -700, 700)))),
    ],
)
def test_bounded_functions_are_within_5e_7_of_float64(
    name: str, exact: Callable[[np.ndarray], np.ndarray], run_op: RunOp
) -> None:
    actual, _ = run_op(getattr(relax.op, name), SWEEP)
    np.testing.assert_allclose(actual, exact(SWEEP.astype("float64")), rtol=0, atol=5e-7)


def test_exp_is_within_3e_7_of_float64_where_float32_is_normal(run_op: RunOp) -> None:
    actual, _ = run_op(relax.op.exp, SWEEP)
    np.testing.assert_allclose(actual[:-2], np.exp(SWEEP[:-2].astype("float64")), rtol=3e-7)
    assert 0 <= actual[-2] <= 1.2e-38
    assert actual[-1] >= 3.4e38


@pytest.mark.parametrize("axis", [-1, 1])
def test_softmax_equals_the_oracle_when_values_are_large(
    axis: int, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = (rng.standard_normal((3, 37, 48)) * 30).astype("float32")
    powers = np.exp(x.astype("float64") - x.max(axis, keepdims=True))
    actual, _ = run_op(lambda v: relax.op.nn.softmax(v, axis), x)
    np.testing.assert_allclose(actual, powers / powers.sum(axis, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 7, 37), (1, 128, 64), (5, 3)], ids=str)
def test_layer_norm_equals_the_oracle(
    shape: tuple[int, ...], run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(shape).astype("float32") * 3 + 1
    gamma, beta = rng.standard_normal((2, shape[-1])).astype("float32")
    wide = x.astype("float64")
    centred = wide - wide.mean(-1, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta
    actual, _ = run_op(
        lambda v: relax.op.nn.layer_norm(v, relax.const(gamma), relax.const(beta), [-1]), x
    )
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [[-1], [1], [0, 2], [0, 1, 2]], ids=str)
def test_reductions_equal_the_oracle_along_any_axes(
    axes: list[int], run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((6, 37, 64)).astype("float32")
    actual, _ = run_op(lambda v: relax.op.mean(v, axes), x)
    np.testing.assert_allclose(actual, x.astype("float64").mean(tuple(axes)), atol=1e-5)
