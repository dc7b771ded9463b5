from __future__ import annotations

import numpy as np
import pytest

from hone.passes.distill.weight_grid import FixedGrid, as_rows, freeze_more, from_rows, project
from hone.passes.quantize.weight_schemes import (
    Granularity,
    Scheme,
    WeightOptions,
    quantize_weights,
)

SHAPES = [(5, 3, 2, 4), (7, 6)]
GRIDS = [
    WeightOptions(),
    WeightOptions(bits=4),
    WeightOptions(bits=3, symmetric=False),
    WeightOptions(bits=4, granularity=Granularity.GROUP, group_size=4, symmetric=False),
    WeightOptions(bits=4, granularity=Granularity.TENSOR),
    WeightOptions(bits=4, power_of_two=True),
    WeightOptions(scheme=Scheme.TERNARY),
    WeightOptions(scheme=Scheme.BINARY),
]


def name(options: WeightOptions) -> str:
    return f"{options.scheme}{options.bits}-{options.granularity}-{options.symmetric}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_come_back_as_they_were(shape: tuple[int, ...], rng) -> None:
    value = rng.normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(from_rows(as_rows(value), shape), value)


def test_rows_are_in_the_order_that_weights_are_quantized_in() -> None:
    # Channel, then rows, columns and input channels, as in NHWC.
    value = np.arange(5 * 3 * 2 * 4, dtype=np.float32).reshape(5, 3, 2, 4)
    np.testing.assert_array_equal(as_rows(value)[1], value[1].transpose(1, 2, 0).reshape(-1))
    np.testing.assert_array_equal(as_rows(np.eye(2, 3, 1)), np.eye(2, 3, 1).T)


@pytest.mark.parametrize("options", GRIDS, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projected_and_fixed_grids_are_what_the_quantizer_does(options, shape, rng) -> None:
    value = rng.normal(size=shape).astype(np.float32)
    wanted = quantize_weights(as_rows(value), options).real()
    np.testing.assert_array_equal(as_rows(project(value, options)), wanted)
    if options.scheme is not Scheme.TERNARY:  # whose threshold is not half way
        found = as_rows(FixedGrid.of(value, options).nearest(value))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("options", GRIDS, ids=name)
def test_a_weight_on_its_grid_is_quantized_to_itself(options, rng) -> None:
    value = rng.normal(size=(5, 3, 2, 4)).astype(np.float32)
    grid = FixedGrid.of(value, options)
    frozen = freeze_more(grid.reach(value), np.zeros(value.shape, bool), 0.5)
    start = np.where(frozen, grid.nearest(value), value)
    moved = grid.within(start + ~frozen * rng.normal(size=value.shape).astype(np.float32))
    final = np.where(frozen, start, grid.nearest(moved))
    np.testing.assert_array_equal(final[frozen], start[frozen])
    if options.scheme is Scheme.TERNARY and not np.any(final == 0):
        pytest.skip("a ternary weight without zeros")
    np.testing.assert_allclose(project(final, options), final, rtol=1e-5, atol=1e-6)


def test_outermost_elements_freeze_first_and_stay() -> None:
    reach = np.array([[1.0, 0.2], [0.9, 0.5]])
    none = np.zeros((2, 2), bool)
    half = freeze_more(reach, none, 0.5)
    np.testing.assert_array_equal(half, [[True, False], [True, False]])
    later = freeze_more(1.0 - reach, half, 0.75)
    np.testing.assert_array_equal(later, [[True, True], [True, False]])
    assert freeze_more(reach, later, 1.0).all()
    np.testing.assert_array_equal(freeze_more(reach, half, 0.25), half)


def test_reach_is_one_at_both_ends_of_an_asymmetric_grid() -> None:
    value = np.array([[-0.5], [0.0], [1.0], [2.5]], np.float32)  # one output channel
    reach = FixedGrid.of(value, WeightOptions(bits=4, symmetric=False)).reach(value)
    np.testing.assert_allclose(reach[[0, 1, 3], 0], [1.0, 0.0, 1.0], rtol=0.3)
    assert 0.0 < reach[2, 0] < reach[3, 0]
