"""A histogram of a stream whose range nobody knows beforehand, in a fixed amount of memory.

The bins are those of a grid through zero whose width is a power of two. Where a new value does not
fit, the width doubles and neighbours merge in pairs. So a bin never has to be divided, no count is
ever approximate, and the result does not depend on how the data were cut or in which order they
came: only the whole range decides the width.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from hone.errors import ModelError

from .observer import finite_extremes

BINS: Final = 2048
"""As in TensorRT's calibrator; the range fills more than half of them."""

_SMALLEST_EXPONENT: Final = -160
"""Below the smallest float32, so that two different float32 values still get two bins."""


class Histogram:
    """Counts of real values in at most `BINS` bins ``[i × width, (i + 1) × width)``.

    ``width`` is the smallest power of two with which ``[min(0, minimum), max(0, maximum)]``
    touches at most `BINS` bins. Exact zeros are counted apart: quantization keeps them exact, and
    half of the values behind a ReLU are zeros.

    Worked number: the values -1, 0, 0.5 and 3 touch 2048 bins with the width 2^-9 (bins -512 to
    1536 would be 2049), so the width is 2^-8: bins -256, 128 and 768 count one each, zeros is 1.

    Source: the merging of bins is that of PyTorch's ``HistogramObserver``, restricted to factors
    of two, where it is exact.

    Parameters
    ----------
    layer : str
        Named in errors.

    Attributes
    ----------
    width : float
        Of a bin.
    zeros : int
        Values that are exactly 0.
    minimum, maximum : float
        Exact extremes; meaningless while ``total`` is 0.
    """

    def __init__(self, *, layer: str) -> None:
        self._layer = layer
        self._exponent = _SMALLEST_EXPONENT
        self._counts = np.zeros(BINS, np.int64)
        self._first = 0
        self.zeros = 0
        self.minimum = math.inf
        self.maximum = -math.inf

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self._exponent)

    @property
    def total(self) -> int:
        """Values seen, zeros included."""
        return int(self._counts.sum()) + self.zeros

    @property
    def first(self) -> int:
        """Index of the first bin: its values start at ``first × width``."""
        return self._first

    @property
    def counts(self) -> np.ndarray:
        """int64 ``[bins]``: from the first to the last bin that the range touches, no zeros.

        Raises
        ------
        ModelError
            Nothing was seen.
        """
        if not self.total:
            raise ModelError("calibration saw no value", where=self._layer)
        _, last = self._touched(self._exponent)
        return self._counts[: last - self._first + 1].copy()

    def update(self, values: np.ndarray) -> None:
        """Count a batch of values, of any shape; an empty one changes nothing.

        Raises
        ------
        ModelError
            The batch holds NaN or infinity.
        """
        if values.size == 0:
            return
        minimum, maximum = finite_extremes(values, layer=self._layer)
        self.minimum = min(self.minimum, minimum)
        self.maximum = max(self.maximum, maximum)
        self._make_room()
        flat = np.asarray(values, np.float64).reshape(-1)
        flat = flat[flat != 0.0]
        self.zeros += values.size - flat.size
        bins = np.floor(np.ldexp(flat, -self._exponent)).astype(np.int64) - self._first
        self._counts += np.bincount(bins, minlength=BINS)

    def _touched(self, exponent: int) -> tuple[int, int]:
        """Return the first and last bin of the range, zero included, for a width of 2^exponent."""
        return (
            math.floor(math.ldexp(min(0.0, self.minimum), -exponent)),
            math.floor(math.ldexp(max(0.0, self.maximum), -exponent)),
        )

    def _make_room(self) -> None:
        """Widen the bins until the range fits, and move the counts to where they belong."""
        exponent = self._exponent
        widest = max(-self.minimum, self.maximum, 0.0)
        if widest:
            # No narrower width can fit `widest` alone; the loop then adds at most two doublings.
            exponent = max(exponent, math.frexp(widest)[1] - BINS.bit_length())
        first, last = self._touched(exponent)
        while last - first >= BINS:
            exponent += 1
            first, last = self._touched(exponent)
        old = np.flatnonzero(self._counts)
        counts = np.zeros(BINS, np.int64)
        moved = ((old + self._first) >> (exponent - self._exponent)) - first
        np.add.at(counts, moved, self._counts[old])
        self._counts, self._first, self._exponent = counts, first, exponent
