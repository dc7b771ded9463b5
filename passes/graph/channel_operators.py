"""Knows the operators that treat every channel alike, and how their constants follow an order.

What `FoldChannelMoves` asks of single operators.
"""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.ir import GenericConst, Op

from hone.passes.quantize.operators import NAMES

from .dataflow import Dataflow, shape_of

_CONV2D = Op.get("relax.nn.conv2d")
_CONV2D_INT8 = next(Op.get(name) for name in NAMES if name == "hone.conv2d_int8")
CONVOLUTIONS = (_CONV2D, _CONV2D_INT8)
"""Convolutions of images, in float and in integers."""

_POOLS = (Op.get("relax.nn.max_pool2d"), Op.get("relax.nn.avg_pool2d"))
_UNARY = tuple(
    Op.get(f"relax.{name}")
    for name in (
        *("nn.relu", "nn.leakyrelu", "nn.silu", "nn.gelu", "nn.gelu_tanh"),
        *("sigmoid", "tanh", "exp", "erf", "sqrt", "abs", "negative", "clip"),
    )
)
_BINARY = tuple(
    Op.get(f"relax.{name}")
    for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")
)
# Bias, multiplier and weight of an integer convolution; what follows them in its arguments
# (levels) belongs to all channels, and a residual would have to follow.
_INT8_ARGUMENTS = 5


def channel_axis(call: relax.Call) -> int | None:
    """Return the axis of channels of what an operator gives; None where it does not say."""
    if call.op.same_as(_CONV2D_INT8):
        return 3
    if call.op.same_as(_CONV2D) or call.op in _POOLS:
        layout = str(call.attrs.data_layout if call.op.same_as(_CONV2D) else call.attrs.layout)
        if layout in ("NCHW", "NHWC") and str(call.attrs.out_layout) in ("", layout):
            return layout.index("C")
    return None


def is_dense_convolution(graph: Dataflow, call: relax.Call) -> bool:
    """Tell whether a call sums over all channels of its input, with constant weights.

    A convolution of one group, whose data is no other operand of it.
    """
    if _weight(graph, call) is None or _groups(call) != 1:
        return False
    return not any(argument.same_as(call.args[0]) for argument in call.args[1:])


def is_free_of_order(graph: Dataflow, call: relax.Call) -> bool:
    """Tell whether a call computes each channel of its result from the same one of its input.

    Elementwise operators of one tensor and constants, pooling, and depthwise convolutions with
    constant weights.
    """
    if call.op in _UNARY:
        # The bounds of a clip are numbers.
        return all(not isinstance(argument, relax.Var) for argument in call.args[1:])
    if call.op in _POOLS:
        return channel_axis(call) is not None
    if call.op in _BINARY:
        data, other = call.args
        value = graph.constant(other)
        return (
            isinstance(data, relax.Var)
            and value is not None
            and value.ndim <= 4 == len(shape_of(call))
            and shape_of(data) == shape_of(call)
        )
    return _is_depthwise(graph, call)


def in_order(graph: Dataflow, call: relax.Call, axis: int, order: np.ndarray) -> list[relax.Expr]:
    """Return a call's arguments behind its data, for data whose channels come in an order.

    Parameters
    ----------
    graph : Dataflow
        Knows the constants.
    call : relax.Call
        For which `is_dense_convolution` or `is_free_of_order` holds.
    axis : int
        Of the data's channels.
    order : ndarray
        ``[C]``: which channel stands at each place. With order ``[1, 0]`` and weights
        ``[[3, 4]]`` of a 1x1 convolution, its weights are ``[[4, 3]]``.
    """
    _, *others = call.args
    if call.op not in CONVOLUTIONS:
        return [_constant_in_order(graph, other, axis, order) for other in others]
    weight = _weight(graph, call)
    if weight is None:
        raise RuntimeError(f"{call.op.name}: checked to have constant weights, and has none")
    kernel_layout = "OHWI" if call.op.same_as(_CONV2D_INT8) else str(call.attrs.kernel_layout)
    if _groups(call) == 1:
        return [_taken(weight, order, kernel_layout.index("I")), *others[1:]]
    own = [_taken(weight, order, 0)]
    if call.op.same_as(_CONV2D_INT8):
        bias, multiplier, levels = others[1:]
        own += [_per_filter(graph, bias, order), _per_filter(graph, multiplier, order), levels]
    return own


def _taken(values: np.ndarray, order: np.ndarray, axis: int) -> relax.Expr:
    return relax.const(np.ascontiguousarray(np.take(values, order, axis=axis)))


def _per_filter(graph: Dataflow, expr: relax.Expr, order: np.ndarray) -> relax.Expr:
    value = graph.constant(expr)
    if value is None:
        raise RuntimeError("checked to be constant, and is not")
    return _taken(value, order, 0) if len(value) > 1 else expr


def _constant_in_order(
    graph: Dataflow, expr: relax.Expr, axis: int, order: np.ndarray
) -> relax.Expr:
    value = graph.constant(expr)
    if value is None:
        return expr
    place = axis - 4 + value.ndim
    if place < 0 or value.shape[place] == 1:
        return expr
    return _taken(value, order, place)


def _groups(call: relax.Call) -> int:
    return int(call.attrs.groups if call.op.same_as(_CONV2D) else call.attrs["groups"])


def _weight(graph: Dataflow, call: relax.Call) -> np.ndarray | None:
    """Return the constant weights of a convolution of images."""
    if call.op not in CONVOLUTIONS or channel_axis(call) is None:
        return None
    if call.op.same_as(_CONV2D) and str(call.attrs.kernel_layout) not in ("OIHW", "OHWI"):
        return None
    return graph.constant(call.args[1])


def _is_depthwise(graph: Dataflow, call: relax.Call) -> bool:
    axis = channel_axis(call)
    if axis is None or _weight(graph, call) is None:
        return False
    channels = shape_of(call.args[0])[axis]
    if not 1 < channels == _groups(call) == shape_of(call)[axis]:
        return False
    if call.op.same_as(_CONV2D):
        return True
    return len(call.args) == _INT8_ARGUMENTS and all(
        isinstance(argument, GenericConst) for argument in call.args[1:4]
    )
