"""Conversions of QuantizeLinear, DequantizeLinear and ConvInteger.

A tensor of 8-bit levels with one constant scale becomes ``hone.quantize`` and ``hone.dequantize``,
also where it is a constant weight: the importer does not fold it, so that the module says what the
model says, and `hone.passes.quantize.match_qdq` finds the integers. One scale for each index of an
axis is TVM's own operator, one for each block is `blocked`'s. What else there is (16 bits, float16
scales) is left to TVM's importer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from tvm.relax import op

from hone.passes.quantize import legalize as legalize  # lowers the operators, registers itself
from hone.passes.quantize import operators
from hone.passes.quantize.qparams import SMALLEST_SCALE
from hone.passes.quantize.type_inference import LEVEL_TYPES

from .blocked import dequantize_blocked
from .call import Call, Converter, const
from .windows import WINDOWS


def _scalar(call: Call, index: int, dtype: str) -> Any:
    """Return a scale or zero point of one number as ``[]`` of a dtype; 0 where it is left out."""
    if call.input(index) is None:
        return const(0, dtype)
    value = call.value(index)
    if value is not None:
        return const(value.reshape(()), dtype)
    given = call.inputs[index]
    given = given if call.dtype(index) == dtype else call.bb.emit(op.astype(given, dtype))
    return call.bb.emit(op.reshape(given, ())) if call.shape(index) else given


def _is_single(call: Call) -> bool:
    return all(call.input(i) is None or call.shape(i) in ((), (1,)) for i in (1, 2))


def _is_known(call: Call) -> bool:
    return all(call.input(i) is None or call.value(i) is not None for i in (1, 2))


def _fits(call: Call) -> bool:
    """Tell whether the scale has a float32 reciprocal, as far as it is known."""
    scale = call.value(1)
    if scale is None:
        return True
    return bool(np.isfinite(scale).all() and (scale >= SMALLEST_SCALE).all())


def _quantize_linear(call: Call) -> Any:
    dtype = call.outputs[0].dtype
    if dtype not in LEVEL_TYPES or call.dtype(1) != "float32" or not _fits(call):
        return None
    if call.dtype() not in ("float32", "int32"):
        return None
    data = call.inputs[0]
    if call.dtype() != "float32":
        data = call.bb.emit(op.astype(data, "float32"))
    if _is_single(call) and _is_known(call):
        scale, zero_point = _scalar(call, 1, "float32"), _scalar(call, 2, "int32")
        return operators.quantize(data, scale, zero_point, out_dtype=dtype)
    axis = call.axis(1)
    return op.quantize(data, call.inputs[1], _zero_points(call, dtype), axis, dtype)


def _dequantize_linear(call: Call) -> Any:
    if call.attributes.get("block_size", 0):
        return dequantize_blocked(call)
    if call.outputs[0].dtype != "float32" or call.dtype() not in (*LEVEL_TYPES, "int32"):
        return None
    if _is_single(call):
        scale, zero_point = _scalar(call, 1, "float32"), _scalar(call, 2, "int32")
        return operators.dequantize(call.inputs[0], scale, zero_point)
    if call.dtype() == "int32":
        return None
    zero_points = _zero_points(call, call.dtype())
    return op.dequantize(call.inputs[0], call.inputs[1], zero_points, call.axis(1), "float32")


def _zero_points(call: Call, dtype: str) -> Any:
    given = call.input(2)
    return const(np.zeros(call.shape(1)), dtype) if given is None else given


def _conv_integer(call: Call) -> Any:
    """Sum levels less their zero points in int32, where QDQ would not be exact."""
    shapes = [(), [-1] + [1] * (len(call.shape()) - 1)]
    operands = []
    for index, shape in enumerate(shapes):
        operand = call.bb.emit(op.astype(call.inputs[index], "int32"))
        point = call.input(2 + index)
        if point is not None:
            point = call.bb.emit(op.astype(point, "int32"))
            single = call.shape(2 + index) in ((), (1,))
            point = call.bb.emit(op.reshape(point, () if single else shape))
            operand = call.bb.emit(op.subtract(operand, point))
        operands.append(operand)
    return WINDOWS["Conv"](
        Call(
            bb=call.bb,
            inputs=operands,
            values=[None, None],
            attributes=call.attributes,
            outputs=call.outputs,
            opset=call.opset,
        )
    )


QUANTIZATION: Final[Mapping[str, Converter]] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize_linear,
    "QuantizeLinear": _quantize_linear,
}
"""By operator of the default domain."""
