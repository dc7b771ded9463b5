"""Observers: what is remembered of a tensor while calibration data streams through the network.

Memory does not grow with the data: an observer sees each batch once and keeps a fixed amount.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from hone.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Range:
    """The real interval that quantized levels shall cover."""

    minimum: float
    maximum: float


AVERAGING_CONSTANT: Final = 0.01
"""What the newest batch counts in a moving average; PyTorch's default."""


class Observer(Protocol):
    """Collects a range from batches of values."""

    def update(self, values: np.ndarray) -> None:
        """Take one batch of values, of any shape."""

    @property
    def range(self) -> Range:
        """The range chosen from everything seen so far."""


class MinMaxObserver:
    """The smallest and the largest value ever seen.

    ``range = [min over batches of min(batch), max over batches of max(batch)]``: exact, no value
    of the calibration data is clipped, and one outlier widens every step. Two numbers of memory.
    Worked number: the batches [0.5, 2.0] and [-1.0, 1.0] give [-1.0, 2.0].

    The observer of a whole batch and of the batch's own extremes agree, so that the extremes may
    be computed elsewhere (inside the compiled graph).

    Source: torchao ``AffineQuantizedMinMaxObserver``.

    Parameters
    ----------
    layer : str
        Named in errors.
    """

    def __init__(self, *, layer: str) -> None:
        self._layer = layer
        self._minimum = np.inf
        self._maximum = -np.inf

    def update(self, values: np.ndarray) -> None:
        """Take one batch of values, of any shape; an empty one changes nothing.

        Raises
        ------
        ModelError
            The batch holds NaN or infinity.
        """
        if values.size == 0:
            return
        minimum, maximum = finite_extremes(values, layer=self._layer)
        self._minimum = min(self._minimum, minimum)
        self._maximum = max(self._maximum, maximum)

    @property
    def range(self) -> Range:
        """Smallest and largest value seen so far.

        Raises
        ------
        ModelError
            Nothing was seen.
        """
        if self._minimum > self._maximum:
            raise ModelError("calibration saw no value", where=self._layer)
        return Range(minimum=self._minimum, maximum=self._maximum)


class MovingAverageObserver:
    """The exponential moving average of each batch's smallest and largest value.

    With ``c = 0.01``, for the n-th batch and both ends ``x`` of its range::

        average_n = average_(n-1) + c / (1 - (1 - c)^n) × (x_n - average_(n-1))

    The divisor takes the start out (the plain mean while n is far below 1 / c), so that the first
    sample counts no more than the others. One outlier moves the range by about 1 / n of what it
    moves min-max. Two numbers and a count of memory; depends on the order of the data.

    Worked number: the batches [0, 2] and [0, 4] give a maximum of 2, then
    2 + 0.01 / (1 - 0.99²) × 2 = 2 + 0.502513 × 2 = 3.005025.

    Source: PyTorch ``MovingAverageMinMaxObserver``; the divisor is that of Kingma and Ba, "Adam"
    (ICLR 2015), section 3.

    Parameters
    ----------
    layer : str
        Named in errors.
    """

    def __init__(self, *, layer: str) -> None:
        self._layer = layer
        self._batches = 0
        self._minimum = 0.0
        self._maximum = 0.0

    def update(self, values: np.ndarray) -> None:
        """Take one batch of values, of any shape; an empty one changes nothing.

        Raises
        ------
        ModelError
            The batch holds NaN or infinity.
        """
        if values.size == 0:
            return
        minimum, maximum = finite_extremes(values, layer=self._layer)
        self._batches += 1
        weight = AVERAGING_CONSTANT / (1.0 - (1.0 - AVERAGING_CONSTANT) ** self._batches)
        self._minimum += weight * (minimum - self._minimum)
        self._maximum += weight * (maximum - self._maximum)

    @property
    def range(self) -> Range:
        """Average ends of the ranges seen so far.

        Raises
        ------
        ModelError
            Nothing was seen.
        """
        if not self._batches:
            raise ModelError("calibration saw no value", where=self._layer)
        return Range(minimum=self._minimum, maximum=self._maximum)


def finite_extremes(values: np.ndarray, *, layer: str) -> tuple[float, float]:
    """Return the smallest and the largest of at least one value.

    Raises
    ------
    ModelError
        One is NaN or infinite.
    """
    minimum, maximum = float(values.min()), float(values.max())
    if not (np.isfinite(minimum) and np.isfinite(maximum)):
        raise ModelError(
            f"calibration met a value that is not finite: [{minimum:g}, {maximum:g}]",
            where=layer,
            hint="look for NaN, infinity or huge values in the calibration data; "
            "a layer that overflows float32 cannot be quantized",
        )
    return minimum, maximum
