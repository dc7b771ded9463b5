"""Quantization of weights alone: levels of few bits with a scale for each channel or group.

A weight is seen as a matrix ``[K, D]``: output channels by everything that is summed into one of
them (input channels of a matrix product; rows, columns and input channels, in this order, of a
convolution). A *group* is ``group`` neighbours along D; where it does not divide D, the last group
of each channel is shorter. Activations stay float32, so nothing needs calibration::

    weight = scale[k, d // group] × (level[k, d] - zero_point[k, d // group])

Numerics: each weight is off by at most half a scale, except in the ternary and binary schemes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from hone.errors import ModelError, UsageError

from .qparams import PerAxis, QuantizedType, choose_qparams

STORED_BITS = (2, 4, 8)
# Exponents of the normal float32 numbers.
LEAST_EXPONENT, LARGEST_EXPONENT = -126, 127
# Of the mean magnitude: Li, Zhang and Liu, "Ternary Weight Networks", 2016, equation 6.
TERNARY_THRESHOLD = 0.7


class Scheme(StrEnum):
    """How a weight becomes a level.

    - ``integer``: evenly spaced levels, as `integer_levels` says.
    - ``ternary``: -1, 0 or 1, as `ternary_levels` says.
    - ``binary``: -1 or 1, as `binary_levels` says.
    - ``xnor``: the same, and activations are binary too, see `binary_layers`.
    """

    INTEGER = "integer"
    TERNARY = "ternary"
    BINARY = "binary"
    XNOR = "xnor"


class Granularity(StrEnum):
    """What shares one scale: ``[K, D] → scale [1, 1]``, ``[K, 1]`` or ``[K, ceil(D / group)]``."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """How weights are quantized.

    Parameters
    ----------
    scheme : Scheme
        What levels there are.
    bits : int
        Of an integer level, 2 to 8; they are stored in 2, 4 or 8. Other numbers of bits are for
        training that lowers them step by step. Ternary levels take 2, binary ones 1.
    granularity : Granularity
        What shares a scale.
    group_size : int
        Weights of one group, where the granularity is ``group``.
    symmetric : bool
        Integer levels about 0, without a zero point.
    power_of_two : bool
        Scales are powers of two, stored as an exponent of one byte; see `power_of_two_scales`.

    Raises
    ------
    UsageError
        An option has no meaning, or none beside another one.
    """

    scheme: Scheme = Scheme.INTEGER
    bits: int = 8
    granularity: Granularity = Granularity.CHANNEL
    group_size: int = 32
    symmetric: bool = True
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if not STORED_BITS[0] <= self.bits <= STORED_BITS[-1]:
            raise UsageError(f"weights have 2 to 8 bits, not {self.bits}")
        if self.group_size < 1:
            raise UsageError(f"a group holds at least 1 weight, not {self.group_size}")
        if self.scheme is Scheme.XNOR and self.granularity is Granularity.GROUP:
            raise UsageError("binary activations need one scale for a channel or for all weights")
        if self.scheme is not Scheme.INTEGER and not self.symmetric:
            raise UsageError(f"{self.scheme} levels are symmetric: they have no zero point")

    @property
    def stored_bits(self) -> int:
        """Bits of one stored level."""
        whole = next(stored for stored in STORED_BITS if stored >= self.bits)
        signs = {Scheme.TERNARY: 2, Scheme.BINARY: 1, Scheme.XNOR: 1}
        return signs.get(self.scheme, whole)


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightLevels:
    """A quantized weight matrix.

    Parameters
    ----------
    levels : numpy.ndarray
        int8 ``[K, D]``; of 1 bit: -1 or 1.
    scale : numpy.ndarray
        float32 ``[K, G]``, or ``[1, 1]`` for a whole tensor.
    zero_point : numpy.ndarray or None
        int8, the shape of ``scale``; None where it is 0 everywhere.
    bits : int
        Of one level as it is stored.
    group : int
        Weights along D that share a scale; G is ``ceil(D / group)``.
    power_of_two : bool
        Every scale is a power of two.
    """

    levels: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    bits: int
    group: int
    power_of_two: bool = False

    def real(self) -> np.ndarray:
        """Return the weights that the levels stand for, float32 ``[K, D]``."""
        depth = self.levels.shape[1]

        def along(values: np.ndarray) -> np.ndarray:
            return np.repeat(values, self.group, axis=1)[:, :depth]

        values = self.levels.astype(np.float32)
        if self.zero_point is not None:
            values = values - along(self.zero_point.astype(np.float32))
        return np.asarray(values * along(self.scale), np.float32)


Choice = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Levels, scale and zero point of rows."""


def quantize_weights(
    weight: np.ndarray, options: WeightOptions, *, layer: str | None = None
) -> WeightLevels:
    """Quantize a weight matrix.

    Parameters
    ----------
    weight : numpy.ndarray
        float32 ``[K, D]``.
    options : WeightOptions
        How.
    layer : str, optional
        Named in errors.

    Returns
    -------
    WeightLevels

    Raises
    ------
    ModelError
        The weights hold NaN or infinity.
    """
    values = np.asarray(weight, np.float32)
    broken = int(np.size(values) - np.isfinite(values).sum())
    if broken:
        raise ModelError(
            f"finite weights are required, but {broken} of {values.size} are NaN or infinite",
            where=layer,
            hint="skip the layer, or export the model again",
        )
    channels, depth = values.shape
    group = min(options.group_size, depth) if options.granularity is Granularity.GROUP else depth
    if options.granularity is Granularity.TENSOR:
        rows = values.reshape(1, -1)
        present = np.ones_like(rows, bool)
    else:
        rows, present = _grouped(values, group)
    levels, scale, zero_point = _quantize_rows(rows, present, options, layer)
    if options.granularity is Granularity.TENSOR:
        levels, shape = levels.reshape(channels, depth), (1, 1)
    else:
        levels = levels.reshape(channels, -1)[:, :depth]
        shape = (channels, -(-depth // group))
    return WeightLevels(
        levels=np.ascontiguousarray(levels, np.int8),
        scale=scale.reshape(shape),
        zero_point=None if zero_point is None else zero_point.reshape(shape).astype(np.int8),
        bits=options.stored_bits,
        group=group,
        power_of_two=options.power_of_two,
    )


def integer_levels(
    rows: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, type_: QuantizedType
) -> np.ndarray:
    """Return the evenly spaced level next to each weight, ties to even.

    ``level = clamp(round(w / scale) + zero_point)``. Symmetric b bits have levels of
    ``[-(2^(b-1) - 1), 2^(b-1) - 1]`` and ``scale = max|w| / (2^(b-1) - 1)``; asymmetric ones
    ``[-2^(b-1), 2^(b-1) - 1]`` and ``scale = (max w - min w) / (2^b - 1)``, with the range extended
    to 0. Symmetric 2 bits therefore are -1, 0 and 1: where half of the range is not needed for a
    sign, asymmetric ones are better.

    Worked number: 4 bits, symmetric, weights up to 1.4: scale 0.2; 0.45 becomes round(2.25) = 2 and
    comes back as 0.4. Asymmetric, weights from -0.6 to 2.4: scale 3 / 15 = 0.2 and zero point
    -8 + 3 = -5; 0.45 becomes 2 - 5 = -3 and comes back as 0.4.

    Source: Jacob et al., CVPR 2018, equation 1; groups: Shen et al., "Q-BERT", AAAI 2020.

    Parameters
    ----------
    rows : numpy.ndarray
        float32 ``[N, n]``.
    scale, zero_point : numpy.ndarray
        ``[N]``.
    type_ : QuantizedType
        Lowest and highest level.
    """
    steps = np.rint(rows / scale[:, None]) + zero_point[:, None]
    return np.asarray(np.clip(steps, type_.quant_min, type_.quant_max))


def ternary_levels(rows: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return levels -1, 0, 1 and the scale of each row.

    ``level = sign(w) where |w| > t, else 0``, with ``t = 0.7 × mean|w|`` and
    ``scale = mean of |w| over |w| > t``, which is the best scale for these levels.

    Worked number: 0.1, -0.5, 0.9, -0.2 have mean 0.425 and t = 0.2975; the levels are 0, -1, 1, 0
    and the scale is (0.5 + 0.9) / 2 = 0.7.

    Source: Li, Zhang and Liu, "Ternary Weight Networks", 2016, equations 5 and 6.

    Parameters
    ----------
    rows : numpy.ndarray
        float32 ``[N, n]``.
    present : numpy.ndarray
        bool ``[N, n]``: what is a weight, and not there to fill a short group.
    """
    magnitude = np.abs(rows)
    threshold = TERNARY_THRESHOLD * magnitude.sum(1) / present.sum(1)
    kept = magnitude > threshold[:, None]
    count = kept.sum(1)
    # A row of zeros keeps nothing, and its levels are 0 under any scale.
    scale = np.where(count, (magnitude * kept).sum(1) / np.maximum(count, 1), 1.0)
    return np.where(kept, np.sign(rows), 0.0), scale


def binary_levels(rows: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return levels -1, 1 and the scale of each row.

    ``level = 1 where w >= 0, else -1`` and ``scale = mean|w|``, which is the best scale for these
    levels. A row of zeros has scale 0.

    Worked number: 0.1, -0.5, 0.9, -0.2 become 1, -1, 1, -1 with scale 0.425.

    Source: Rastegari et al., "XNOR-Net", ECCV 2016, equations 5 and 6.

    Parameters
    ----------
    rows : numpy.ndarray
        float32 ``[N, n]``.
    present : numpy.ndarray
        bool ``[N, n]``: what is a weight, and not there to fill a short group.
    """
    scale = np.abs(rows).sum(1) / present.sum(1)
    return np.where(rows >= 0, 1.0, -1.0), scale


def power_of_two_scales(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the powers of two next to each scale, below and above it.

    `quantize_weights` takes the one that leaves the smaller squared error in its group: below the
    scale the largest weights are clipped, above it all steps are coarser.

    Worked number: 0.3 lies between 2^-2 = 0.25 and 2^-1 = 0.5.

    Source: Jain et al., "Trained Quantization Thresholds", MLSys 2020, which always takes the
    larger one.

    Parameters
    ----------
    scale : numpy.ndarray
        float, any shape; 0 becomes the smallest normal number.
    """
    exponent = np.log2(np.maximum(scale, 2.0**LEAST_EXPONENT))
    low, high = (
        np.clip(bound(exponent), LEAST_EXPONENT, LARGEST_EXPONENT) for bound in (np.floor, np.ceil)
    )
    return np.exp2(low).astype(np.float32), np.exp2(high).astype(np.float32)


def _grouped(values: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``[K, D] → [K × G, group]``, short groups filled with 0, and what was there."""
    channels, depth = values.shape
    rounded = -(-depth // group) * group
    padded = np.zeros((channels, rounded), np.float32)
    padded[:, :depth] = values
    present = np.zeros((channels, rounded), bool)
    present[:, :depth] = True
    return padded.reshape(-1, group), present.reshape(-1, group)


def _quantize_rows(
    rows: np.ndarray, present: np.ndarray, options: WeightOptions, layer: str | None
) -> Choice:
    """Return levels, scale and zero point of rows that have one scale each."""
    if options.scheme is Scheme.INTEGER:
        return _integer_rows(rows, options, layer)
    make = ternary_levels if options.scheme is Scheme.TERNARY else binary_levels
    levels, scale = make(rows, present)
    if options.power_of_two:
        choices: list[Choice] = [(levels, each, None) for each in power_of_two_scales(scale)]
        return _nearest(rows, present, choices)
    return levels, scale.astype(np.float32), None


def _integer_rows(rows: np.ndarray, options: WeightOptions, layer: str | None) -> Choice:
    type_ = QuantizedType(bits=options.bits, signed=True, narrow=options.symmetric)
    low = np.minimum(rows.min(1), 0.0)
    qparams = choose_qparams(
        low,
        rows.max(1),
        type=type_,
        symmetric=options.symmetric,
        granularity=PerAxis(axis=0),
        layer=layer,
    )
    scales = power_of_two_scales(qparams.scale) if options.power_of_two else (qparams.scale,)
    choices: list[Choice] = []
    for scale in scales:
        zero_point = qparams.zero_point
        if not options.symmetric:
            zero_point = np.clip(
                type_.quant_min - np.rint(low / scale), type_.quant_min, type_.quant_max
            )
        levels = integer_levels(rows, scale, zero_point, type_)
        choices.append((levels, scale, None if options.symmetric else zero_point))
    return _nearest(rows, np.ones_like(rows, bool), choices)


def _nearest(
    rows: np.ndarray,
    present: np.ndarray,
    choices: Sequence[Choice],
) -> Choice:
    """Return, row by row, the choice of levels, scale and zero point with the least error."""
    errors = []
    for levels, scale, zero_point in choices:
        centred = levels if zero_point is None else levels - zero_point[:, None]
        errors.append((np.square(rows - scale[:, None] * centred) * present).sum(1))
    best = np.argmin(errors, axis=0)
    at = np.arange(len(rows))
    zero_points = [choice[2] for choice in choices if choice[2] is not None]
    return (
        np.stack([choice[0] for choice in choices])[best, at],
        np.stack([choice[1] for choice in choices])[best, at].astype(np.float32),
        np.stack(zero_points)[best, at] if zero_points else None,
    )
