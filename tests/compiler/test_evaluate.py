"""Top-1 and output errors on numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hone.data import Dataset
from hone.errors import UsageError
from hone.evaluate import evaluate, relative_error, top1


def test_top1_counts_the_right_ones() -> None:
    logits = np.array([[[1.0, 3.0, 2.0]], [[5.0, 0.0, 1.0]], [[0.0, 0.0, 9.0]], [[1.0, 2.0, 0.0]]])
    assert top1(logits, np.array([[1], [0], [0], [1]])) == 0.75


def test_top1_takes_batches_apart() -> None:
    logits = np.array([[[1.0, 3.0], [3.0, 1.0]]])
    assert top1(logits, np.array([[1, 1]])) == 0.5


def test_top1_is_an_error_when_the_output_is_no_vector_of_scores() -> None:
    with pytest.raises(UsageError) as caught:
        top1(np.zeros((4, 1, 3, 5)), np.zeros((4, 1), "int64"))
    assert str(caught.value) == (
        "top-1 needs one vector of class scores for each label: 4 labels, "
        "the model's first output is [1, 3, 5] for each sample\n"
        '  hint: [data] metric = "relative_error" compares outputs instead'
    )


def test_relative_error_is_the_worst_of_all_outputs() -> None:
    reference = {"a": np.array([2.0, -4.0]), "b": np.array([10.0])}
    actual = {"a": np.array([2.0, -3.0]), "b": np.array([9.0])}
    assert relative_error(actual, reference) == 0.25


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_output_that_is_no_number_is_an_infinite_error(broken: float) -> None:
    reference = {"a": np.array([2.0, -4.0])}
    assert relative_error({"a": np.array([2.0, broken])}, reference) == np.inf
    assert relative_error(reference, {"a": np.array([2.0, broken])}) == np.inf


def test_output_that_is_no_number_in_both_is_no_error() -> None:
    output = {"a": np.array([np.nan, -np.inf, 4.0])}
    assert relative_error(output, output) == 0.0
    assert relative_error({"a": np.array([np.nan, -np.inf, 3.0])}, output) == 0.25


def test_evaluate_runs_every_sample_and_compares_with_the_reference() -> None:
    data = Dataset(
        inputs={"x": np.array([[[1.0, 2.0]], [[4.0, 3.0]]])},
        labels=np.array([[1], [1]]),
        source="here",
    )
    quality, outputs = evaluate(lambda feeds: {"y": feeds["x"] * 2}, data)
    assert quality.accuracy == 0.5
    assert quality.output_error is None
    assert quality.samples == 2
    again, _ = evaluate(lambda feeds: {"y": feeds["x"] * 2.2}, data, reference=outputs)
    assert again.output_error == pytest.approx(0.1)
