"""How far an array is from a reference."""

from __future__ import annotations

import numpy as np
import pytest

from hone import deviation


@pytest.mark.parametrize(
    ("given", "expected", "error"),
    [
        ([1.0, 2.1], [1.0, 2.0], 0.05),
        ([0.0, 0.25], [0.0, 0.0], 0.25),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.nan, 1.0], [0.0, 1.0], np.inf),
        ([0.0, 1.0], [np.nan, 1.0], np.inf),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0),
        ([-np.inf, 1.0], [np.inf, 1.0], np.inf),
        ([np.inf, 1.0], [2.0, 1.0], np.inf),
        ([1, 2, 3, 4], [1, 2, 3, 5], 0.25),
        ([True, False], [True, True], 0.5),
        ([[1.0]], [1.0], np.inf),
        (np.zeros((0, 2)), np.zeros((0, 2)), 0.0),
    ],
)
def test_relative_error_is_as_defined(given, expected, error):
    assert deviation.relative_error(np.array(given), np.array(expected)) == pytest.approx(error)
