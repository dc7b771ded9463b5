"""Sine and cosine over all of float32, against float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import relax

Run = Callable[..., tuple[np.ndarray, list[str]]]
# Half a unit of the last place of 1 is 6e-8; the polynomials and the argument's rounding add as
# much again.
ABSOLUTE = 1.2e-7
# Of a value near 0, in units of the last place; arguments near a multiple of pi / 2 are no worse.
ULPS = 3

FUNCTIONS = {"sin": (relax.op.sin, np.sin), "cos": (relax.op.cos, np.cos)}


def arguments() -> np.ndarray:
    """Every exponent and both signs, multiples of pi / 2, and the float32 next to one of them."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0x00800000, 0x7F800000, 60_000, dtype=np.int64)
    bits[:254] = (np.arange(254) + 1) << 23
    any_size = bits.astype(np.uint32).view(np.float32)
    common = rng.uniform(0, 100, 20_000).astype(np.float32)
    multiples = (np.arange(1, 4000) * (np.pi / 2)).astype(np.float32)
    # 16367173 * 2**72 lies 1.6e-9 beside a multiple, nearer than any other float32.
    worst = np.float32(16367173 * 2.0**72)
    positive = np.concatenate([any_size, common, multiples, [worst, 0.0]]).astype(np.float32)
    return np.concatenate([positive, -positive])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_waves_are_near_those_of_float64(name: str, run_op: Run) -> None:
    function, oracle = FUNCTIONS[name]
    x = arguments()
    actual, rules = run_op(function, x)
    assert rules == ["generic"]
    exact = oracle(x.astype(np.float64))
    error = np.abs(actual - exact)
    assert error.max() <= ABSOLUTE
    assert (error / np.spacing(np.abs(exact).astype(np.float32))).max() <= ULPS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_waves_of_special_values(name: str, run_op: Run) -> None:
    function, oracle = FUNCTIONS[name]
    x = np.resize(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-30], np.float32), (3, 37))
    actual, _ = run_op(function, x)
    with np.errstate(invalid="ignore"):
        exact = oracle(x.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(actual, exact)
    finite = np.isfinite(x)
    np.testing.assert_array_equal(np.signbit(actual[finite]), np.signbit(exact[finite]))


def test_float64_keeps_its_own_lowering(run_op: Run) -> None:
    x = np.linspace(-9, 9, 37)
    actual, _ = run_op(relax.op.sin, x)
    np.testing.assert_allclose(actual, np.sin(x), rtol=0, atol=1e-15)
