"""What weights are trained to: the real values that their levels of few bits can have.

Rewrites nothing: gives the training step (`hone.trainer`) the weights that the network is to see.
The grids are those of `hone.passes.quantize.weight_schemes`, so a trained network is quantized
by the same function that it was trained with. int8 layers have the default options: 8 bits,
symmetric, one scale for each output channel. Numerics: as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hone.passes.quantize.qparams import QuantizedType
from hone.passes.quantize.weight_schemes import Scheme, WeightOptions, quantize_weights

_CONV_AXES = 4


def as_rows(value: np.ndarray) -> np.ndarray:
    """Return a trained weight as the matrix that is quantized.

    A convolution's ``[K, C, R, S] → [K, R × S × C]``, a product's ``[C, K] → [K, C]``.
    """
    moved = value.transpose(0, 2, 3, 1) if value.ndim == _CONV_AXES else value.T
    return np.ascontiguousarray(moved).reshape(len(moved), -1)


def from_rows(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the weight of a shape that `as_rows` made the rows of."""
    if len(shape) == _CONV_AXES:
        channels, depth, *taps = shape
        return np.ascontiguousarray(rows.reshape(channels, *taps, depth).transpose(0, 3, 1, 2))
    return np.ascontiguousarray(rows.T)


def project(value: np.ndarray, options: WeightOptions) -> np.ndarray:
    """Return the weight that a quantized one stands for, scales chosen for its present values.

    Parameters
    ----------
    value : numpy.ndarray
        float32: ``[K, C, R, S]`` or ``[C, K]``.
    options : WeightOptions
        How it will be quantized.
    """
    return from_rows(quantize_weights(as_rows(value), options).real(), value.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class FixedGrid:
    """The grid of a weight with scales that stay, so that frozen elements stay on it.

    Parameters
    ----------
    scale : numpy.ndarray
        float32 ``[K, D]``.
    zero_point : numpy.ndarray
        float32 ``[K, D]``.
    low, high : int
        Lowest and highest level; without 0 between them where ``binary``.
    binary : bool
        The levels are -1 and 1 only.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    low: int
    high: int
    binary: bool = False

    @classmethod
    def of(cls, value: np.ndarray, options: WeightOptions) -> FixedGrid:
        """Return the grid that a weight's present values choose."""
        rows = as_rows(value)
        found = quantize_weights(rows, options)
        type_ = QuantizedType(bits=options.bits, signed=True, narrow=options.symmetric)
        few = options.scheme is not Scheme.INTEGER
        depth = rows.shape[1]

        def spread(values: np.ndarray) -> np.ndarray:
            along = np.repeat(values.astype(np.float32), found.group, axis=1)[:, :depth]
            return np.broadcast_to(along, rows.shape)

        zeros = np.zeros_like(found.scale)
        return cls(
            scale=spread(found.scale),
            zero_point=spread(zeros if found.zero_point is None else found.zero_point),
            low=-1 if few else type_.quant_min,
            high=1 if few else type_.quant_max,
            binary=options.scheme is Scheme.BINARY,
        )

    def nearest(self, value: np.ndarray) -> np.ndarray:
        """Return the values of the grid next to a weight's."""
        rows = as_rows(value)
        if self.binary:
            steps = np.where(rows >= 0.0, np.float32(1.0), np.float32(-1.0))
        else:
            steps = np.rint(self._steps(rows)) + self.zero_point
            steps = np.clip(steps, self.low, self.high) - self.zero_point
        return from_rows(steps * self.scale, value.shape)

    def within(self, value: np.ndarray) -> np.ndarray:
        """Return a weight clipped to the ends of the grid."""
        low, high = ((end - self.zero_point) * self.scale for end in (self.low, self.high))
        return from_rows(np.clip(as_rows(value), low, high), value.shape)

    def reach(self, value: np.ndarray) -> np.ndarray:
        """Return how far out on the grid each element lies: 1 is the end of its side, 0 is 0.0."""
        steps = self._steps(as_rows(value))
        ends = np.where(steps < 0.0, self.low - self.zero_point, self.high - self.zero_point)
        return from_rows(steps / np.where(ends == 0.0, 1.0, ends), value.shape)

    def _steps(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(rows / np.where(self.scale == 0.0, np.float32(1.0), self.scale))


def freeze_more(reach: np.ndarray, frozen: np.ndarray, fraction: float) -> np.ndarray:
    """Return which elements are frozen once a fraction of a weight is: the outermost first.

    What was frozen stays so. The largest weights go first because they matter most and the small
    ones that follow can make up for their error; it also freezes the weight that each scale was
    chosen for. With 4 elements of reach [1, 0.2, 0.9, 0.5], none frozen and 0.5: the first and the
    third.

    Source: Zhou et al., "Incremental Network Quantization" (ICLR 2017), section 3.2, its
    "pruning-inspired" partition.

    Parameters
    ----------
    reach : numpy.ndarray
        From `FixedGrid.reach`.
    frozen : numpy.ndarray
        bool, the same shape.
    fraction : float
        Of all elements, rounded to the nearest whole number of them.
    """
    count = round(fraction * reach.size)
    order = np.argsort(np.where(frozen, -np.inf, -reach), axis=None, kind="stable")
    result = np.zeros(reach.size, bool)
    result[order[:count]] = True
    return np.asarray(result.reshape(reach.shape) | frozen)
