"""Bilinear sampling at given points, against a plain loop in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from tvm import relax


@dataclass(frozen=True, kw_only=True)
class Case:
    id: str
    image: tuple[int, int, int, int] = (3, 5, 7, 11)
    points: tuple[int, int] = (4, 13)
    padding: str = "zeros"
    align: bool = False


CASES = [
    Case(id="zeros outside"),
    Case(id="corners are the ends", align=True),
    Case(id="the border goes on", padding="border"),
    Case(id="border and corners", padding="border", align=True),
    Case(id="one pixel", image=(1, 1, 1, 1), points=(1, 1)),
    Case(id="many channels", image=(1, 37, 8, 16), points=(16, 32)),
]


def sampled(image: np.ndarray, grid: np.ndarray, case: Case) -> np.ndarray:
    batch, channels, height, width = image.shape
    result = np.zeros((batch, channels, *grid.shape[2:]))
    for n, h, w in np.ndindex(batch, *grid.shape[2:]):
        place = []
        for value, extent in ((grid[n, 1, h, w], height), (grid[n, 0, h, w], width)):
            turn = (float(value) + 1) / 2
            at = turn * (extent - 1) if case.align else turn * extent - 0.5
            place.append(min(max(at, 0.0), extent - 1.0) if case.padding == "border" else at)
        (y, x), (top, left) = place, np.floor(np.clip(place, -2, 99)).astype(int)
        for i, j in np.ndindex(2, 2):
            if 0 <= top + i < height and 0 <= left + j < width:
                down, right = y - top, x - left
                share = (down if i else 1 - down) * (right if j else 1 - right)
                result[n, :, h, w] += share * image[n, :, top + i, left + j]
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_samples_equal_the_oracle(
    case: Case,
    run_op: Callable[..., tuple[np.ndarray, list[str]]],
    rng: np.random.Generator,
) -> None:
    image = rng.standard_normal(case.image).astype("float32")
    grid = rng.uniform(-1.3, 1.3, (case.image[0], 2, *case.points)).astype("float32")
    grid[0, :, 0, 0] = [1e30, -1e30]
    actual, rules = run_op(
        lambda x, g: relax.op.image.grid_sample(
            x, g, padding_mode=case.padding, align_corners=case.align
        ),
        image,
        grid,
    )
    assert rules.count("generic") >= 2
    np.testing.assert_allclose(actual, sampled(image, grid, case), rtol=1e-4, atol=2e-5)


def test_what_lies_outside_counts_nothing_whatever_the_image_holds(
    run_op: Callable[..., tuple[np.ndarray, list[str]]],
) -> None:
    image = np.full((1, 2, 3, 3), np.inf, np.float32)
    grid = np.full((1, 2, 2, 5), 3.0, np.float32)
    actual, _ = run_op(lambda x, g: relax.op.image.grid_sample(x, g), image, grid)
    np.testing.assert_array_equal(actual, np.zeros((1, 2, 2, 5)))


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_coordinates_that_are_no_finite_numbers(
    padding: str, run_op: Callable[..., tuple[np.ndarray, list[str]]], rng: np.random.Generator
) -> None:
    image = rng.standard_normal((1, 2, 5, 7)).astype("float32")
    x = [np.nan, 0, np.inf, -np.inf, 0, 0, 1e30, np.inf]
    y = [0, np.nan, 0, 0, np.inf, -np.inf, 0, np.inf]
    grid = np.array([x, y], np.float32).reshape(1, 2, 1, 8)
    actual, _ = run_op(
        lambda x, g: relax.op.image.grid_sample(x, g, padding_mode=padding), image, grid
    )
    columns, rows = [0, 3, 6, 0, 3, 3, 6, 6], [2, 0, 2, 2, 4, 0, 2, 4]
    exact = image[0][:, rows, columns] if padding == "border" else np.zeros((2, 8))
    np.testing.assert_allclose(actual.reshape(2, 8), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["nearest", "bicubic"])
def test_other_methods_keep_their_lowering(
    method: str, run_op: Callable[..., tuple[np.ndarray, list[str]]], rng: np.random.Generator
) -> None:
    image = rng.standard_normal((1, 2, 5, 7)).astype("float32")
    grid = rng.uniform(-1, 1, (1, 2, 3, 4)).astype("float32")
    actual, rules = run_op(
        lambda x, g: relax.op.image.grid_sample(x, g, method=method), image, grid
    )
    assert len(rules) == 1
    assert actual.shape == (1, 2, 3, 4)
