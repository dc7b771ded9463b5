"""Top-k against a stable sort of numpy: ties, sizes, both directions, every axis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax

RunOp = Callable[..., tuple[np.ndarray, list[str]]]


def sorted_indices(x: np.ndarray, k: int, axis: int, largest: bool) -> np.ndarray:
    """Return the indices of the k first; equal elements in their order."""
    keys = -x.astype("float64") if largest else x.astype("float64")
    return np.argsort(keys, axis=axis, kind="stable").take(np.arange(k), axis=axis)


def check(run_op: RunOp, x: np.ndarray, k: int, *, axis: int = -1, largest: bool = True) -> None:
    expected = sorted_indices(x, k, axis, largest)
    where = {"k": k, "axis": axis, "largest": largest}
    for kind in ("indices", "values"):
        actual, _ = run_op(
            lambda v, kind=kind: relax.op.topk(v, ret_type=kind, dtype="int64", **where), x
        )
        wanted = expected if kind == "indices" else np.take_along_axis(x, expected, axis)
        assert actual.dtype == wanted.dtype
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize(
    ("shape", "k"),
    [((3, 1), 1), ((3, 7), 7), ((7, 101), 1), ((2, 3, 1000), 5), ((128, 37), 3), ((1, 2111), 70)],
    ids=str,
)
def test_numbers_in_no_order_equal_a_sort(
    shape: tuple[int, ...], k: int, largest: bool, run_op: RunOp, rng: np.random.Generator
) -> None:
    check(run_op, rng.standard_normal(shape).astype("float32"), k, largest=largest)


@pytest.mark.parametrize("axis", [0, 1])
def test_other_axes_equal_a_sort(axis: int, run_op: RunOp, rng: np.random.Generator) -> None:
    check(run_op, rng.standard_normal((13, 11, 5)).astype("float32"), 4, axis=axis)


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_equal_and_sorted_numbers_equal_a_stable_sort(
    largest: bool, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = np.stack(
        [
            np.zeros(1003),
            np.where(np.arange(1003) % 2, 0.0, -0.0),
            np.arange(1003),
            -np.arange(1003),
            rng.integers(-3, 3, 1003),
            np.where(np.arange(1003) % 5, 1.0, np.inf),
            np.where(np.arange(1003) % 7, -np.inf, -1.0),
            np.float32(1) + np.arange(1003) % 3 * np.float32(2**-23),
        ]
    ).astype("float32")
    check(run_op, x, 5, largest=largest)
    check(run_op, x, 300, largest=largest)


def test_values_and_indices_together_of_a_leading_axis(
    run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((41, 6)).astype("float32")

    def make(v: relax.Expr) -> relax.Expr:
        return relax.op.topk(v, k=3, axis=0, ret_type="both", dtype="int64")

    expected = sorted_indices(x, 3, 0, True)
    for field, wanted in ((0, np.take_along_axis(x, expected, 0)), (1, expected)):
        actual, _ = run_op(lambda v, f=field: relax.TupleGetItem(make(v), f), x)
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("dtype", ["int32", "float32"], ids=["integers", "more than 1024"])
def test_what_is_not_lowered_keeps_the_sort_of_the_runtime(
    dtype: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.permutation(1500).reshape(1, -1).astype(dtype)
    k = 7 if dtype == "int32" else 1100
    actual, _ = run_op(lambda v: relax.op.topk(v, k=k, ret_type="values"), x)
    np.testing.assert_array_equal(actual[0], np.sort(x[0])[::-1][:k])


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000], ids=["NaN", "NaN with a sign"])
def test_nan_counts_as_larger_than_everything(bits: int, largest: bool, run_op: RunOp) -> None:
    x = np.array([[1, 0, np.inf, -np.inf, 2]], "float32")
    x[0, 1] = np.array(bits, np.uint32).view(np.float32)
    actual, _ = run_op(
        lambda v: relax.op.topk(v, k=4, ret_type="indices", largest=largest, dtype="int64"), x
    )
    assert actual.tolist() == [[1, 2, 4, 0] if largest else [3, 0, 4, 2]]
