"""DequantizeLinear in blocks: one scale for each run of ``block_size`` neighbours along an axis.

Constant levels become ``hone.decode_weights``, which keeps them in their few bits;
`hone.passes.quantize.pack_weights` gives them to the layer that reads them. Numerics: exact.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm.relax import op

from hone.passes.quantize.decode_operator import Decoded
from hone.passes.quantize.given_levels import given_levels

from .call import Call, const


def dequantize_blocked(call: Call) -> Any:
    """Return ``(level - zero_point) × scale``, with both repeated along the axis.

    Parameters
    ----------
    call : Call
        A DequantizeLinear with a ``block_size``.
    """
    output = call.outputs[0]
    axis, block = call.axis(1), int(call.attributes["block_size"])
    levels, scale = call.value(0), call.value(1)
    points = np.zeros(call.shape(1), np.int64) if call.input(2) is None else call.value(2)
    if levels is None or scale is None or points is None:
        return _at_run_time(call, axis, block)
    if output.dtype == "float32":
        decoded = _decoded(call, levels, scale, points, axis, block)
        if decoded is not None:
            return decoded
    ends = [_repeated(each, axis, block, levels.shape[axis]) for each in (points, scale)]
    # Exact in float64; rounded once, as a product in the output's own type is.
    real = (levels.astype(np.int64) - ends[0]).astype(np.float64) * ends[1].astype(np.float64)
    return const(real, output.dtype)


def _decoded(
    call: Call, levels: np.ndarray, scale: np.ndarray, points: np.ndarray, axis: int, block: int
) -> Any:
    """Return a decoded weight; None where packed levels cannot hold it."""
    depth, rank = levels.shape[axis], levels.ndim
    matrices = [
        np.moveaxis(each, axis, -1).reshape(-1, each.shape[axis])
        for each in (levels, scale, points)
    ]
    found = given_levels(*matrices, group=block)
    if isinstance(found, str):
        return None
    if rank == 2 and axis == 0:
        return Decoded(levels=found, shape=tuple(levels.shape), axis=1).call()
    rows = math.prod(levels.shape) // depth
    weight: Any = Decoded(levels=found, shape=(rows, depth), axis=0).call()
    if rank == 2:
        return weight
    outer = [levels.shape[i] for i in range(rank) if i != axis]
    weight = call.bb.emit(op.reshape(call.bb.emit(weight), (*outer, depth)))
    order = list(range(rank - 1))
    order.insert(axis, rank - 1)
    return op.permute_dims(weight, order)


def _at_run_time(call: Call, axis: int, block: int) -> Any:
    dtype, size = call.outputs[0].dtype, call.shape()[axis]
    wide = "int32" if call.dtype().endswith(("8", "16")) else call.dtype()
    data = op.astype(call.inputs[0], wide)
    if call.input(2) is not None:
        data = op.subtract(data, op.astype(_spread(call, 2, axis, block, size), wide))
    return op.multiply(op.astype(data, dtype), _spread(call, 1, axis, block, size))


def _spread(call: Call, index: int, axis: int, block: int, size: int) -> Any:
    value = call.value(index)
    if value is not None:
        return const(_repeated(value, axis, block, size), str(call.inputs[index].ty.dtype))
    wide = call.bb.emit(op.repeat(call.inputs[index], block, axis))
    return call.bb.emit(op.strided_slice(wide, [axis], [0], [size]))


def _repeated(values: np.ndarray, axis: int, block: int, size: int) -> np.ndarray:
    return np.take(np.repeat(values, block, axis), range(size), axis)
