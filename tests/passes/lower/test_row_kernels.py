"""Softmax, normalizations, reductions and copies against numpy, on shapes that fit no vector."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax

RunOp = Callable[..., tuple[np.ndarray, list[str]]]

ROWS = [(1, 4, 16, 128), (3, 5, 197), (2, 37, 48), (7, 10), (13,), (1, 1), (1, 1009)]


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    powers = np.exp(x.astype("float64") - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def normalized(x: np.ndarray, axes: tuple[int, ...], epsilon: float = 1e-5) -> np.ndarray:
    wide = x.astype("float64")
    centred = wide - wide.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + epsilon)


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_softmax_and_its_logarithm_equal_the_oracle_along_the_last_axis(
    shape: tuple[int, ...], run_op: RunOp, rng: np.random.Generator
) -> None:
    x = (rng.standard_normal(shape) * 10).astype("float32")
    exact = softmax(x, -1)
    actual, rules = run_op(lambda v: relax.op.nn.softmax(v, -1), x)
    assert rules == ["rows"]
    np.testing.assert_allclose(actual, exact, rtol=2e-6, atol=1e-7)
    actual, rules = run_op(lambda v: relax.op.nn.log_softmax(v, -1), x)
    assert rules == ["rows"]
    np.testing.assert_allclose(actual, np.log(exact), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [((3, 37, 48), 1), ((5, 7, 3), 0), ((2, 9, 4, 16), 1)])
def test_softmax_equals_the_oracle_along_another_axis(
    shape: tuple[int, ...], axis: int, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = (rng.standard_normal(shape) * 10).astype("float32")
    actual, rules = run_op(lambda v: relax.op.nn.softmax(v, axis), x)
    assert rules == ["columns"]
    np.testing.assert_allclose(actual, softmax(x, axis), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_layer_norm_and_rms_norm_equal_the_oracle_far_from_zero(
    shape: tuple[int, ...], run_op: RunOp, rng: np.random.Generator
) -> None:
    # With the mean 100 times the spread, the difference of squares would lose four digits.
    x = (rng.standard_normal(shape) + 100).astype("float32")
    gamma, beta = rng.standard_normal((2, shape[-1])).astype("float32")
    actual, rules = run_op(
        lambda v: relax.op.nn.layer_norm(v, relax.const(gamma), relax.const(beta), [-1]), x
    )
    assert rules == ["rows"]
    np.testing.assert_allclose(actual, normalized(x, (-1,)) * gamma + beta, rtol=1e-3, atol=1e-3)
    if x.ndim == 1:
        return  # TVM's topi.nn.rms_norm, which constant folding tries, fails on vectors
    wide = x.astype("float64")
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * gamma
    actual, rules = run_op(lambda v: relax.op.nn.rms_norm(v, relax.const(gamma), -1), x)
    assert rules == ["rows"]
    np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-6)


def test_layer_norm_equals_the_oracle_over_two_axes(
    run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((3, 7, 11)).astype("float32")
    gamma, beta = rng.standard_normal((2, 7, 11)).astype("float32")
    actual, rules = run_op(
        lambda v: relax.op.nn.layer_norm(v, relax.const(gamma), relax.const(beta), [1, 2]), x
    )
    assert rules == ["rows"]
    np.testing.assert_allclose(actual, normalized(x, (1, 2)) * gamma + beta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_group_norm_equals_the_oracle(groups: int, run_op: RunOp, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 12, 5, 7)).astype("float32")
    gamma, beta = rng.standard_normal((2, 12)).astype("float32")
    actual, rules = run_op(
        lambda v: relax.op.nn.group_norm(
            v, relax.const(gamma), relax.const(beta), groups, 1, [2, 3]
        ),
        x,
    )
    assert rules == ["rows"]
    exact = normalized(x.reshape(3, groups, 12 // groups, 5, 7), (2, 3, 4)).reshape(x.shape)
    exact = exact * gamma[:, None, None] + beta[:, None, None]
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-5)


def test_instance_norm_equals_the_oracle(run_op: RunOp, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 5, 9, 13)).astype("float32")
    gamma, beta = rng.standard_normal((2, 5)).astype("float32")
    actual, rules = run_op(
        lambda v: relax.op.nn.instance_norm(v, relax.const(gamma), relax.const(beta), 1, [2, 3]),
        x,
    )
    assert rules == ["rows"]
    exact = normalized(x, (2, 3)) * gamma[:, None, None] + beta[:, None, None]
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keepdims", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize(
    "axes", [[-1], [1], [0], [1, 2], [2, 3], [0, 3], [1, 3], [0, 1, 2], [0, 1, 2, 3]], ids=str
)
def test_mean_equals_the_oracle_along_any_axes(
    axes: list[int], keepdims: bool, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((2, 6, 5, 37)).astype("float32")
    actual, rules = run_op(lambda v: relax.op.mean(v, axes, keepdims=keepdims), x)
    assert rules[0] in ("rows", "columns")
    exact = x.astype("float64").mean(tuple(axes), keepdims=keepdims)
    assert actual.shape == exact.shape
    np.testing.assert_allclose(actual, exact, atol=1e-6)


@pytest.mark.parametrize("axes", [[-1], [1], [0, 2]], ids=str)
@pytest.mark.parametrize("kind", ["sum", "prod", "max", "min", "variance", "std"])
def test_statistic_equals_the_oracle(
    kind: str, axes: list[int], run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((3, 19, 67)).astype("float32")
    actual, rules = run_op(lambda v: getattr(relax.op, kind)(v, axes), x)
    assert rules[0] in ("rows", "columns")
    exact = getattr(np, {"variance": "var"}.get(kind, kind))(x.astype("float64"), tuple(axes))
    np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=2e-5)


def test_epilogue_joins_the_kernel_of_a_softmax(run_op: RunOp, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, 6, 37)).astype("float32")
    actual, rules = run_op(
        lambda a, b: relax.op.nn.relu(relax.op.subtract(relax.op.nn.softmax(a, -1), b)), x, y
    )
    assert rules == ["rows"]
    np.testing.assert_allclose(actual, np.maximum(softmax(x, -1) - y, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((37, 41), (1, 0)), ((128, 96), (1, 0)), ((1, 17, 3, 64), (0, 2, 3, 1)),
     ((1, 17, 3, 64), (0, 2, 1, 3)), ((2, 3, 5, 7), (3, 1, 0, 2))],
    ids=str,
)  # fmt: skip
def test_transposition_is_exact(
    shape: tuple[int, ...], axes: tuple[int, ...], run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(shape).astype("float32")
    actual, _ = run_op(lambda v: relax.op.permute_dims(v, list(axes)), x)
    np.testing.assert_array_equal(actual, x.transpose(axes))


def test_copies_are_exact(run_op: RunOp, rng: np.random.Generator) -> None:
    x = rng.standard_normal((1, 7, 5, 37)).astype("float32")
    y = rng.standard_normal((1, 7, 5, 11)).astype("float32")
    actual, _ = run_op(lambda a, b: relax.op.concat([a, b], 3), x, y)
    np.testing.assert_array_equal(actual, np.concatenate([x, y], 3))
    actual, _ = run_op(lambda a: relax.op.strided_slice(a, [3], [3], [31], [2]), x)
    np.testing.assert_array_equal(actual, x[..., 3:31:2])
    actual, _ = run_op(lambda a: relax.op.nn.pad(a, [0, 0, 1, 2, 3, 0, 0, 0]), x)
    np.testing.assert_array_equal(actual, np.pad(x, ((0, 0), (1, 2), (3, 0), (0, 0))))
    indices = rng.integers(0, 7, (3, 5))
    actual, _ = run_op(lambda a, i: relax.op.take(a, i, axis=1), x, indices)
    np.testing.assert_array_equal(actual, x[:, indices])


@pytest.mark.parametrize("shape", [(100003,), (211, 499), (1, 1), (50, 37, 41)], ids=str)
def test_elementwise_chain_equals_the_oracle_when_extents_are_prime(
    shape: tuple[int, ...], run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(shape).astype("float32")
    bias = rng.standard_normal(shape[-1:]).astype("float32")
    actual, rules = run_op(
        lambda a, b: relax.op.nn.relu(relax.op.add(relax.op.multiply(a, a), b)), x, bias
    )
    assert rules == ["generic"]
    np.testing.assert_allclose(actual, np.maximum(x * x + bias, 0), rtol=1e-6, atol=1e-6)
