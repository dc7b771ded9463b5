"""Lowers hone's integer operators to TIR, with weights packed for the kernels.

Importing this module registers the default lowering, for vectors of `DEFAULT_LANES`; `rules` gives
the lowering that knows the machine. Weights are constants and are packed here, once, as int8:
``[K, R, S, C] → [ceil(K / tk), R, S, C, tk]`` with zeros in the rounding, depthwise ``[R, S, C]``,
``[K, C] → [ceil(K / tk), C, tk]``. Runs after `QuantizeInt8` and before fusion. Numerics: exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import tvm
from tvm import relax

from hone.errors import ModelError
from hone.passes.lower.anchors import ANCHOR
from hone.passes.lower.conv2d import Window, pack_conv2d_weight
from hone.passes.lower.dense import pack_dense_weight
from hone.targets.schedule.machine import Machine, Tile, choose_tile

from . import kernels
from .operators import NAMES

DEFAULT_LANES = 16
"""int32 lanes of the widest vectors in use (AVX-512); narrower ones take two or four steps."""

Legalization = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]


def rules(machine: Machine) -> dict[str, Legalization]:
    """Return operator name → lowering for a machine, for ``relax.transform.LegalizeOps``."""
    return _rules(partial(choose_tile, machine), machine.lanes)


def _rules(choose: Callable[..., Tile], lanes: int) -> dict[str, Legalization]:
    return {
        "hone.conv2d_int8": partial(_conv2d, choose, lanes),
        "hone.dense_int8": partial(_dense, choose, lanes),
        "hone.add_int8": _add,
        "hone.avg_pool2d_int8": _avg_pool2d,
        "hone.mean_int8": _mean,
        "hone.quantize": _quantize,
        "hone.dequantize": _dequantize,
    }


def _constant(call: relax.Call, index: int) -> np.ndarray:
    value = call.args[index]
    if not isinstance(value, tvm.ir.GenericConst):
        raise ModelError("the weights must be constant to be packed", where=call.op.name)
    return np.asarray(value.value.numpy())


def _ints(call: relax.Call, name: str) -> tuple[int, ...]:
    return tuple(int(x) for x in call.attrs[name])


def _dtype(call: relax.Call) -> str:
    return str(call.attrs["out_dtype"])


def _window(call: relax.Call, taps: Sequence[int]) -> Window:
    batch, height, width, channels = (int(extent) for extent in call.args[0].ty.shape)
    taps_h, taps_w = taps
    stride_h, stride_w = _ints(call, "strides")
    dilation_h, dilation_w = _ints(call, "dilation")
    top, left, bottom, right = _ints(call, "padding")
    return Window(
        shape=(batch, height, width, channels),
        taps=(taps_h, taps_w),
        strides=(stride_h, stride_w),
        dilation=(dilation_h, dilation_w),
        padding=(top, left, bottom, right),
    )


def _conv2d(
    choose: Callable[..., Tile], lanes: int, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    weight = _constant(call, 1)
    channels, taps_h, taps_w, depth = weight.shape
    window = _window(call, (taps_h, taps_w))
    data, _, *others = call.args
    dtype = _dtype(call)
    if int(call.attrs["groups"]) > 1:
        packed = np.ascontiguousarray(weight[..., 0].transpose(1, 2, 0))
        return bb.call_te(
            partial(kernels.depthwise_conv2d, window=window, out_dtype=dtype),
            data,
            relax.const(packed),
            *others,
            primfunc_name_hint="depthwise_conv2d_int8",
            primfunc_attrs=ANCHOR,
        )
    height, width = window.output
    tile = choose(height=height, width=width, channels=channels, depth=depth, taps=taps_h * taps_w)
    return bb.call_te(
        partial(kernels.conv2d, window=window, tile_columns=tile.columns, out_dtype=dtype),
        data,
        relax.const(pack_conv2d_weight(weight, tile.vectors * lanes)),
        *others,
        primfunc_name_hint="conv2d_int8",
        primfunc_attrs=ANCHOR,
    )


def _dense(
    choose: Callable[..., Tile], lanes: int, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    weight = _constant(call, 1)
    channels, depth = weight.shape
    shape = [int(extent) for extent in call.args[0].ty.shape]
    rows = math.prod(shape[:-1])
    data, _, *others = call.args
    if len(shape) > 2:
        data = bb.emit(relax.op.reshape(data, (rows, depth)))
        if len(others) > 3:
            others[3] = bb.emit(relax.op.reshape(others[3], (rows, channels)))
    tile = choose(height=1, width=rows, channels=channels, depth=depth, taps=1)
    product = bb.call_te(
        partial(kernels.dense, out_dtype=_dtype(call)),
        data,
        relax.const(pack_dense_weight(weight.T, tile.vectors * lanes)),
        *others,
        primfunc_name_hint="dense_int8",
        primfunc_attrs=ANCHOR,
    )
    if len(shape) > 2:
        product = relax.op.reshape(bb.emit(product), (*shape[:-1], channels))
    return product


def _add(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    kernel = partial(kernels.add, out_dtype=_dtype(call))
    return bb.call_te(kernel, *call.args, primfunc_name_hint="add_int8")


def _avg_pool2d(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    window = _window(call, _ints(call, "pool_size"))
    return bb.call_te(
        partial(kernels.avg_pool2d, window=window, out_dtype=_dtype(call)),
        *call.args,
        primfunc_name_hint="avg_pool2d_int8",
        primfunc_attrs=ANCHOR,
    )


def _mean(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    axis, keepdims = _ints(call, "axis"), bool(call.attrs["keepdims"])
    return bb.call_te(
        partial(kernels.mean, axis=axis, keepdims=keepdims, out_dtype=_dtype(call)),
        *call.args,
        primfunc_name_hint="mean_int8",
        primfunc_attrs=ANCHOR,
    )


def _quantize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    kernel = partial(kernels.quantize, out_dtype=_dtype(call))
    return bb.call_te(kernel, *call.args, primfunc_name_hint="quantize")


def _dequantize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    return bb.call_te(kernels.dequantize, *call.args, primfunc_name_hint="dequantize")


def _one_vector(**_shape: int) -> Tile:
    return Tile(rows=1, columns=1, vectors=1)


def _register() -> None:
    default = _rules(_one_vector, DEFAULT_LANES)
    for name in NAMES:
        tvm.ir.register_op_attr(name, "FLegalize", default[name])


_register()
