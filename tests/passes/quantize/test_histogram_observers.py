from __future__ import annotations

import numpy as np
import pytest

from hone.errors import ModelError, UsageError
from hone.passes.quantize.calibrator import Calibrator, Method
from hone.passes.quantize.histogram_observers import (
    LEVELS,
    EntropyObserver,
    MseObserver,
    PercentileObserver,
    in_levels,
    relative_entropy,
)
from hone.passes.quantize.observer import MinMaxObserver, MovingAverageObserver, Observer, Range
from hone.passes.quantize.qparams import UINT8, choose_qparams, dequantize, quantize

CLIPPING = [PercentileObserver, EntropyObserver, MseObserver]


def seen(observer: Observer, *batches: object) -> Range:
    for batch in batches:
        observer.update(np.asarray(batch, np.float32))
    return observer.range


def test_moving_average_matches_the_worked_number() -> None:
    found = seen(MovingAverageObserver(layer="x"), [0.0, 2.0], [0.0, 4.0])
    assert found.minimum == 0.0
    assert found.maximum == pytest.approx(3.005025, abs=1e-6)


def test_moving_average_equals_the_weighted_sum_of_all_batches(rng: np.random.Generator) -> None:
    batches = rng.normal(size=(40, 6)).astype(np.float32)
    weights = 0.99 ** np.arange(39, -1, -1)
    weights /= weights.sum()
    found = seen(MovingAverageObserver(layer="x"), *batches)
    assert found.minimum == pytest.approx(weights @ batches.min(1), rel=1e-12)
    assert found.maximum == pytest.approx(weights @ batches.max(1), rel=1e-12)


def test_percentile_matches_the_worked_number() -> None:
    observer = PercentileObserver(layer="x", percentile=99.0)
    assert seen(observer, np.arange(1, 1001)) == Range(minimum=6.0, maximum=995.5)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentile_equals_numpy_within_a_bin(rng: np.random.Generator, percentile: float) -> None:
    values = rng.normal(size=20000).astype(np.float32)
    values[rng.random(20000) < 0.3] = 0.0
    found = seen(PercentileObserver(layer="x", percentile=percentile), *np.split(values, 10))
    # Half the range is filled by 1024 bins at least; between two values any number is a quantile.
    bin_ = float(np.ptp(values)) / 1024
    ordered = np.sort(values)
    outside = round((100 - percentile) / 200 * values.size)
    assert ordered[max(outside - 1, 0)] - bin_ <= found.minimum <= ordered[outside] + bin_
    ordered = ordered[::-1]
    assert ordered[outside] - bin_ <= found.maximum <= ordered[max(outside - 1, 0)] + bin_


def test_percentile_of_100_is_min_max(rng: np.random.Generator) -> None:
    values = rng.normal(size=999)
    full = seen(PercentileObserver(layer="x", percentile=100.0), values)
    assert full == seen(MinMaxObserver(layer="x"), values)


def test_percentile_keeps_zero_when_only_the_upper_end_is_clipped(rng: np.random.Generator) -> None:
    values = np.maximum(rng.normal(size=10000), 0)
    found = seen(PercentileObserver(layer="x", percentile=99.0), values)
    assert found.minimum == 0.0
    assert 0 < found.maximum < values.max()


@pytest.mark.parametrize("percentile", [50.0, 100.5, -1.0, float("nan")])
def test_error_when_the_percentile_is_out_of_bounds(percentile: float) -> None:
    with pytest.raises(UsageError) as error:
        PercentileObserver(layer="conv1", percentile=percentile)
    assert str(error.value) == (
        f"conv1: a percentile must be above 50 and at most 100, not {percentile:g}"
    )


def test_entropy_matches_the_worked_number() -> None:
    counts = np.array([4, 0, 3, 1])
    np.testing.assert_array_equal(in_levels(counts, 2), [4, 0, 2, 2])
    assert relative_entropy(counts, in_levels(counts, 2)) == pytest.approx(0.0654, abs=5e-5)


def kl_by_scalars(values: np.ndarray, width: float, threshold: float) -> float:
    """Migacz's divergence of positive values, written without numpy's tricks."""
    bins = round(threshold / width)
    counts = [0] * bins
    outside = 0
    for value in values:
        index = int(value // width)
        if index < bins:
            counts[index] += 1
        else:
            outside += 1
    quantized = [0.0] * bins
    for level in range(LEVELS):
        inside = range(level * bins // LEVELS, (level + 1) * bins // LEVELS)
        filled = [i for i in inside if counts[i]]
        for i in filled:
            quantized[i] = sum(counts[j] for j in inside) / len(filled)
    counts[-1] += outside
    pairs = [(p, max(q, 1e-4)) for p, q in zip(counts, quantized, strict=True) if p]
    total, other = (sum(column) for column in zip(*pairs, strict=True))
    divergence = 0.0
    for p, q in pairs:
        divergence += p / total * np.log((p / total) / (q / other))
    return divergence


def test_entropy_finds_the_least_divergence_of_a_scalar_search(rng: np.random.Generator) -> None:
    values = np.abs(rng.laplace(size=20000)).astype(np.float32)
    found = seen(EntropyObserver(layer="x"), values)
    width = 2.0 ** np.ceil(np.log2(float(values.max()) / 2048))
    reach = int(values.max() // width) + 1
    thresholds = [-(-reach * k // 128) for k in range(1, 129)]
    best = min(
        (t for t in thresholds if t >= LEVELS),
        key=lambda t: kl_by_scalars(values, width, t * width),
    )
    assert found.maximum == pytest.approx(min(best * width, float(values.max())), abs=1e-9)
    assert found.maximum < values.max()


def squared_error(values: np.ndarray, range_: Range) -> float:
    qparams = choose_qparams(range_.minimum, range_.maximum, type=UINT8, symmetric=False)
    return float(np.mean((values - dequantize(quantize(values, qparams), qparams)) ** 2))


@pytest.mark.parametrize("shape", ["normal", "laplace", "relu", "heavy"])
def test_mse_range_is_nearly_the_best_of_really_quantized_values(
    rng: np.random.Generator, shape: str
) -> None:
    draw = {
        "normal": lambda: rng.normal(size=50000),
        "laplace": lambda: rng.laplace(size=50000) - 0.5,
        "relu": lambda: np.maximum(rng.laplace(size=50000), 0),
        "heavy": lambda: rng.standard_t(3, size=50000),
    }
    values = draw[shape]().astype(np.float32)
    found = seen(MseObserver(layer="x"), *np.split(values, 5))
    low, high = float(values.min()), float(values.max())
    reach = max(-low, high)
    grid = [
        Range(minimum=max(low, -t), maximum=min(high, t)) for t in np.linspace(0.05, 1, 200) * reach
    ]
    least = min(squared_error(values, r) for r in grid)
    # The uniform-noise model and the grid of 1/128 cost little.
    assert squared_error(values, found) <= 1.03 * least
    full = squared_error(values, Range(minimum=low, maximum=high))
    assert squared_error(values, found) <= full


def test_mse_keeps_one_outlier_among_few_and_drops_it_among_many() -> None:
    spread = np.linspace(0, 1, 1000, endpoint=False)
    few = seen(MseObserver(layer="x"), spread, [10.0])
    assert few.maximum > 9.5
    many = MseObserver(layer="x")
    for _ in range(1000):
        many.update(spread)
    assert seen(many, [10.0]).maximum < 9.0


@pytest.mark.parametrize("make", CLIPPING)
def test_two_sided_outliers_are_clipped_on_both_sides(rng: np.random.Generator, make) -> None:
    values = rng.normal(size=200_000)
    values[:2] = [-60.0, 90.0]
    found = seen(make(layer="x"), values)
    assert -60.0 < found.minimum < -2.0
    assert 2.0 < found.maximum < 90.0


@pytest.mark.parametrize("make", [*CLIPPING, MinMaxObserver, MovingAverageObserver])
@pytest.mark.parametrize("constant", [0.0, 3.0, -2.5])
def test_constant_stays_exact(make, constant: float) -> None:
    found = seen(make(layer="x"), np.full(100, constant), np.full(3, constant))
    qparams = choose_qparams(found.minimum, found.maximum, type=UINT8, symmetric=False)
    value = np.array([constant], np.float32)
    # A constant is an end of the range; only the scale itself is rounded to float32.
    np.testing.assert_allclose(dequantize(quantize(value, qparams), qparams), value, rtol=2e-7)


@pytest.mark.parametrize("method", list(Method))
def test_calibrator_makes_observers_that_name_their_layer(method: Method) -> None:
    observer = Calibrator(method=method).observer("conv1")
    with pytest.raises(ModelError, match=r"^conv1: calibration saw no value$"):
        _ = observer.range
    with pytest.raises(ModelError, match=r"^conv1: calibration met a value that is not finite"):
        observer.update(np.array([np.inf]))
    observer.update(np.zeros((0, 4)))
    observer.update(np.array([-1.0, 1.0]))
    assert -1.0 <= observer.range.minimum < observer.range.maximum <= 1.0


def test_calibrator_settings_differ_only_by_what_has_an_effect() -> None:
    every = [Calibrator(method=method).settings for method in Method]
    assert len({str(s) for s in every}) == len(Method)
    assert Calibrator(percentile=99.0).settings == Calibrator().settings
    changed = Calibrator(method=Method.PERCENTILE, percentile=99.0)
    assert changed.settings != Calibrator(method=Method.PERCENTILE).settings
