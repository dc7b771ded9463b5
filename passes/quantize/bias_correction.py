"""Bias correction: takes the mean error of quantization out of a layer's bias.

Rounding a weight is not random once the network is given: over the data, the outputs of a channel
are off by a constant on average. That constant, known from calibration data, is subtracted from the
bias, which is stored with many more bits than a weight. Changes the bias of a `Site` before it
becomes integers. Numerics: the mean over the calibration data of a corrected output is the float
mean, to within half a step of the integer bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hone.errors import ModelError
from hone.passes.graph.dataflow import shape_of

from .integer_layer import quantize_weights
from .qparams import QParams, dequantize, quantize
from .site import Kind, Site


@dataclass(frozen=True, kw_only=True, eq=False)
class InputMeans:
    """Means of a layer's input over calibration data.

    Parameters
    ----------
    real : numpy.ndarray
        float64, the tensor's shape without its first axis: ``[H, W, C]`` for a convolution.
    quantized : numpy.ndarray
        The same after quantization: rounded, saturated.
    qparams : QParams
        Of that quantization.
    """

    real: np.ndarray
    quantized: np.ndarray
    qparams: QParams


class MeanObserver:
    """Streams `InputMeans`: two sums of one sample's size.

    Parameters
    ----------
    layer : str
        Named in errors.
    qparams : QParams
        How the tensor will be quantized.
    """

    def __init__(self, *, layer: str, qparams: QParams) -> None:
        self._layer = layer
        self._qparams = qparams
        self._count = 0
        self._real: np.ndarray | float = 0.0
        self._quantized: np.ndarray | float = 0.0

    def update(self, values: np.ndarray) -> None:
        """Take one batch, ``[batch, ...]``, finite."""
        levels = quantize(values, self._qparams)
        self._count += len(values)
        self._real = self._real + values.sum(0, dtype=np.float64)
        self._quantized = self._quantized + dequantize(levels, self._qparams).sum(
            0, dtype=np.float64
        )

    @property
    def means(self) -> InputMeans:
        """Means of everything seen so far.

        Raises
        ------
        ModelError
            Nothing was seen.
        """
        if not self._count:
            raise ModelError("calibration saw no value", where=self._layer)
        return InputMeans(
            real=np.asarray(self._real / self._count),
            quantized=np.asarray(self._quantized / self._count),
            qparams=self._qparams,
        )


def correct_bias(site: Site, data: QParams, means: InputMeans) -> Site:
    """Return a site with the mean error of its quantization subtracted from its bias.

    With the quantized weights ``W~`` and input ``x~``, per output channel::

        bias' = bias - E[error],    E[error] = E[W~ x~] - E[W x] = W~ E[x~] - W E[x]

    The expectation goes inside, because the layer is linear; E[x] keeps every position, so borders
    and padding count as they are. The error is the layer's own, for the input that the float
    network gives it: corrected layers pass on the right mean, so nothing is corrected twice.

    Worked number: one weight 0.5 becomes 0.496, E[x] = 2 and E[x~] = 2.01: the error is
    0.496 × 2.01 - 0.5 × 2 = -0.00304, so 0.00304 is added to the bias.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (ICCV 2019), equation 17, with means from data as in its appendix D.

    Parameters
    ----------
    site : Site
        A convolution or matrix product.
    data : QParams
        Of its input.
    means : InputMeans
        Of its input. Where they were taken for other levels than `data` (a neighbour left
        integers meanwhile), only the error of the weights is corrected.
    """
    levels, qparams = quantize_weights(site, data)
    quantized = dequantize(levels, qparams).astype(np.float64)
    weight = site.weight.astype(np.float64)
    same = data.scale == means.qparams.scale and data.zero_point == means.qparams.zero_point
    arrived = means.quantized if same else means.real
    error = _mean_output(site, quantized, arrived) - _mean_output(site, weight, means.real)
    return replace(site, bias=(0.0 if site.bias is None else site.bias) - error)


def _mean_output(site: Site, weight: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Return ``[K]``: what a linear layer gives, on average over its output, for a mean input."""
    if site.kind is Kind.DENSE:
        return np.asarray(weight @ data.reshape(-1, data.shape[-1]).mean(0))
    windows = _mean_windows(site, data)
    groups, taps = int(site.call.attrs.groups), weight.shape[1:3]
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    means = np.einsum("gkrsc,rsgc->gk", grouped, windows.reshape(*taps, groups, -1))
    return np.asarray(means.reshape(-1))


def _mean_windows(site: Site, data: np.ndarray) -> np.ndarray:
    """Return ``[R, S, C]``: the mean of what each tap of the kernel reads, padding included."""
    attrs = site.call.attrs
    top, left, bottom, right = (int(p) for p in attrs.padding)
    padded = np.pad(data, ((top, bottom), (left, right), (0, 0)))
    _, taps_y, taps_x, _ = site.weight.shape
    _, height, width, _ = shape_of(site.chain[0])
    (step_y, step_x), (gap_y, gap_x) = (
        tuple(int(v) for v in values) for values in (attrs.strides, attrs.dilation)
    )
    windows = np.empty((taps_y, taps_x, data.shape[-1]))
    for y in range(taps_y):
        for x in range(taps_x):
            windows[y, x] = padded[
                y * gap_y : y * gap_y + (height - 1) * step_y + 1 : step_y,
                x * gap_x : x * gap_x + (width - 1) * step_x + 1 : step_x,
            ].mean((0, 1))
    return windows
