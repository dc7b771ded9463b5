"""Operands of attention that are scaled, moved or repeated on their way: what is read in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tvm import relax

op = relax.op
Run = Callable[..., tuple[np.ndarray, list[str]]]
BATCH, HEADS, ROWS, KEYS, DEPTH = 2, 4, 5, 7, 8


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype("float32")


def repeated(x: relax.Expr, shape: Sequence[int], axis: int, times: int) -> relax.Expr:
    """Return ``x`` with each element of an axis so many times in a row."""
    one, wide, after = list(shape), list(shape), list(shape)
    one.insert(axis + 1, 1)
    wide.insert(axis + 1, times)
    after[axis] *= times
    return op.reshape(op.broadcast_to(op.reshape(x, one), wide), after)


def attended(
    query: relax.Expr, turned: relax.Expr, value: relax.Expr, seen: np.ndarray | None = None
) -> relax.Expr:
    scores = op.matmul(query, turned)
    if seen is not None:
        scores = op.where(relax.const(seen, "bool"), scores, relax.const(np.float32(-np.inf)))
    return op.matmul(op.nn.softmax(scores, axis=-1), value)


def exact(
    query: np.ndarray, turned: np.ndarray, value: np.ndarray, seen: np.ndarray | None = None
) -> np.ndarray:
    scores = query.astype("float64") @ turned
    if seen is not None:
        scores = np.where(seen, scores, -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ value


def check(run: tuple[np.ndarray, list[str]], expected: np.ndarray) -> None:
    actual, rules = run
    assert rules.count("attention") == 1
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)


def test_values_scaled_by_factors_whose_product_is_1(run_op: Run, rng: np.random.Generator) -> None:
    query, turned = floats(rng, 2, 6, 4), floats(rng, 2, 4, 4)
    value = floats(rng, 4, 2, 4)

    def make(q: relax.Expr, k: relax.Expr, x: relax.Expr) -> relax.Expr:
        x = op.multiply(x, relax.const(np.float32(0.5)))
        x = op.permute_dims(op.reshape(x, (4, 2, 2, 2)), [1, 0, 2, 3])
        return attended(q, k, op.multiply(op.reshape(x, (2, 4, 4)), relax.const(np.float32(2))))

    expected = exact(query, turned, value.transpose(1, 0, 2))
    check(run_op(make, query, turned, value), expected)


@pytest.mark.parametrize("hidden", [False, True], ids=["all seen", "causal"])
def test_keys_that_are_repeated_are_no_heads(
    hidden: bool, run_op: Run, rng: np.random.Generator
) -> None:
    query = floats(rng, BATCH, HEADS, ROWS, DEPTH)
    key, value = (floats(rng, BATCH, KEYS, HEADS, DEPTH) for _ in range(2))
    seen = np.tri(ROWS, 2 * KEYS, dtype=bool) if hidden else None

    def make(q: relax.Expr, k: relax.Expr, v: relax.Expr) -> relax.Expr:
        k, v = (repeated(x, key.shape, 1, 2) for x in (k, v))
        turned, v = op.permute_dims(k, [0, 2, 3, 1]), op.permute_dims(v, [0, 2, 1, 3])
        return attended(q, turned, v, seen)

    turned = np.repeat(key, 2, 1).transpose(0, 2, 3, 1)
    expected = exact(query, turned, np.repeat(value, 2, 1).transpose(0, 2, 1, 3), seen)
    check(run_op(make, query, key, value), expected)


def test_a_depth_that_is_repeated_is_no_head(run_op: Run, rng: np.random.Generator) -> None:
    query = floats(rng, BATCH, HEADS, ROWS, 2 * DEPTH)
    key, value = (floats(rng, BATCH, DEPTH, HEADS, KEYS) for _ in range(2))

    def make(q: relax.Expr, k: relax.Expr, v: relax.Expr) -> relax.Expr:
        k, v = (repeated(x, key.shape, 1, 2) for x in (k, v))
        return attended(q, op.permute_dims(k, [0, 2, 1, 3]), op.permute_dims(v, [0, 2, 3, 1]))

    turned = np.repeat(key, 2, 1).transpose(0, 2, 1, 3)
    expected = exact(query, turned, np.repeat(value, 2, 1).transpose(0, 2, 3, 1))
    check(run_op(make, query, key, value), expected)


@pytest.mark.parametrize(("of_keys", "of_values"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_keys_and_values_may_have_heads_of_their_own(
    of_keys: int, of_values: int, run_op: Run, rng: np.random.Generator
) -> None:
    query = floats(rng, BATCH, HEADS, ROWS, DEPTH)
    key, value = (floats(rng, BATCH, own, KEYS, DEPTH) for own in (of_keys, of_values))

    def make(q: relax.Expr, k: relax.Expr, v: relax.Expr) -> relax.Expr:
        k = repeated(k, key.shape, 1, HEADS // of_keys)
        v = repeated(v, value.shape, 1, HEADS // of_values)
        return attended(q, op.permute_dims(k, [0, 1, 3, 2]), v)

    turned = np.repeat(key, HEADS // of_keys, 1).swapaxes(2, 3)
    expected = exact(query, turned, np.repeat(value, HEADS // of_values, 1))
    check(run_op(make, query, key, value), expected)
