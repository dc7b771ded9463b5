"""Concatenations, padding, shuffles and slices against numpy: one plain copy for each operand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax

RunOp = Callable[..., tuple[np.ndarray, list[str]]]


def _pad(x: np.ndarray, *widths: tuple[int, int], value: float = 0.0) -> np.ndarray:
    return np.pad(x, widths, constant_values=value)


@pytest.mark.parametrize(
    ("axis", "shapes"),
    [
        (3, [(1, 7, 5, 37), (1, 7, 5, 11)]),
        (3, [(3, 28, 29, 58), (3, 28, 29, 58)]),
        (3, [(2, 9, 4, 3), (2, 9, 4, 1), (2, 9, 4, 2), (2, 9, 4, 17)]),
        (3, [(1, 5, 7, 1), (1, 5, 7, 1)]),
        (2, [(1, 4, 3, 5), (1, 4, 1, 5)]),
        (1, [(1, 13, 31, 29), (1, 17, 31, 29)]),
        (0, [(3, 1), (1, 1), (2, 1)]),
        (0, [(40009,), (70001,), (7,)]),
    ],
    ids=str,
)
def test_concatenation_with_consumers_is_exact(
    axis: int, shapes: list[tuple[int, ...]], run_op: RunOp, rng: np.random.Generator
) -> None:
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    scale = rng.standard_normal(np.concatenate(arrays, axis).shape[-1:]).astype("float32")

    def make(*inputs: relax.Expr) -> relax.Expr:
        *parts, factor = inputs
        # Elementwise operators before and behind the concatenation join its kernel.
        parts = [relax.op.negative(parts[0]), *parts[1:]]
        return relax.op.nn.relu(relax.op.multiply(relax.op.concat(parts, axis), factor))

    actual, rules = run_op(make, *arrays, scale)
    assert "copies" in rules
    joined = np.concatenate([-arrays[0], *arrays[1:]], axis)
    np.testing.assert_array_equal(actual, np.maximum(joined * scale, 0))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64", "bool"])
def test_concatenation_of_levels_is_exact(
    dtype: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    arrays = [rng.integers(0, 2, (2, 9, 7, n)).astype(dtype) for n in (58, 58, 3)]
    actual, rules = run_op(lambda *x: relax.op.concat(list(x), 3), *arrays)
    assert rules == ["copies"]
    np.testing.assert_array_equal(actual, np.concatenate(arrays, 3))


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("channels_first", [False, True])
def test_shuffle_behind_a_concatenation_is_exact(
    groups: int, channels_first: bool, run_op: RunOp, rng: np.random.Generator
) -> None:
    each = 12 * groups + 1 if groups == 2 else 12 * groups
    shape = (1, each, 9, 7) if channels_first else (1, 9, 7, each)
    arrays = [rng.standard_normal(shape).astype("float32") for _ in range(groups)]
    axis = 1 if channels_first else 3
    whole = each * groups

    def shuffled(joined, reshape, transpose):
        if channels_first:
            split = reshape(joined, (1, groups, each, 9, 7))
            return reshape(transpose(split, [0, 2, 1, 3, 4]), (1, whole, 9, 7))
        split = reshape(joined, (1, 9, 7, groups, each))
        return reshape(transpose(split, [0, 1, 2, 4, 3]), (1, 9, 7, whole))

    actual, rules = run_op(
        lambda *x: shuffled(
            relax.op.concat(list(x), axis), relax.op.reshape, relax.op.permute_dims
        ),
        *arrays,
    )
    assert rules == ["copies"]
    joined = np.concatenate(arrays, axis)
    np.testing.assert_array_equal(actual, shuffled(joined, np.reshape, np.transpose))


@pytest.mark.parametrize(
    "widths",
    [((0, 0), (1, 2), (3, 0), (0, 0)), ((0, 0), (0, 0), (1, 1), (5, 2)),
     ((2, 1), (1, 1), (0, 3), (1, 0)), ((0, 0), (0, 0), (0, 0), (0, 100))],
    ids=str,
)  # fmt: skip
def test_padding_is_exact(
    widths: tuple[tuple[int, int], ...], run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((2, 7, 5, 37)).astype("float32")
    flat = [width for pair in widths for width in pair]
    actual, rules = run_op(lambda v: relax.op.nn.pad(v, flat, pad_value=1.5), x)
    assert rules == ["copies"]
    np.testing.assert_array_equal(actual, _pad(x, *widths, value=1.5))


def test_index_that_chooses_between_mirrored_and_own_rows_is_exact(
    run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((1, 11, 13, 5)).astype("float32")
    actual, _ = run_op(
        lambda v: relax.op.nn.pad(v, [0, 0, 2, 3, 4, 1, 0, 0], pad_mode="reflect"), x
    )
    np.testing.assert_array_equal(
        actual, np.pad(x, ((0, 0), (2, 3), (4, 1), (0, 0)), mode="reflect")
    )


@pytest.mark.parametrize(
    ("shape", "repeats"),
    [
        ((1, 3, 7, 28), (1, 1, 2, 2)),
        ((2, 5), (3, 1)),
        ((37,), (4,)),
        ((3, 5), (5, 5)),
        ((1, 16), (9, 2)),
        ((2, 3), (1, 1)),
        ((4,), (2, 3)),
    ],
    ids=str,
)
def test_tiling_is_exact(
    shape: tuple[int, ...], repeats: tuple[int, ...], run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(shape).astype("float32")
    actual, _ = run_op(lambda v: relax.op.tile(v, list(repeats)), x)
    np.testing.assert_array_equal(actual, np.tile(x, repeats))


@pytest.mark.parametrize("columns", [5, 37, 64, 256])
def test_gathered_rows_are_exact(columns: int, run_op: RunOp, rng: np.random.Generator) -> None:
    x = rng.standard_normal((19, columns)).astype("float32")
    index = rng.integers(0, 19, 40)
    actual, _ = run_op(lambda v: relax.op.take(v, relax.const(index), axis=0), x)
    np.testing.assert_array_equal(actual, x[index])
