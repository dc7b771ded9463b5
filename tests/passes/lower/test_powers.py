"""Logarithms and powers against float64, and powers of everything by everything as in C."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax

RunOp = Callable[..., tuple[np.ndarray, list[str]]]

LEAST = float(np.finfo(np.float32).tiny)
MOST = float(np.finfo(np.float32).max)
# As bases and as exponents; 28 are no whole number of vectors.
ENDS = np.array(
    [
        *(np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.5, -0.5, 2.5),
        *(-2.5, 0.75, 1.0000001, 0.9999999, 127.0, -127.0, 16777217.0, 1e10, -1e10, 1e-30),
        *(LEAST, -LEAST, MOST, -MOST),
    ],
    np.float32,
)


def test_logarithm_is_within_2_units_in_the_last_place(
    run_op: RunOp, rng: np.random.Generator
) -> None:
    x = np.concatenate(
        [
            np.exp(rng.uniform(-87, 88, 20011)),
            np.linspace(0.4, 2.5, 20011),
            1 + np.arange(-500, 501) * 2.0**-24,
            [LEAST, MOST],
        ]
    ).astype("float32")
    exact = np.log(x.astype("float64"))
    actual, _ = run_op(relax.op.log, x)
    units = np.abs(actual - exact) / np.spacing(np.abs(exact).astype("float32"))
    assert units.max() <= 2


def test_logarithm_of_no_positive_number_is_defined(run_op: RunOp) -> None:
    x = np.resize(np.array([0, -0.0, -1, -np.inf, np.nan, np.inf, 1, -1e-40], "float32"), (3, 37))
    with np.errstate(all="ignore"):
        exact = np.log(x)
    exact[x == np.float32(-1e-40)] = np.nan
    actual, _ = run_op(relax.op.log, x)
    np.testing.assert_array_equal(actual, exact)


def test_logarithm_of_a_denormal_is_that_of_the_least_normal_number_or_of_0(run_op: RunOp) -> None:
    actual, _ = run_op(relax.op.log, np.full((37,), 1e-40, "float32"))
    assert np.all((actual == -np.inf) | (np.abs(actual - np.log(LEAST)) < 1e-4))


@pytest.mark.parametrize("exponent", [3.0, -1.0, -2.0, -3.0, -0.5, 4.0, 2.5, -1.7, 7.0])
def test_power_by_a_constant_is_near_float64(
    exponent: float, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = np.exp(rng.uniform(-20, 20, (3, 5003))).astype("float32")
    exact = x.astype("float64") ** float(np.float32(exponent))
    normal = (exact > LEAST) & (exact < MOST)
    actual, _ = run_op(lambda v: relax.op.power(v, relax.const(exponent, "float32")), x)
    np.testing.assert_allclose(actual[normal], exact[normal], rtol=4e-7)


@pytest.mark.parametrize(("exponent", "base"), [(-2.0, 7e-20), (-3.0, 2.2e-13), (-4.0, 3.1e-10)])
def test_negative_power_is_finite_where_the_product_would_vanish(
    exponent: float, base: float, run_op: RunOp
) -> None:
    x = np.full((37,), base, "float32")
    exact = x.astype("float64") ** exponent
    actual, _ = run_op(lambda v: relax.op.power(v, relax.const(exponent, "float32")), x)
    np.testing.assert_allclose(actual, exact, rtol=4e-7)


def test_power_by_computed_exponents_rounds_within_one_unit(
    run_op: RunOp, rng: np.random.Generator
) -> None:
    x = np.exp(rng.uniform(-30, 30, (40, 509))).astype("float32")
    y = rng.uniform(-4, 4, (40, 509)).astype("float32")
    exact = x.astype("float64") ** y
    normal = (exact > LEAST) & (exact < MOST)
    actual, _ = run_op(relax.op.power, x, y)
    units = np.abs(actual - exact)[normal] / np.spacing(exact[normal].astype("float32"))
    assert units.max() <= 1


@pytest.mark.parametrize("exponent", [np.inf, -np.inf, np.nan, 0.0, 1e30])
def test_power_by_a_constant_end_is_that_of_c(exponent: float, run_op: RunOp) -> None:
    with np.errstate(all="ignore"):
        exact = np.power(ENDS, np.float32(exponent))
    actual, _ = run_op(lambda v: relax.op.power(v, relax.const(exponent, "float32")), ENDS)
    np.testing.assert_array_equal(actual, exact)


def test_power_of_everything_by_everything_is_that_of_c(run_op: RunOp) -> None:
    base = ENDS.reshape(-1, 1)
    with np.errstate(all="ignore"):
        exact = np.power(base, ENDS)
    actual, _ = run_op(relax.op.power, base, ENDS)
    for values in (exact, actual := actual.copy()):
        values[np.abs(values) < LEAST] *= 0
    np.testing.assert_allclose(actual, exact, rtol=2e-7)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(exact) & ~np.isnan(exact))
