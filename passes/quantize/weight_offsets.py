"""Weights with a zero point of their own, in operators whose weights are int8.

Levels of 8 bits less a zero point need 9 bits. What is stored is int8, and the operator adds one
number for each output channel to all of its weights: that number times the sum of the levels under
the window, which is the same for all channels and taken once. Numerics: exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tvm import relax

from hone.passes.graph.dataflow import PART, shape_of

from . import operators

Emit = Callable[[relax.Expr, str], relax.Var]
"""Binds an expression to a variable of a name."""


def fit_weights(weight: np.ndarray, *, depthwise: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Return weights less their zero points as an integer operator takes them.

    ``weight = stored + offset[k]`` with stored numbers of int8. Levels of 8 bits less a zero point
    of their own span at most 256 numbers in each channel, but not always those of int8; what they
    lie beside them is the channel's offset, which the operator multiplies with the sum of the
    levels under the window. Of a depthwise convolution, where that sum would be another one for
    each channel, they are stored as int16.

    Worked number: uint8 weights 3 and 250 with zero point 7 are -4 and 243: offset 116, stored -120
    and 127. Over data 10 and 20: 10 × -120 + 20 × 127 = 1340, and 116 × 30 = 3480 make 4820, which
    is 10 × -4 + 20 × 243.

    Source: Jacob et al., CVPR 2018, equation 7, with the zero points of the weights alone.

    Parameters
    ----------
    weight : numpy.ndarray
        Integers, output channels first.
    depthwise : bool
        One filter for each channel.

    Returns
    -------
    tuple of ndarray and ndarray or None
        The stored weights, and int32 ``[K]``, None where int8 holds all weights or they are int16.

    Raises
    ------
    ValueError
        The weights of a channel span more than 256 numbers.
    """
    rows = weight.reshape(len(weight), -1)
    low, high = rows.min(1), rows.max(1)
    if (high - low).max() > 255:
        raise ValueError(f"weights of 8 bits span 256 numbers, not {(high - low).max() + 1}")
    offsets = np.where(low < -128, low + 128, np.where(high > 127, high - 127, 0))
    if not offsets.any():
        return np.ascontiguousarray(weight, np.int8), None
    if depthwise:
        return np.ascontiguousarray(weight, np.int16), None
    stored = weight - offsets.reshape(-1, *[1] * (weight.ndim - 1))
    return np.ascontiguousarray(stored, np.int8), offsets.astype(np.int32)


def largest_sums(weight: np.ndarray, bias: np.ndarray, offsets: np.ndarray | None) -> np.ndarray:
    """Return float64 ``[K]``, which no partial sum of an operator exceeds in magnitude.

    Parameters
    ----------
    weight : numpy.ndarray
        As it is stored, output channels first.
    bias : numpy.ndarray
        ``[K]``.
    offsets : numpy.ndarray or None
        Of the weights, ``[K]``.
    """
    rows = weight.reshape(len(weight), -1).astype(np.int64)
    magnitudes = np.abs(rows).sum(1) * 255.0 + np.abs(bias)
    if offsets is not None:
        magnitudes = magnitudes + np.abs(offsets) * (255.0 * rows.shape[1])
    return np.asarray(magnitudes)


class WindowSums:
    """Writes the sums that offsets of weights are multiplied with, each once.

    Parameters
    ----------
    emit : callable
        Binds an expression to a variable of a name.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._rows: dict[relax.Var, relax.Var] = {}
        self._windows: dict[tuple[object, ...], relax.Var] = {}

    def of_rows(self, data: relax.Var, layer: str) -> relax.Var:
        """Return the sums ``[..., 1]`` of the levels of each row or pixel.

        Parameters
        ----------
        data : relax.Var
            Levels.
        layer : str
            Binding name of the layer that reads them.
        """
        if data not in self._rows:
            self._rows[data] = self._emit(operators.row_sums(data), f"{layer}{PART}row_sums")
        return self._rows[data]

    def of_windows(
        self,
        data: relax.Var,
        layer: str,
        *,
        zero_point: int | relax.Var,
        taps: Sequence[int],
        strides: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> relax.Var:
        """Return the sums ``[N, OH, OW, 1]`` of the levels under each position of a window.

        Parameters
        ----------
        data : relax.Var
            Levels ``[N, H, W, C]``.
        layer : str
            Binding name of the layer that reads them.
        zero_point : int or relax.Var
            What stands in the padding; int32 ``[]`` where only the run tells it.
        taps, strides, padding, dilation : sequence of int
            As for `operators.window_sums`.
        """
        rows = self.of_rows(data, layer)
        geometry = tuple(tuple(int(x) for x in each) for each in (taps, strides, padding, dilation))
        if geometry[0] == (1, 1) and geometry[1] == (1, 1) and not any(geometry[2]):
            return rows
        key = (data, zero_point, geometry)
        if key not in self._windows:
            sums = operators.window_sums(
                rows,
                self._border(zero_point, shape_of(data)[3], layer),
                taps=geometry[0],
                strides=geometry[1],
                padding=geometry[2],
                dilation=geometry[3],
            )
            self._windows[key] = self._emit(sums, f"{layer}{PART}window_sums")
        return self._windows[key]

    def _border(self, zero_point: int | relax.Var, channels: int, layer: str) -> relax.Expr:
        if isinstance(zero_point, int):
            return relax.const(np.array([zero_point * channels], np.int32))
        product = relax.op.multiply(zero_point, relax.const(np.array([channels], np.int32)))
        return self._emit(product, f"{layer}{PART}border")
