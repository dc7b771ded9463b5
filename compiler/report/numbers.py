"""How the reports write numbers: the same digits in the terminal, Markdown and HTML."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hone.report.schema import Comparison, Latency, Report, StepRow

NOTHING = "-"
"""Stands where nothing was measured."""


def milliseconds(value: float, digits_of: float | None = None) -> str:
    """Return three significant digits of a time in milliseconds.

    Parameters
    ----------
    value : float
        The time.
    digits_of : float, optional
        Another time whose decimals this one shall have, for the two ends of an interval.
    """
    reference = value if digits_of is None else digits_of
    decimals = 3 if reference <= 0 else min(6, max(0, 2 - math.floor(math.log10(reference))))
    return f"{value:.{decimals}f}"


def interval(latency: Latency) -> str:
    """Return the confidence interval with the decimals of the median."""
    low, high = (milliseconds(end, latency.median) for end in latency.ci95)
    return f"{low} to {high}"


def timing(latency: Latency | None) -> str:
    """Return median and interval, such as ``0.412 (0.405 to 0.420)``."""
    if latency is None:
        return NOTHING
    return f"{milliseconds(latency.median)} ({interval(latency)})"


def ratio(comparison: Comparison | None) -> str:
    """Return a speed-up, such as ``1.52x``; with ``?`` where the measurement does not show it."""
    if comparison is None:
        return NOTHING
    value = comparison.ratio
    text = f"{value:.2f}x" if value < 99.5 else f"{value:.0f}x"
    return f"{text} ?" if comparison.outcome == "not shown" else text


def size(count: int | None) -> str:
    """Return a number of bytes in decimal units, such as ``1.23 MB``."""
    if count is None:
        return NOTHING
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5 or unit == "GB":
            break
    return f"{value:.3g} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def percentage(fraction: float | None) -> str:
    """Return a fraction as a percentage with two decimals."""
    return NOTHING if fraction is None else f"{100 * fraction:.2f}%"


def quality(report: Report, row: StepRow) -> str:
    """Return a row's accuracy, or its output error where the report gates by that."""
    if report.metric == "top1":
        return percentage(row.accuracy)
    return NOTHING if row.output_error is None else f"{row.output_error:.2g}"


def quality_heading(report: Report) -> str:
    """Return what `quality` shows."""
    return "top-1" if report.metric == "top1" else "output error"
