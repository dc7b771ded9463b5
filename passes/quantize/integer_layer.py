"""The integer constants of one operator, computed from its weights and the ranges around it.

Everything that could go wrong in integers is proven here, once, before the operator is made: no sum
of a layer can leave int32, whatever the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hone.passes.graph.dataflow import shape_of

from .arithmetic import FIXED_LIMIT, GUARD_BITS
from .convolution_form import Form, form_of
from .level_tables import table_of
from .levels import Levels
from .qparams import (
    INT8,
    SMALLEST_SCALE,
    PerAxis,
    QParams,
    QuantizedType,
    choose_qparams,
    dequantize,
    quantize,
    with_scale,
)
from .site import Kind, Site
from .weight_offsets import fit_weights, largest_sums
from .weight_schemes import power_of_two_scales

INT32_MAX = (1 << 31) - 1

# A bias is stored in steps of scale_data × scale_weight. Where the weights of a channel are tiny
# beside its bias (a pruned channel, a dead one), those steps would overflow int32; they are widened
# until the bias takes at most this many, half of int32.
BIAS_STEPS = 1 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerLayer:
    """The constant arguments of an integer operator.

    Parameters
    ----------
    multiplier : numpy.ndarray
        float32; per output channel, or one number for each averaged or added input.
    levels : numpy.ndarray
        int32; see `hone.passes.quantize.operators`. Of a table its 256 values, uint8.
    weight : numpy.ndarray or None
        int8, or int16 of one filter for each channel; output channels first.
    bias : numpy.ndarray or None
        int32 ``[K]``, with the correction for the data's zero point.
    residual_multiplier : numpy.ndarray or None
        float32 ``[1]``.
    weight_offsets : numpy.ndarray or None
        int32 ``[K]``, what int8 weights lack; see `weight_offsets`.
    """

    multiplier: np.ndarray
    levels: np.ndarray
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    residual_multiplier: np.ndarray | None = None
    weight_offsets: np.ndarray | None = None


def quantize_layer(
    site: Site, inputs: tuple[QParams, ...], output: QParams | None
) -> tuple[IntegerLayer, ...] | str:
    """Compute the constants of a site's integer operators.

    Parameters
    ----------
    site : Site
        What to compute.
    inputs : tuple of QParams
        Of the site's inputs, per tensor.
    output : QParams or None
        None where the result is the real value of the sum.

    Returns
    -------
    tuple of IntegerLayer or str
        One for each part of a convolution's form, else one; or the reason why integers cannot hold
        the layer.
    """
    if site.kind in (Kind.CONV2D, Kind.CONV2D_TRANSPOSE, Kind.DENSE):
        levels, weights = quantize_weights(site, inputs[0])
        zero_point = weights.along(weights.zero_point, levels.ndim)
        return weighted_layers(
            None if site.kind is Kind.DENSE else form_of(site.call),
            levels.astype(np.int64) - zero_point,
            weights.scale.astype(np.float64),
            np.zeros(len(levels)) if site.bias is None else site.bias,
            data=Levels.of(inputs[0]),
            output=None if output is None else Levels.of(output),
            residual=Levels.of(inputs[1]) if site.residual else None,
            bounds=(site.low, site.high),
        )
    if output is None:
        raise ValueError("only a convolution or matrix product can have a float result")
    zero_points = [int(q.zero_point) for q in inputs]
    bounds = Levels.of(output).bounds(site.low, site.high)
    levels = np.array([*zero_points, *bounds], np.int32)
    scales = [float(q.scale) for q in inputs]
    if site.kind is Kind.TABLE:
        if site.function is None:
            raise ValueError(f"{site.layer} is a table without a function")
        table = table_of(site.function, Levels.of(inputs[0]), Levels.of(output))
        return (IntegerLayer(multiplier=np.ones(1, np.float32), levels=table),)
    if site.kind is Kind.MULTIPLY:
        product = np.array([scales[0] * scales[1] / float(output.scale)], np.float32)
        return (IntegerLayer(multiplier=product, levels=levels),)
    if site.kind is Kind.CONCAT:
        return tuple(
            rescaling(Levels.of(each), Levels.of(output), (site.low, site.high)) for each in inputs
        )
    if site.kind is Kind.ADD:
        fixed = np.array(scales) / float(output.scale) * (1 << GUARD_BITS)
        if fixed.max() * 255 >= FIXED_LIMIT:
            return "the scales of its operands are too far from the scale of its result"
        return (IntegerLayer(multiplier=fixed.astype(np.float32), levels=levels),)
    if site.kind is Kind.MEAN:
        count = math.prod(shape_of(site.inputs[0])) // math.prod(shape_of(site.chain[0]))
    else:
        count = math.prod(int(x) for x in site.call.attrs.pool_size)
    if count * 255 > INT32_MAX:
        return f"the sum of {count} levels could leave int32"
    multiplier = np.array([scales[0] / (float(output.scale) * count)], np.float32)
    return (IntegerLayer(multiplier=multiplier, levels=levels),)


def rescaling(
    data: Levels, output: Levels, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> IntegerLayer:
    """Return the constants that bring levels to another scale: those of a mean of one number.

    Parameters
    ----------
    data, output : Levels
        Before and after.
    bounds : tuple of float
        Of an activation that follows.
    """
    return IntegerLayer(
        multiplier=np.array([data.scale / output.scale], np.float32),
        levels=np.array([data.zero_point, *output.bounds(*bounds)], np.int32),
    )


def weighted_layers(
    form: Form | str | None,
    weight: np.ndarray,
    weight_scale: np.ndarray,
    bias: np.ndarray,
    *,
    data: Levels,
    output: Levels | None,
    residual: Levels | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[IntegerLayer, ...] | str:
    """Compute the constants of each convolution of a form, or of a matrix product.

    With ``acc = Σ level × weight + bias``, the scales ``s`` and the zero points ``z``::

        bias[k]       = round(bias_real[k] / (s_data × s_weight[k])) - z_data × Σ weight[k]
        multiplier[k] = s_data × s_weight[k] / s_output

    Worked number: s_data = 0.02, z_data = 10, one weight 0.5 (s_weight = 0.5 / 127 = 0.003937,
    level 127), bias 0.1, s_output = 0.05: bias = round(0.1 / 7.874e-5) - 10 × 127 = 1270 - 1270
    = 0 and multiplier = 7.874e-5 / 0.05 = 0.001575. Data level 60 (= 1.0) gives acc = 7620 and
    7620 × 0.001575 = 12 steps of 0.05: 0.6 = 1.0 × 0.5 + 0.1.

    Source: Jacob et al., CVPR 2018, equations 4 to 7.

    Parameters
    ----------
    form : Form, str or None
        Of a convolution; the reason why it has none; None for a matrix product.
    weight : numpy.ndarray
        Levels less their zero point, output channels first: ``[K, R, S, C // groups]``, ``[K, C]``.
    weight_scale : numpy.ndarray
        float64 ``[K]``.
    bias : numpy.ndarray
        float64 ``[K]``, real values.
    data : Levels
        Of the input.
    output : Levels or None
        None where the result is the real value of the sum.
    residual : Levels or None
        Of a tensor that is added.
    bounds : tuple of float
        Of the activation.

    Returns
    -------
    tuple of IntegerLayer or str
        Or the reason why integers cannot hold the layer.
    """
    if isinstance(form, str):
        return form
    if form is None:
        parts = [(weight, np.arange(len(weight)))]
    else:
        parts = [
            (part, np.array(each.outputs))
            for part, each in zip(form.weights(weight), form.parts, strict=True)
        ]
    layers = []
    for part, channels in parts:
        layer = _weighted(
            part,
            weight_scale[channels],
            bias[channels],
            data=data,
            output=output,
            residual=residual,
            bounds=bounds,
            depthwise=form is not None and form.groups > 1,
        )
        if isinstance(layer, str):
            return layer
        layers.append(layer)
    return tuple(layers)


def _weighted(
    weight: np.ndarray,
    weight_scale: np.ndarray,
    bias: np.ndarray,
    *,
    data: Levels,
    output: Levels | None,
    residual: Levels | None,
    bounds: tuple[float, float],
    depthwise: bool,
) -> IntegerLayer | str:
    step = data.scale * weight_scale
    sums = weight.reshape(len(weight), -1).astype(np.int64).sum(1)
    bias_levels = np.rint(bias / step) - data.zero_point * sums
    stored, offsets = fit_weights(weight, depthwise=depthwise)
    largest = largest_sums(stored, bias_levels, offsets)
    if not largest.max() <= INT32_MAX:
        return (
            f"its sums could reach {largest.max():.3g} in channel {int(largest.argmax())}, "
            f"which int32 cannot hold ({INT32_MAX:.3g})"
        )
    result_scale = 1.0 if output is None else output.scale
    guard = (1 << GUARD_BITS) if residual is not None else 1
    multiplier = (step / result_scale * guard).astype(np.float32)
    if not (np.isfinite(multiplier).all() and (multiplier > 0).all()):
        return "its requantization multiplier leaves float32"
    levels = [data.zero_point]
    residual_multiplier = None
    if output is not None:
        levels += output.bounds(*bounds)
    if residual is not None:
        ratio = residual.scale / result_scale * guard
        if max((largest * multiplier).max(), ratio * 255) >= FIXED_LIMIT:
            return "its sum and its residual leave the fixed-point range of the addition"
        residual_multiplier = np.array([ratio], np.float32)
        levels.append(residual.zero_point)
    return IntegerLayer(
        weight=stored,
        bias=bias_levels.astype(np.int32),
        multiplier=multiplier,
        levels=np.array(levels, np.int32),
        residual_multiplier=residual_multiplier,
        weight_offsets=offsets,
    )


def quantize_weights(site: Site, data: QParams) -> tuple[np.ndarray, QParams]:
    """Return the levels of a site's weights and how they are quantized.

    Parameters
    ----------
    site : Site
        A convolution or matrix product.
    data : QParams
        Of its input; with the bias it decides how far a scale is widened.

    Returns
    -------
    tuple of ndarray and QParams
        int8, the shape of ``site.weight``, per output channel by the site's scheme. Levels that
        were chosen for the site are kept, but for channels whose scale the bias widens. Of the
        powers of two below and above a channel's scale, the one with the smaller squared error.
    """
    weight, scheme = site.weight, site.scheme
    channels = weight.shape[0]
    flat = weight.reshape(channels, -1).astype(np.float64)
    bias = np.zeros(channels) if site.bias is None else site.bias
    chosen = choose_qparams(
        flat.min(1),
        flat.max(1),
        type=INT8 if scheme.symmetric else QuantizedType(bits=8, signed=True),
        symmetric=scheme.symmetric,
        granularity=PerAxis(axis=0),
        layer=site.layer,
    )
    if scheme.power_of_two:
        chosen = _nearer(weight, chosen, power_of_two_scales(chosen.scale))
    scale = _widened(chosen.scale, flat, bias, float(data.scale))
    if scheme.power_of_two:
        scale = power_of_two_scales(scale)[1]
    qparams = with_scale(chosen, scale, flat.min(1))
    levels = quantize(weight, qparams)
    if site.rounded is not None:
        same = (qparams.scale == chosen.scale).reshape(-1, *[1] * (weight.ndim - 1))
        levels = np.where(same, site.rounded, levels)
    return levels, qparams


def _nearer(weight: np.ndarray, chosen: QParams, scales: tuple[np.ndarray, ...]) -> QParams:
    """Return, for each channel, the scale with the smaller squared error."""
    flat = weight.reshape(len(weight), -1)
    options = [with_scale(chosen, scale, flat.min(1)) for scale in scales]
    errors = [
        np.square(flat - dequantize(quantize(flat, option), option)).sum(1) for option in options
    ]
    return with_scale(chosen, np.where(errors[0] <= errors[1], *scales), flat.min(1))


def _widened(
    chosen: np.ndarray, flat: np.ndarray, bias: np.ndarray, data_scale: float
) -> np.ndarray:
    """Return float32 ``[K]``: the weights' own scale, widened where the bias needs it.

    A channel without weights has no scale of its own: the bias alone decides (1 without a bias).
    """
    needed = np.abs(bias) / (data_scale * BIAS_STEPS)
    empty = ~flat.any(1) & (needed > 0)
    scale = np.where(empty, needed, np.maximum(chosen, needed)).astype(np.float32)
    return np.asarray(np.maximum(scale, SMALLEST_SCALE), np.float32)
