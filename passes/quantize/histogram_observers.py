"""Observers that clip: the range is narrower than the data where that costs less than it gains.

Each reads a streaming `Histogram` of all values, so memory is one histogram for each tensor, and
the result does not depend on the order of the data. What lies outside of a range saturates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from hone.errors import UsageError

from .histogram import Histogram
from .observer import Range
from .qparams import UINT8

LEVELS: Final = UINT8.quant_max - UINT8.quant_min + 1
CANDIDATES: Final = 128
"""Thresholds tried: steps below one percent of the range."""

DEFAULT_PERCENTILE: Final = 99.99
"""One of the two percentiles with the least loss over networks in Wu et al. 2020, section 4."""

SMOOTHING: Final = 1e-4
"""What an empty bin counts in a distribution that something is divided by; onnxruntime's."""


class _HistogramObserver:
    """What the three observers share: the histogram."""

    def __init__(self, *, layer: str) -> None:
        self._histogram = Histogram(layer=layer)

    def update(self, values: np.ndarray) -> None:
        """Count a batch of values, of any shape; an empty one changes nothing.

        Raises
        ------
        ModelError
            The batch holds NaN or infinity.
        """
        self._histogram.update(values)


class PercentileObserver(_HistogramObserver):
    """The interval that holds a percentage of the values.

    ``range = [q(a), q(1 - a)]`` with ``a = (100 - percentile) / 200`` and ``q`` the quantile,
    interpolated within a bin: off by at most one bin's width, which is less than 1 / 1024 of the
    data's range. Behind a ReLU the lower quantile is 0, so only the upper end is clipped.

    Worked number: the values 1, 2, ..., 1000 at 99 percent: a = 0.005, and five values
    lie outside at each end: the range is [6, 995.5], with bins of the width 0.5.

    Source: Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical
    Evaluation" (2020), section 4; two-sided as in onnxruntime's ``PercentileCalibrater``.

    Parameters
    ----------
    layer : str
        Named in errors.
    percentile : float
        Above 50, up to 100; 100 is min-max.

    Raises
    ------
    UsageError
        The percentile is outside of its bounds.
    """

    def __init__(self, *, layer: str, percentile: float = DEFAULT_PERCENTILE) -> None:
        super().__init__(layer=layer)
        if not 50.0 < percentile <= 100.0:
            raise UsageError(
                f"a percentile must be above 50 and at most 100, not {percentile:g}", where=layer
            )
        self._outside = (100.0 - percentile) / 200.0

    @property
    def range(self) -> Range:
        """The two quantiles of everything seen so far.

        Raises
        ------
        ModelError
            Nothing was seen.
        """
        histogram = self._histogram
        counts = histogram.counts.astype(np.float64)
        edges = (histogram.first + np.arange(len(counts) + 1)) * histogram.width
        # The zeros are a step of the distribution at the edge 0, which always exists.
        at_zero = -histogram.first
        below = np.concatenate([[0.0], np.cumsum(counts)])
        below = np.insert(below, at_zero + 1, below[at_zero])
        below[at_zero + 1 :] += histogram.zeros
        edges = np.insert(edges, at_zero + 1, 0.0)
        tail = self._outside * histogram.total
        low = _crossing(edges, below, tail)
        high = -_crossing(-edges[::-1], histogram.total - below[::-1], tail)
        return Range(
            minimum=min(max(low, histogram.minimum), histogram.maximum),
            maximum=max(min(high, histogram.maximum), histogram.minimum),
        )


class EntropyObserver(_HistogramObserver):
    """The interval whose levels lose the least information about the values.

    For thresholds T, the histogram within ``[max(minimum, -T), min(maximum, T)]``, what lies
    outside added to the bins at its ends, is the reference P. Q is the same histogram in 256
    levels: each level's count shared evenly among its bins that are not empty. The T with the
    least ``KL(P ‖ Q) = Σ P log(P / Q)`` wins, the widest of equals. An end bin that is empty but
    for what was added counts as 1e-4 in Q. Exact zeros take no part: a level is always exactly
    0, so they lose nothing. At least 256 bins stay inside.

    Worked number: bins [4, 0, 3, 1] in 2 levels: the levels hold 4 and 4, Q = [4, 0, 2, 2], and
    KL = (4 log(4/4) + 3 log(3/2) + 1 log(1/2)) / 8 = 0.0654.

    Source: Migacz, "8-bit Inference with TensorRT" (GTC 2017), slides 26 to 38, with a range that
    need not be symmetric; the smoothing is onnxruntime's (``EntropyCalibrater``).

    Parameters
    ----------
    layer : str
        Named in errors.
    """

    @property
    def range(self) -> Range:
        """The range of least divergence for everything seen so far.

        Raises
        ------
        ModelError
            Nothing was seen.
        """
        counts = self._histogram.counts
        best, least = Range(minimum=self._histogram.minimum, maximum=self._histogram.maximum), None
        for window in _windows(self._histogram):
            inside = counts[window.start : window.stop]
            if len(inside) < LEVELS:
                break
            reference = inside.astype(np.float64)
            reference[0] += counts[: window.start].sum()
            reference[-1] += counts[window.stop :].sum()
            divergence = relative_entropy(reference, in_levels(inside, LEVELS))
            if least is None or divergence < least:
                best, least = window.range, divergence
        return best


class MseObserver(_HistogramObserver):
    """The interval with the least mean squared error of quantized values.

    For thresholds T and ``[low, high] = [max(minimum, -T), min(maximum, T)]``, in steps of
    ``(high - low) / 255`` with 0 in between::

        error = Σ_inside count × step² / 12
              + Σ_below count × (low - x)² + Σ_above count × (x - high)²

    The first term is the variance of rounding (uniform within a step), the others are saturation;
    x is a bin's middle. The least error wins, the widest of equals. Exact zeros have no error.

    Worked number: 1000 values spread over [0, 1) and one at 10. T = 10: step = 0.0392, error
    1001 × 0.000128 = 0.128. T = 1: 1000 × 1.28e-6 + 9² = 81. So 10 stays: one value that is far
    off costs more than a coarse step for a thousand; with a million values T = 10 costs 128 and
    T = 1 costs 82.3.

    Source: Banner et al., "Post training 4-bit quantization of convolutional networks for
    rapid-deployment" (NeurIPS 2019), section 3, with the histogram for the assumed distribution.

    Parameters
    ----------
    layer : str
        Named in errors.
    """

    @property
    def range(self) -> Range:
        """The range of least error for everything seen so far.

        Raises
        ------
        ModelError
            Nothing was seen.
        """
        histogram = self._histogram
        counts = histogram.counts.astype(np.float64)
        middle = (histogram.first + np.arange(len(counts)) + 0.5) * histogram.width
        best, least = Range(minimum=histogram.minimum, maximum=histogram.maximum), None
        for window in _windows(histogram):
            low, high = window.range.minimum, window.range.maximum
            step = (max(high, 0.0) - min(low, 0.0)) / (LEVELS - 1)
            outside = np.maximum(low - middle, 0.0) + np.maximum(middle - high, 0.0)
            error = float(counts @ np.where(outside > 0.0, outside**2, step**2 / 12.0))
            if least is None or error < least:
                best, least = window.range, error
        return best


def in_levels(counts: np.ndarray, levels: int) -> np.ndarray:
    """Return a histogram as levels would tell it: each level's count, even over its filled bins.

    ``[bins] → float64 [bins]``; the first worked number is that of `EntropyObserver`.

    Parameters
    ----------
    counts : numpy.ndarray
        ``[bins]``, at least as many bins as levels.
    levels : int
        Bin ``i`` belongs to level ``i × levels // bins``, to within one bin.
    """
    starts = np.arange(levels) * len(counts) // levels
    sizes = np.diff(np.append(starts, len(counts)))
    sums = np.add.reduceat(counts, starts).astype(np.float64)
    filled = np.add.reduceat((counts > 0).astype(np.int64), starts)
    even = sums / np.maximum(filled, 1)
    return np.where(counts > 0, np.repeat(even, sizes), 0.0)


def relative_entropy(reference: np.ndarray, other: np.ndarray) -> float:
    """Return ``KL(reference ‖ other)`` in nats of two histograms, each divided by its sum.

    An empty bin of `other` counts as `SMOOTHING` where the reference is not empty; an empty
    reference has 0.
    """
    filled = reference > 0
    if not filled.any():
        return 0.0
    p, q = reference[filled].astype(np.float64), np.maximum(other[filled], SMOOTHING)
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p * np.log(p / q)))


class _Window(NamedTuple):
    """Bins ``start`` to ``stop`` of the histogram's counts, and the range that they cover."""

    start: int
    stop: int
    range: Range


def _windows(histogram: Histogram) -> Iterator[_Window]:
    """Yield the whole range, then what thresholds on the magnitude leave of it, widest first."""
    bins = len(histogram.counts)
    reach = max(-histogram.first, histogram.first + bins)
    seen: set[int] = set()
    for step in range(CANDIDATES, 0, -1):
        threshold = -(-reach * step // CANDIDATES)
        if threshold in seen:
            continue
        seen.add(threshold)
        low = max(histogram.first, -threshold)
        high = min(histogram.first + bins, threshold)
        yield _Window(
            start=low - histogram.first,
            stop=high - histogram.first,
            range=Range(
                minimum=max(low * histogram.width, histogram.minimum),
                maximum=min(high * histogram.width, histogram.maximum),
            ),
        )


def _crossing(edges: np.ndarray, below: np.ndarray, wanted: float) -> float:
    """Return the largest x with at most `wanted` values below it, linear between the edges."""
    after = int(np.searchsorted(below, wanted, side="right"))
    if after == len(below):
        return float(edges[-1])
    start, stop = below[after - 1], below[after]
    return float(
        edges[after - 1] + (edges[after] - edges[after - 1]) * (wanted - start) / (stop - start)
    )
