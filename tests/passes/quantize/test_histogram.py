from __future__ import annotations

import numpy as np
import pytest

from hone.errors import ModelError
from hone.passes.quantize.histogram import BINS, Histogram


def filled(*batches: np.ndarray) -> Histogram:
    histogram = Histogram(layer="conv1")
    for batch in batches:
        histogram.update(np.asarray(batch, np.float32))
    return histogram


def as_dict(histogram: Histogram) -> dict[int, int]:
    counts = histogram.counts
    return {int(i) + histogram.first: int(counts[i]) for i in np.flatnonzero(counts)}


def test_bins_match_the_worked_number() -> None:
    histogram = filled([-1.0, 0.0, 0.5, 3.0])
    assert histogram.width == 2.0**-8
    assert as_dict(histogram) == {-256: 1, 128: 1, 768: 1}
    assert (histogram.zeros, histogram.total) == (1, 4)
    assert (histogram.minimum, histogram.maximum) == (-1.0, 3.0)


def test_counts_equal_numpy_when_the_range_grows_over_many_orders(rng: np.random.Generator) -> None:
    batches = [(rng.normal(size=500) * 10.0**e).astype(np.float32) for e in (-6, -3, 0, 2)]
    histogram = filled(*batches)
    values = np.concatenate(batches).astype(np.float64)
    counts = histogram.counts
    edges = (histogram.first + np.arange(len(counts) + 1)) * histogram.width
    # numpy counts the last edge into the last bin; no value lies on it.
    np.testing.assert_array_equal(counts, np.histogram(values[values != 0], edges)[0])
    assert BINS / 2 < len(counts) <= BINS


def test_result_does_not_depend_on_order_or_batches(rng: np.random.Generator) -> None:
    values = rng.standard_cauchy(4000).astype(np.float32)
    whole = filled(values)
    for other in (filled(*np.split(values, 50)), filled(*np.split(rng.permutation(values), 400))):
        assert as_dict(other) == as_dict(whole)
        assert (other.width, other.first, other.zeros) == (whole.width, whole.first, whole.zeros)


@pytest.mark.parametrize(
    "constant", [1.0, -1.0, 2.0**-149, 3.4e38, -3.4e38, 1e-30, 2048.0, -2048.0]
)
def test_one_value_is_counted_in_its_bin_whatever_its_size(constant: float) -> None:
    histogram = filled([constant] * 3)
    ((index, count),) = as_dict(histogram).items()
    assert count == 3
    assert index * histogram.width <= histogram.minimum < (index + 1) * histogram.width


def test_width_is_the_smallest_that_fits(rng: np.random.Generator) -> None:
    for scale in 2.0 ** rng.uniform(-20, 20, 50):
        values = rng.normal(size=30) * scale
        histogram = filled(values)
        low, high = min(0.0, histogram.minimum), max(0.0, histogram.maximum)
        half = histogram.width / 2
        assert np.floor(high / half) - np.floor(low / half) >= BINS


def test_zeros_alone_have_no_width_to_find() -> None:
    histogram = filled(np.zeros(5), np.zeros((0, 2)))
    assert (histogram.zeros, histogram.total, histogram.counts.sum()) == (5, 5, 0)
    assert as_dict(filled(np.zeros(5), [4.0])) == {1024: 1}


def test_memory_does_not_grow_with_the_data(rng: np.random.Generator) -> None:
    histogram = filled(rng.normal(size=10))
    before = {k: np.asarray(v).nbytes for k, v in vars(histogram).items()}
    for _ in range(50):
        histogram.update(rng.normal(size=5000) * 100)
    assert {k: np.asarray(v).nbytes for k, v in vars(histogram).items()} == before


def test_error_when_nothing_was_seen_or_a_value_is_not_finite() -> None:
    with pytest.raises(ModelError, match=r"^conv1: calibration saw no value$"):
        _ = filled().counts
    with pytest.raises(ModelError, match=r"^conv1: calibration met a value that is not finite: \["):
        filled([1.0, np.nan])
