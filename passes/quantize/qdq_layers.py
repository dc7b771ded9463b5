"""Finds the convolutions and matrix products of a QDQ module, and computes their constants.

A *site* is ``dequantize(x) → convolution or product with integer weights → [+ bias] →
[+ dequantize(r)] → [ReLU, clip] → quantize``; one that no quantization follows has float results.
Scales and zero points are the model's own. Changes nothing; the arithmetic is that of
`hone.passes.quantize.arithmetic`, and every sum is proven to fit int32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from tvm import relax
from tvm.ir import GenericConst, Op

from hone.passes.graph.dataflow import Dataflow, shape_of

from .arithmetic import FIXED_LIMIT, GUARD_BITS
from .integer_layer import INT32_MAX, IntegerLayer
from .qdq_reader import Levels, Weight, constant_of, weight_of
from .site import Kind


@dataclass(frozen=True, kw_only=True, eq=False)
class QdqSite:
    """A convolution or matrix product with integer operands.

    Parameters
    ----------
    kind : Kind
        CONV2D or DENSE.
    call : relax.Call
        The convolution or product.
    chain : tuple of relax.Var
        Bindings from the call to the result, before quantization.
    data : relax.Expr
        Real values of the level tensor that enters.
    weight : numpy.ndarray
        int64, without its zero point, output channels first: OIHW or ``[K, C]``.
    weight_scale : numpy.ndarray
        float64 ``[K]``.
    bias : numpy.ndarray
        float64 ``[K]``, real values.
    residual : relax.Expr or None
        Real values of a level tensor that is added.
    linear : int
        Bindings of the chain up to the bias.
    low, high : float
        Bounds of the activation.
    output : relax.Var or None
        The quantization at the end; None for a float result.
    """

    kind: Kind
    call: relax.Call
    chain: tuple[relax.Var, ...]
    data: relax.Expr
    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray
    residual: relax.Expr | None = None
    linear: int = 1
    low: float = -math.inf
    high: float = math.inf
    output: relax.Var | None = None

    def as_float(self) -> QdqSite:
        """Return the site without what follows its bias."""
        return replace(
            self,
            chain=self.chain[: self.linear],
            residual=None,
            low=-math.inf,
            high=math.inf,
            output=None,
        )


def start(graph: Dataflow, var: relax.Var, call: relax.Call) -> QdqSite | str | None:
    """Return the site that a binding starts, without what follows; or why it is none.

    None for what is no convolution or product, and for one without integer weights.
    """
    if call.op not in (_CONV2D, _MATMUL, *_OTHER):
        return None
    weight = weight_of(graph, call.args[1])
    if weight is None:
        return None
    if call.op in _OTHER:
        return f"there is no integer kernel for {str(call.op.name).rpartition('.')[2]}"
    if call.op == _CONV2D:
        kind, channel, reason = Kind.CONV2D, 0, _unfit_conv2d(call, weight)
    else:
        kind, channel, reason = Kind.DENSE, 1, None
        if weight.levels.ndim != 2 or len(shape_of(call.args[0])) < 2:
            reason = f"{call.args[0].ty} times {call.args[1].ty} is no product with one matrix"
    if reason is not None:
        return reason
    if weight.axis not in (None, channel):
        return "its weights have one scale for each input channel"
    levels = weight.levels if kind is Kind.CONV2D else weight.levels.T
    low, high = int(levels.min()), int(levels.max())
    if low < -128 or high > 127:
        return (
            f"its weights less their zero point reach from {low} to {high}, beyond int8; "
            "weights of zero point 0 (or 128 where they are unsigned) fit"
        )
    scale = np.broadcast_to(weight.scale, (levels.shape[0],))
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return "a scale of its weights is not a positive number"
    return QdqSite(
        kind=kind,
        call=call,
        chain=(var,),
        data=call.args[0],
        weight=levels,
        weight_scale=scale,
        bias=np.zeros(levels.shape[0]),
    )


def _unfit_conv2d(call: relax.Call, weight: Weight) -> str | None:
    attrs = call.attrs
    if (str(attrs.data_layout), str(attrs.kernel_layout)) != ("NCHW", "OIHW"):
        return f"its layout is {attrs.data_layout} {attrs.kernel_layout}, not NCHW OIHW"
    groups = int(attrs.groups)
    channels, depth = weight.levels.shape[:2]
    if groups != 1 and not (groups == channels == shape_of(call.args[0])[1] and depth == 1):
        return f"{groups} groups are neither one nor one for each channel"
    return None


def add_bias(graph: Dataflow, site: QdqSite, var: relax.Var, call: relax.Call) -> QdqSite | None:
    """Return the site with a bias addition absorbed, None where the call is none."""
    if call.op != _ADD or site.residual is not None or shape_of(call) != shape_of(site.chain[-1]):
        return None
    values = [constant_of(graph, x) for x in call.args]
    value = next((v for v in values if v is not None), None)
    rank = len(shape_of(call))
    axis = 1 if site.kind is Kind.CONV2D else rank - 1
    if value is None or not np.isfinite(value).all():
        return None
    shape = (1,) * (rank - value.ndim) + value.shape
    if any(extent != 1 and dim != axis for dim, extent in enumerate(shape)):
        return None
    bias = site.bias + value.reshape(-1)
    return replace(site, chain=(*site.chain, var), bias=bias, linear=len(site.chain) + 1)


def bounds_of(call: relax.Call) -> tuple[relax.Expr, float, float] | None:
    """Return what an activation clips, and its bounds; None for another operator."""
    if call.op == _RELU:
        return call.args[0], 0.0, math.inf
    if call.op == _CLIP:
        return call.args[0], float(call.args[1].value), float(call.args[2].value)
    if call.op not in (_MAXIMUM, _MINIMUM):
        return None
    for data, other in (tuple(call.args), tuple(call.args)[::-1]):
        if isinstance(other, GenericConst) and shape_of(data) == shape_of(call):
            value = np.asarray(other.value.numpy())
            if value.size == 1 and not np.isnan(value).any():
                bound = float(value.reshape(()))
                low, high = (bound, math.inf) if call.op == _MAXIMUM else (-math.inf, bound)
                return data, low, high
    return None


def constants(
    site: QdqSite, data: Levels, output: Levels | None, residual: Levels | None
) -> IntegerLayer | str:
    """Compute the constants of a site's integer operator.

    With ``acc = Σ level × weight + bias`` and the model's scales ``s`` and zero points ``z``::

        bias[k]       = round(bias_real[k] / (s_data × s_weight[k])) - z_data × Σ weight[k]
        multiplier[k] = s_data × s_weight[k] / s_output

    Worked number: s_data 0.02, z_data 10, a weight of level 127 and scale 0.004, s_output 0.05:
    bias = -1270, multiplier = 0.0016. Data level 60 (= 1.0): acc = 7620 - 1270 = 6350, times
    0.0016 is 10.16, level 10 of 0.05 = 0.5, and 1.0 × 0.508 = 0.508.

    Source: Jacob et al., CVPR 2018, equations 4 to 7.

    Returns
    -------
    IntegerLayer or str
        Or the reason why integers cannot hold the layer.
    """
    step = data.scale * site.weight_scale
    sums = site.weight.reshape(len(site.weight), -1)
    bias = np.rint(site.bias / step) - data.zero_point * sums.sum(1)
    largest = np.abs(sums).sum(1) * 255.0 + np.abs(bias)
    if not largest.max() <= INT32_MAX:
        return f"its sums could reach {largest.max():.3g}, which int32 cannot hold"
    guard = (1 << GUARD_BITS) if residual is not None else 1
    multiplier = (step / (1.0 if output is None else output.scale) * guard).astype(np.float32)
    if not (np.isfinite(multiplier).all() and (multiplier > 0).all()):
        return "its requantization multiplier leaves float32"
    levels = [data.zero_point]
    residual_multiplier = None
    if output is not None:
        levels += bounds_in(output, site.low, site.high)
    if residual is not None and output is not None:
        ratio = residual.scale / output.scale * guard
        if max((largest * multiplier).max(), ratio * 255) >= FIXED_LIMIT:
            return "its sum and its residual leave the fixed-point range of the addition"
        residual_multiplier = np.array([ratio], np.float32)
        levels.append(residual.zero_point)
    weight = site.weight.transpose(0, 2, 3, 1) if site.kind is Kind.CONV2D else site.weight
    return IntegerLayer(
        weight=np.ascontiguousarray(weight, np.int8),
        bias=bias.astype(np.int32),
        multiplier=multiplier,
        levels=np.array(levels, np.int32),
        residual_multiplier=residual_multiplier,
    )


def bounds_in(output: Levels, low: float, high: float) -> list[int]:
    """Return zero point, lowest and highest level of a quantized result."""
    bounds = [output.bound(low, default=0), output.bound(high, default=255)]
    return [output.zero_point, *bounds]


_CONV2D = Op.get("relax.nn.conv2d")
_MATMUL = Op.get("relax.matmul")
_OTHER = tuple(
    Op.get(f"relax.nn.{name}")
    for name in ("conv1d", "conv3d", "conv1d_transpose", "conv2d_transpose", "conv3d_transpose")
)
_ADD = Op.get("relax.add")
_RELU = Op.get("relax.nn.relu")
_CLIP = Op.get("relax.clip")
_MAXIMUM = Op.get("relax.maximum")
_MINIMUM = Op.get("relax.minimum")
