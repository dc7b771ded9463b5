"""Observers: what is remembered of a tensor while calibration data streams through the network.

Memory does not grow with the data: an observer sees each batch once and keeps a fixed amount.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hone.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Range:
    """The real interval that quantized levels shall cover."""

    minimum: float
    maximum: float


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
        minimum, maximum = float(values.min()), float(values.max())
        if not np.isfinite(minimum + maximum):
            raise ModelError(
                f"calibration met a value that is not finite: [{minimum:g}, {maximum:g}]",
                where=self._layer,
                hint="look for NaN, infinity or huge values in the calibration data; "
                "a layer that overflows float32 cannot be quantized",
            )
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
