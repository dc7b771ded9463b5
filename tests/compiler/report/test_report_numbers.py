from __future__ import annotations

import pytest

from hone.report import numbers
from hone.report.schema import Comparison, Latency


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (0.0004123, "0.000412"),
        (0.01234, "0.0123"),
        (0.4123, "0.412"),
        (4.123, "4.12"),
        (41.23, "41.2"),
        (412.3, "412"),
        (41230.0, "41230"),
    ],
)
def test_milliseconds_have_three_digits(value, text):
    assert numbers.milliseconds(value) == text


def test_interval_has_the_decimals_of_the_median():
    latency = Latency(median=0.999, p90=1.2, ci95=(0.9, 1.05), samples=3)
    assert numbers.timing(latency) == "0.999 (0.900 to 1.050)"


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (31_234, "31.2 kB"),
     (999_400, "999 kB"), (999_600, "1 MB"), (12_345_678, "12.3 MB"), (123_456_789, "123 MB"),
     (5_000_000_000_000, "5000 GB")],
)  # fmt: skip
def test_size_is_decimal_with_three_digits(count, text):
    assert numbers.size(count) == text


def test_ratio_has_two_decimals():
    assert numbers.ratio(Comparison(ratio=1.517)) == "1.52x"
    assert numbers.ratio(Comparison(ratio=123.4)) == "123x"
    assert numbers.ratio(None) == "-"


def test_quality_is_the_output_error_where_there_is_no_accuracy(change):
    report = change({0: {"output_error": 0.00123}}, metric="relative_error")
    assert numbers.quality(report, report.steps[0]) == "0.0012"
    assert numbers.quality(report, report.steps[1]) == "-"
    assert numbers.quality_heading(report) == "output error"
