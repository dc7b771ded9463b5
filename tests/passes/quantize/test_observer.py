from __future__ import annotations

import numpy as np
import pytest

from hone.errors import ModelError
from hone.passes.quantize.observer import MinMaxObserver, Observer, Range


def test_range_matches_the_worked_number() -> None:
    observer: Observer = MinMaxObserver(layer="conv1")
    observer.update(np.array([0.5, 2.0]))
    observer.update(np.array([-1.0, 1.0]))
    assert observer.range == Range(minimum=-1.0, maximum=2.0)


def test_range_is_the_same_however_the_data_are_batched(rng: np.random.Generator) -> None:
    values = rng.normal(size=(64, 7))
    whole, streamed, extremes = (MinMaxObserver(layer="x") for _ in range(3))
    whole.update(values)
    for row in values:
        streamed.update(row)
        extremes.update(np.array([row.min(), row.max()]))
    assert whole.range == streamed.range == extremes.range


def test_empty_batch_changes_nothing() -> None:
    observer = MinMaxObserver(layer="x")
    observer.update(np.array([1.0]))
    observer.update(np.zeros((0, 3)))
    assert observer.range == Range(minimum=1.0, maximum=1.0)


def test_memory_does_not_grow_with_the_data() -> None:
    observer = MinMaxObserver(layer="x")
    observer.update(np.ones(1))
    before = {k: type(v) for k, v in vars(observer).items()}
    for _ in range(100):
        observer.update(np.ones(1000))
    assert {k: type(v) for k, v in vars(observer).items()} == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_error_names_the_layer_when_a_value_is_not_finite(bad: float) -> None:
    observer = MinMaxObserver(layer="conv1")
    with pytest.raises(ModelError) as error:
        observer.update(np.array([bad, 1.0, 2.0]))
    assert str(error.value).startswith("conv1: calibration met a value that is not finite: [")


def test_error_names_the_layer_when_nothing_was_seen() -> None:
    with pytest.raises(ModelError) as error:
        _ = MinMaxObserver(layer="conv1").range
    assert str(error.value) == "conv1: calibration saw no value"
