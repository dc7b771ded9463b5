"""Finds the convolutions and matrix products of a QDQ module.

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

from .convolution_form import Form, form_of
from .integer_layer import INT32_MAX, IntegerLayer, weighted_layers
from .levels import Levels
from .qdq_reader import constant_of, weight_of
from .site import Kind
from .type_inference import LEVEL_TYPES
from .weight_offsets import largest_sums


@dataclass(frozen=True, kw_only=True, eq=False)
class QdqSite:
    """A convolution or matrix product with integer operands.

    Parameters
    ----------
    kind : Kind
        CONV2D, CONV2D_TRANSPOSE or DENSE.
    form : Form or None
        Of a convolution.
    call : relax.Call
        The convolution or product.
    chain : tuple of relax.Var
        Bindings from the call to the result, before quantization.
    data : relax.Expr
        Real values of the level tensor that enters.
    weight : numpy.ndarray
        int64, without its zero point: ``[K, R, S, C // groups]`` or ``[K, C]``.
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
    zero_point : relax.Expr or None
        int32 ``[]``, of the data, where only the run tells it: dynamic quantization.
    """

    kind: Kind
    form: Form | None
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
    zero_point: relax.Expr | None = None

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
    if call.op not in (*_KINDS, *_OTHER):
        return None
    weight = weight_of(graph, call.args[1])
    if weight is None:
        return None
    if call.op in _OTHER:
        return f"there is no integer kernel for {str(call.op.name).rpartition('.')[2]}"
    kind, channel, order = _KINDS[call.op]
    form = None
    if kind is Kind.DENSE:
        if weight.levels.ndim != 2 or len(shape_of(call.args[0])) < 2:
            return f"{call.args[0].ty} times {call.args[1].ty} is no product with one matrix"
    else:
        found = form_of(call)
        if isinstance(found, str):
            return found
        form = found
    if weight.axis not in (None, channel):
        return "its weights have one scale for each input channel"
    if weight.dtype not in LEVEL_TYPES:
        return f"its weights are {weight.dtype}, not 8 bits"
    levels = weight.levels.transpose(order)
    scale = np.broadcast_to(weight.scale, (levels.shape[0],))
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return "a scale of its weights is not a positive number"
    return QdqSite(
        kind=kind,
        form=form,
        call=call,
        chain=(var,),
        data=call.args[0],
        weight=levels,
        weight_scale=scale,
        bias=np.zeros(levels.shape[0]),
    )


def dynamic(graph: Dataflow, site: QdqSite) -> QdqSite | None:
    """Return a site whose data has a zero point that only the run tells; None for another one.

    Its result is the sum's real value, by the scale of the data, which is a constant: what
    ``MatMulInteger`` and ``ConvInteger`` behind ``DynamicQuantizeLinear`` become on import.
    """
    call = graph.call(graph.resolve(site.data))
    if call is None or call.op != _DEQUANTIZE or not isinstance(call.args[0], relax.Var):
        return None
    if str(call.args[0].ty.dtype) not in LEVEL_TYPES or not isinstance(call.args[2], relax.Var):
        return None
    if not isinstance(call.args[1], GenericConst):
        return None
    return replace(site, zero_point=call.args[2])


def dynamic_constants(graph: Dataflow, site: QdqSite) -> tuple[IntegerLayer, ...] | str:
    """Compute the constants of a `dynamic` site, as if the zero point were 0."""
    scale = graph.definition[graph.resolve(site.data)].args[1].value.numpy()
    layers = constants(site, Levels(scale=float(scale), zero_point=0), None, None)
    if isinstance(layers, str):
        return layers
    for layer in layers:
        if layer.weight is None or layer.bias is None:
            raise ValueError("a layer without weights")
        largest = largest_sums(layer.weight, layer.bias, layer.weight_offsets).max()
        # The zero point takes at most as much off again.
        if 2 * largest > INT32_MAX:
            return f"its sums could reach {2 * largest:.3g}, which int32 cannot hold"
    return layers


def add_bias(graph: Dataflow, site: QdqSite, var: relax.Var, call: relax.Call) -> QdqSite | None:
    """Return the site with a bias addition absorbed, None where the call is none."""
    if call.op != _ADD or site.residual is not None or shape_of(call) != shape_of(site.chain[-1]):
        return None
    values = [constant_of(graph, x) for x in call.args]
    value = next((v for v in values if v is not None), None)
    rank = len(shape_of(call))
    axis = rank - 1 if site.kind is Kind.DENSE else 1
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
) -> tuple[IntegerLayer, ...] | str:
    """Compute the constants of a site's integer operators, by `weighted_layers`.

    Returns
    -------
    tuple of IntegerLayer or str
        Or the reason why integers cannot hold the layer.
    """
    return weighted_layers(
        site.form,
        site.weight,
        site.weight_scale,
        site.bias,
        data=data,
        output=output,
        residual=residual,
        bounds=(site.low, site.high),
    )


_KINDS = {
    Op.get("relax.nn.conv2d"): (Kind.CONV2D, 0, (0, 2, 3, 1)),
    Op.get("relax.nn.conv2d_transpose"): (Kind.CONV2D_TRANSPOSE, 1, (1, 2, 3, 0)),
    Op.get("relax.matmul"): (Kind.DENSE, 1, (1, 0)),
}
"""Operator → its kind, the output channels' axis of its weight, and the axes output channels first,
input channels last."""
_OTHER = tuple(
    Op.get(f"relax.nn.{name}")
    for name in ("conv1d", "conv3d", "conv1d_transpose", "conv3d_transpose")
)
_DEQUANTIZE = Op.get("hone.dequantize")
_ADD = Op.get("relax.add")
_RELU = Op.get("relax.nn.relu")
_CLIP = Op.get("relax.clip")
_MAXIMUM = Op.get("relax.maximum")
_MINIMUM = Op.get("relax.minimum")
