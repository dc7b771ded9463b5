"""The integer constants of one operator, computed from its weights and the ranges around it.

Everything that could go wrong in integers is proven here, once, before the operator is made: no sum
of a layer can leave int32, whatever the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from hone.passes.graph.dataflow import shape_of

from .arithmetic import FIXED_LIMIT, GUARD_BITS
from .qparams import INT8, SMALLEST_SCALE, PerAxis, QParams, choose_qparams, quantize
from .site import Kind, Site

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
        int32; see `hone.passes.quantize.operators`.
    weight : numpy.ndarray or None
        int8, output channels first.
    bias : numpy.ndarray or None
        int32 ``[K]``, with the correction for the data's zero point.
    residual_multiplier : numpy.ndarray or None
        float32 ``[1]``.
    """

    multiplier: np.ndarray
    levels: np.ndarray
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    residual_multiplier: np.ndarray | None = None


def quantize_layer(
    site: Site, inputs: tuple[QParams, ...], output: QParams | None
) -> IntegerLayer | str:
    """Compute the constants of a site's integer operator.

    Weights are symmetric int8 per output channel. With ``acc = Σ level × weight + bias``::

        bias[k]       = round(bias_real[k] / (s_data × s_weight[k])) - zp_data × Σ weight[k]
        multiplier[k] = s_data × s_weight[k] / s_output

    Worked number: s_data = 0.02, zp_data = 10, one weight 0.5 (s_weight = 0.5 / 127 = 0.003937,
    level 127), bias 0.1, s_output = 0.05: bias = round(0.1 / 7.874e-5) - 10 × 127 = 1270 - 1270
    = 0 and multiplier = 7.874e-5 / 0.05 = 0.001575. Data level 60 (= 1.0) gives acc = 7620 and
    7620 × 0.001575 = 12 steps of 0.05: 0.6 = 1.0 × 0.5 + 0.1.

    Source: Jacob et al., CVPR 2018, equations 4 to 7.

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
    IntegerLayer or str
        The reason why integers cannot hold the layer, where they cannot.
    """
    if site.kind in (Kind.CONV2D, Kind.DENSE):
        return _weighted(site, inputs, output)
    if output is None:
        raise ValueError("only a convolution or matrix product can have a float result")
    bounds = _output_levels(site, output)
    zero_points = [int(q.zero_point) for q in inputs]
    levels = np.array([*zero_points, *bounds], np.int32)
    scales = [float(q.scale) for q in inputs]
    if site.kind is Kind.ADD:
        fixed = np.array(scales) / float(output.scale) * (1 << GUARD_BITS)
        if fixed.max() * 255 >= FIXED_LIMIT:
            return "the scales of its operands are too far from the scale of its result"
        return IntegerLayer(multiplier=fixed.astype(np.float32), levels=levels)
    if site.kind is Kind.MEAN:
        count = math.prod(shape_of(site.inputs[0])) // math.prod(shape_of(site.chain[0]))
    else:
        count = math.prod(int(x) for x in site.call.attrs.pool_size)
    if count * 255 > INT32_MAX:
        return f"the sum of {count} levels could leave int32"
    multiplier = np.array([scales[0] / (float(output.scale) * count)], np.float32)
    return IntegerLayer(multiplier=multiplier, levels=levels)


def _output_levels(site: Site, output: QParams) -> list[int]:
    """Return zero point, lowest and highest level, the activation's bounds included."""
    zero_point, scale = int(output.zero_point), float(output.scale)

    def bounded(value: float, default: int) -> int:
        if math.isinf(value):
            return default
        steps = float(np.clip(np.rint(value / scale), -INT32_MAX, INT32_MAX))
        return int(np.clip(zero_point + steps, output.quant_min, output.quant_max))

    return [
        zero_point,
        bounded(site.low, output.quant_min),
        bounded(site.high, output.quant_max),
    ]


def _weighted(
    site: Site, inputs: tuple[QParams, ...], output: QParams | None
) -> IntegerLayer | str:
    data = inputs[0]
    channels = site.weight.shape[0]
    bias = np.zeros(channels) if site.bias is None else site.bias
    data_scale = float(data.scale)
    levels, weights = quantize_weights(site, data)
    scale = weights.scale
    sums = levels.reshape(channels, -1).astype(np.int64)
    step = data_scale * scale.astype(np.float64)
    bias_levels = np.rint(bias / step) - int(data.zero_point) * sums.sum(1)
    largest = np.abs(sums).sum(1) * 255.0 + np.abs(bias_levels)
    if largest.max() > INT32_MAX:
        return (
            f"its sums could reach {largest.max():.3g} in channel {int(largest.argmax())}, "
            f"which int32 cannot hold ({INT32_MAX:.3g})"
        )
    result_scale = 1.0 if output is None else float(output.scale)
    guard = (1 << GUARD_BITS) if site.residual else 1
    multiplier = (step / result_scale * guard).astype(np.float32)
    if not (np.isfinite(multiplier).all() and (multiplier > 0).all()):
        return "its requantization multiplier leaves float32"
    layer_levels = [int(data.zero_point)]
    residual = None
    if output is not None:
        layer_levels += _output_levels(site, output)
    if site.residual:
        ratio = float(inputs[1].scale) / result_scale * guard
        residual = np.array([ratio], np.float32)
        layer_levels.append(int(inputs[1].zero_point))
        if max((largest * multiplier).max(), ratio * 255) >= FIXED_LIMIT:
            return "its sum and its residual leave the fixed-point range of the addition"
    return IntegerLayer(
        weight=levels,
        bias=bias_levels.astype(np.int32),
        multiplier=multiplier,
        levels=np.array(layer_levels, np.int32),
        residual_multiplier=residual,
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
        int8, the shape of ``site.weight``; symmetric per output channel. Levels that were chosen
        for the site are kept, but for channels whose scale the bias widens.
    """
    weight = site.weight
    channels = weight.shape[0]
    flat = weight.reshape(channels, -1).astype(np.float64)
    bias = np.zeros(channels) if site.bias is None else site.bias
    chosen = choose_qparams(
        flat.min(1),
        flat.max(1),
        type=INT8,
        symmetric=True,
        granularity=PerAxis(axis=0),
        layer=site.layer,
    )
    qparams = replace(chosen, scale=_widened(chosen.scale, flat, bias, float(data.scale)))
    levels = quantize(weight, qparams)
    if site.rounded is not None:
        same = (qparams.scale == chosen.scale).reshape(-1, *[1] * (weight.ndim - 1))
        levels = np.where(same, site.rounded, levels)
    return levels, qparams


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
