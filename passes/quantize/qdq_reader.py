"""Reads what a QDQ module says about its tensors: scales, zero points, integer weights.

A *level tensor* is an 8-bit integer tensor that is quantized or dequantized with one scale. Signed
levels are moved to unsigned ones, ``level + 128`` with the zero point moved along: the same real
values, and the type that hone's kernels take. Changes nothing. Numerics: exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tvm import relax
from tvm.ir import GenericConst, Op

from hone.passes.graph.dataflow import Dataflow, shape_of

from .levels import Levels
from .operators import NAMES as NAMES  # registers the operators
from .type_inference import LEVEL_TYPES

SHIFT = 128
"""From int8 to uint8 levels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """Constant levels with their meaning.

    Parameters
    ----------
    levels : numpy.ndarray
        int64, with the zero point taken off.
    scale : numpy.ndarray
        float64, ``[]`` or one for each index of ``axis``.
    axis : int or None
        None for one scale.
    dtype : str
        Of the levels, as the model stores them.
    """

    levels: np.ndarray
    scale: np.ndarray
    axis: int | None
    dtype: str

    @property
    def real(self) -> np.ndarray:
        """Return the real values, float64."""
        if self.axis is None:
            return np.asarray(self.levels * self.scale)
        shape = [1] * self.levels.ndim
        shape[self.axis] = -1
        return np.asarray(self.levels * self.scale.reshape(shape))


def levels_of_quantize(call: relax.Expr) -> Levels | None:
    """Return the levels that a ``hone.quantize`` makes, None for another or at run time."""
    if not isinstance(call, relax.Call) or call.op != _QUANTIZE:
        return None
    return _levels(call, str(call.attrs["out_dtype"]))


def levels_of_dequantize(call: relax.Expr) -> Levels | None:
    """Return the levels that a ``hone.dequantize`` reads, None for another or at run time."""
    if not isinstance(call, relax.Call) or call.op != _DEQUANTIZE:
        return None
    dtype = str(call.args[0].ty.dtype)
    if dtype not in LEVEL_TYPES or not isinstance(call.args[0], relax.Var):
        return None
    return _levels(call, dtype)


def _levels(call: relax.Call, dtype: str) -> Levels | None:
    if not all(isinstance(x, GenericConst) for x in call.args[1:3]):
        return None
    scale, zero_point = (np.asarray(x.value.numpy()) for x in call.args[1:3])
    moved = int(zero_point) + (SHIFT if dtype == "int8" else 0)
    if not (np.isfinite(scale) and scale > 0 and 0 <= moved <= 255):
        return None
    return Levels(scale=float(scale), zero_point=moved)


def weight_of(graph: Dataflow, expr: relax.Expr) -> Weight | None:
    """Return the integer weight that an expression is, through transpositions; else None."""
    call = graph.call(graph.resolve(expr))
    if call is None:
        return None
    if call.op == _PERMUTE:
        inner = weight_of(graph, call.args[0])
        if inner is None:
            return None
        rank = inner.levels.ndim
        axes = call.attrs.axes
        order = list(range(rank))[::-1] if axes is None else [int(a) % rank for a in axes]
        axis = None if inner.axis is None else order.index(inner.axis)
        return replace(inner, levels=inner.levels.transpose(order), axis=axis)
    if call.op not in (_DEQUANTIZE, _DEQUANTIZE_AXIS):
        return None
    if not all(isinstance(x, GenericConst) for x in call.args):
        return None
    data, scale, zero_point = (np.asarray(x.value.numpy()) for x in call.args)
    if str(data.dtype) not in (*LEVEL_TYPES, "int32"):
        return None
    axis = int(call.attrs.axis) % data.ndim if call.op == _DEQUANTIZE_AXIS else None
    points = zero_point.astype(np.int64)
    if axis is not None:
        points = points.reshape([-1 if i == axis else 1 for i in range(data.ndim)])
    return Weight(
        levels=data.astype(np.int64) - points,
        scale=scale.astype(np.float64),
        axis=axis,
        dtype=str(data.dtype),
    )


def constant_of(graph: Dataflow, expr: relax.Expr) -> np.ndarray | None:
    """Return the real values of a constant, dequantized or not, through reshapes; else None."""
    value = graph.constant(expr)
    if value is not None:
        return value.astype(np.float64)
    call = graph.call(graph.resolve(expr))
    if call is not None and call.op == _RESHAPE:
        inner = constant_of(graph, call.args[0])
        return None if inner is None else inner.reshape(shape_of(call))
    weight = weight_of(graph, expr)
    return None if weight is None else weight.real


_QUANTIZE = Op.get("hone.quantize")
_DEQUANTIZE = Op.get("hone.dequantize")
_DEQUANTIZE_AXIS = Op.get("relax.dequantize")
_PERMUTE = Op.get("relax.permute_dims")
_RESHAPE = Op.get("relax.reshape")
