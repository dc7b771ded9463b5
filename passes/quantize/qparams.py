"""Quantization parameters, and the two functions between real and integer tensors.

The vocabulary is torchao's (``quant_primitives.py``, ``granularity.py``). The mapping is the affine
one of Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (CVPR 2018), equation 1::

    real = scale × (level - zero_point)

Rounding is to nearest, ties to even, and all real arithmetic is float32, as the compiled kernels do
it: `quantize` equals the operator ``hone.quantize`` bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hone.errors import ModelError

# Below it the reciprocal of a scale is no longer a finite float32.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class PerTensor:
    """One scale and zero point for a whole tensor: ``[...] → scale []``."""


@dataclass(frozen=True, kw_only=True)
class PerAxis:
    """One scale and zero point for each index of an axis: ``[K, C] → scale [K]`` for axis 0."""

    axis: int


Granularity = PerTensor | PerAxis


@dataclass(frozen=True, kw_only=True)
class QuantizedType:
    """An integer type with its range of levels.

    Parameters
    ----------
    bits : int
        Width, 2 to 8.
    signed : bool
        Two's complement, or unsigned.
    narrow : bool
        Leave out the lowest level, so that the range of a signed type is symmetric about zero.

    Examples
    --------
    >>> INT8.quant_min, INT8.quant_max
    (-127, 127)
    >>> UINT8.quant_min, UINT8.quant_max
    (0, 255)
    """

    bits: int
    signed: bool
    narrow: bool = False

    @property
    def quant_min(self) -> int:
        """Lowest level."""
        return (-(1 << (self.bits - 1)) if self.signed else 0) + self.narrow

    @property
    def quant_max(self) -> int:
        """Highest level."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def dtype(self) -> str:
        """The numpy and TVM name of the type that stores a level."""
        return "int8" if self.signed else "uint8"


INT8 = QuantizedType(bits=8, signed=True, narrow=True)
"""Weights: [-127, 127]. Without -128 a product of two weights' magnitudes stays symmetric."""

UINT8 = QuantizedType(bits=8, signed=False)
"""Activations: [0, 255]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QParams:
    """How a tensor is quantized.

    Parameters
    ----------
    scale : numpy.ndarray
        float32, ``[]`` per tensor or ``[K]`` per axis; positive and finite.
    zero_point : numpy.ndarray
        int32, the shape of ``scale``: the level that means 0.0.
    type : QuantizedType
        Levels.
    granularity : PerTensor or PerAxis
        What one scale covers.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    type: QuantizedType
    granularity: Granularity

    @property
    def quant_min(self) -> int:
        """Lowest level."""
        return self.type.quant_min

    @property
    def quant_max(self) -> int:
        """Highest level."""
        return self.type.quant_max

    def along(self, values: np.ndarray, rank: int) -> np.ndarray:
        """Reshape a scale or zero point so that it broadcasts against a tensor of a rank.

        Per axis 1 and rank 4: ``[K] → [1, K, 1, 1]``.
        """
        if isinstance(self.granularity, PerTensor):
            return values
        shape = [1] * rank
        shape[self.granularity.axis] = -1
        return values.reshape(shape)


def choose_qparams(
    minimum: np.ndarray | float,
    maximum: np.ndarray | float,
    *,
    type: QuantizedType,
    symmetric: bool,
    granularity: Granularity | None = None,
    layer: str | None = None,
) -> QParams:
    """Choose scale and zero point from the range of a tensor.

    The range is first extended to contain 0, so that 0.0 (padding, ReLU) is exact::

        symmetric:  scale = max(|minimum|, |maximum|) / quant_max,      zero_point = 0
        asymmetric: scale = (maximum - minimum) / (quant_max - quant_min),
                    zero_point = clamp(quant_min - round(minimum / scale))

    Worked number: uint8 and the range [-1.0, 3.0] give scale = 4 / 255 = 0.0156863 and
    zero_point = round(63.75) = 64; -1.0 becomes level 0 and 3.0 becomes level 255.

    Degenerate ranges have a defined result. All zero (an empty channel): scale 1, and 0.0 is
    exact. A constant c: the range is [0, c] or [c, 0], whose ends are levels, so c is exact but
    for the rounding of the scale. A range so narrow that the scale's reciprocal is no float32: the
    smallest normal float32.

    Source: Jacob et al., CVPR 2018, section 2.1; the ONNX operator ``DynamicQuantizeLinear``.

    Parameters
    ----------
    minimum, maximum : numpy.ndarray or float
        ``[]`` per tensor, ``[K]`` per axis.
    type : QuantizedType
        Levels to use.
    symmetric : bool
        Zero point 0; needs a signed type.
    granularity : Granularity, optional
        What one scale covers; per tensor when absent.
    layer : str, optional
        Named in errors.

    Returns
    -------
    QParams

    Raises
    ------
    ModelError
        The range holds NaN or infinity, or its minimum lies above its maximum.
    """
    low = np.asarray(minimum, dtype=np.float64)
    high = np.asarray(maximum, dtype=np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ModelError(
            f"a quantization range must be finite, but it is [{low.min():g}, {high.max():g}]",
            where=layer,
        )
    if (low > high).any():
        raise ModelError(
            f"a quantization range must not end below its start: [{low.min():g}, {high.max():g}]",
            where=layer,
        )
    if symmetric and not type.signed:
        raise ModelError("symmetric quantization needs a signed type", where=layer)
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if symmetric:
        scale = np.maximum(-low, high) / type.quant_max
    else:
        scale = (high - low) / (type.quant_max - type.quant_min)
    scale = np.where(scale == 0.0, 1.0, np.maximum(scale, SMALLEST_SCALE)).astype(np.float32)
    zeros = np.zeros(scale.shape, np.int32)
    chosen = QParams(
        scale=scale, zero_point=zeros, type=type, granularity=granularity or PerTensor()
    )
    return chosen if symmetric else with_scale(chosen, scale, low, symmetric=False)


def with_scale(
    qparams: QParams,
    scale: np.ndarray,
    minimum: np.ndarray | float,
    *,
    symmetric: bool | None = None,
) -> QParams:
    """Return quantization parameters of another scale, with the zero point that belongs to it.

    ``zero_point = clamp(quant_min - round(min(minimum, 0) / scale))``, as `choose_qparams` has it.

    Worked number: uint8 and the range [-1.0, 3.0] with scale 1 / 32: zero point 32, and 3.0 is
    level 128.

    Parameters
    ----------
    qparams : QParams
        Where the type and the granularity come from.
    scale : numpy.ndarray
        float32, the shape of its scale.
    minimum : numpy.ndarray or float
        Lowest real values, the same shape.
    symmetric : bool, optional
        Zero point 0; where it is not said, for types whose range is symmetric.
    """
    low, type_ = np.minimum(np.asarray(minimum, np.float64), 0.0), qparams.type
    if symmetric is None:
        symmetric = type_.narrow and type_.signed
    if symmetric:
        zero_point = np.zeros(scale.shape, np.int32)
    else:
        steps = np.clip(type_.quant_min - np.rint(low / scale), type_.quant_min, type_.quant_max)
        zero_point = steps.astype(np.int32)
    return replace(qparams, scale=scale, zero_point=zero_point)


def quantize(x: np.ndarray, qparams: QParams) -> np.ndarray:
    """Return the levels of a real tensor.

    ``level = round_half_even(clamp(x × (1 / scale), quant_min - zp, quant_max - zp)) + zp``, with
    float32 arithmetic; clamping before rounding is the same as after, because the bounds are
    integers, and it keeps the conversion to integers in range.

    Worked number: scale 0.5, zero point 3: 1.25 → round(2.5) + 3 = 2 + 3 = 5 (a tie, to even).

    Source: ONNX ``QuantizeLinear``, with the reciprocal of the scale as in torchao.

    Parameters
    ----------
    x : numpy.ndarray
        float32, any shape; infinities become the ends of the range.
    qparams : QParams
        Scale and zero point.

    Returns
    -------
    numpy.ndarray
        ``qparams.type.dtype``, the shape of ``x``.

    Raises
    ------
    ModelError
        ``x`` holds NaN, which has no level.
    """
    values = np.asarray(x, np.float32)
    if np.isnan(values).any():
        raise ModelError("NaN has no quantized level")
    zero_point = qparams.along(qparams.zero_point, values.ndim)
    with np.errstate(over="ignore"):
        steps = values * (np.float32(1.0) / qparams.along(qparams.scale, values.ndim))
    low = (qparams.quant_min - zero_point).astype(np.float32)
    high = (qparams.quant_max - zero_point).astype(np.float32)
    levels = np.rint(np.clip(steps, low, high)).astype(np.int32) + zero_point
    return np.asarray(levels, qparams.type.dtype)


def dequantize(q: np.ndarray, qparams: QParams) -> np.ndarray:
    """Return the real values of levels, float32: ``(level - zero_point) × scale``.

    Worked number: scale 0.5, zero point 3: level 5 → 1.0. The round trip of `quantize` is off by
    at most scale / 2 inside the range (1.25 came back as 1.0: 0.25 = 0.5 / 2).

    Source: ONNX ``DequantizeLinear``.

    Parameters
    ----------
    q : numpy.ndarray
        Integer levels, any shape.
    qparams : QParams
        Scale and zero point.
    """
    levels = np.asarray(q).astype(np.int32)
    offset = (levels - qparams.along(qparams.zero_point, levels.ndim)).astype(np.float32)
    return np.asarray(offset * qparams.along(qparams.scale, levels.ndim), np.float32)
