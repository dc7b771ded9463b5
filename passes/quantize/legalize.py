"""Lowers hone's integer operators to TIR, with weights packed for the kernels.

Importing this module registers the default lowering, for vectors of `DEFAULT_LANES`; `rules` gives
the lowering that knows the machine. Weights are constants and are packed here, once, as int8:
``[K, R, S, C] → [ceil(K / tk), R, S, C / 4, tk, 4]`` for a machine that sums products of bytes
(`dot_kernels`), ``[ceil(K / tk), R, S, C, tk]`` else, zeros in the rounding; depthwise
``[R, S, C]``, or in pairs of rows (`depthwise_kernels`). Runs after `QuantizeInt8` and before
fusion. Numerics: exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import tvm
from tvm import relax, te

from hone.errors import ModelError
from hone.passes.lower.anchors import ANCHOR
from hone.passes.lower.conv2d import Window, pack_conv2d_weight
from hone.passes.lower.dense import pack_dense_weight
from hone.targets.integer_dot import GROUP, LEVEL_OFFSET
from hone.targets.schedule.integer import choose_dot_tile
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_model import Tile, choose_tile
from hone.targets.word_intrinsics import word_dot_of

from . import (
    depthwise_kernels,
    dot_kernels,
    kernels,
    matrix_kernels,
    tile_kernels,
    winograd_lowering,
)
from .operators import NAMES

DEFAULT_LANES = 16
"""int32 lanes of the widest vectors in use (AVX-512); narrower ones take two or four steps."""

Legalization = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]


def rules(machine: Machine, *, compact: bool = False) -> dict[str, Legalization]:
    """Return operator name → lowering for a machine, for ``relax.transform.LegalizeOps``.

    Parameters
    ----------
    machine : Machine
        Decides instructions and tiles.
    compact : bool
        Keep weights small: no Winograd.
    """
    plain = _rules(partial(choose_tile, machine), machine.lanes)
    if machine.integer_dot is None:
        return plain
    return plain | {
        "hone.conv2d_int8": partial(_dot_conv2d, machine, compact, plain["hone.conv2d_int8"]),
        "hone.dense_int8": partial(_dot_dense, machine, plain["hone.dense_int8"]),
    }


def _rules(choose: Callable[..., Tile], lanes: int) -> dict[str, Legalization]:
    return {
        "hone.conv2d_int8": partial(_conv2d, choose, lanes),
        "hone.dense_int8": partial(_dense, choose, lanes),
        "hone.row_sums": _row_sums,
        "hone.window_sums": _window_sums,
        "hone.add_int8": _add,
        "hone.multiply_int8": _multiply,
        "hone.table_int8": _table,
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
    kernel = partial(kernels.conv2d, window=window, tile_columns=tile.columns, out_dtype=dtype)
    return bb.call_te(
        _in_order(call)(kernel),
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
    data, _, bias, *others = call.args
    data, others, shape = _as_rows(bb, data, others)
    rows = int(data.ty.shape[0])
    tile = choose(height=1, width=rows, channels=channels, depth=depth, taps=1)
    product = bb.call_te(
        _in_order(call)(partial(kernels.dense, out_dtype=_dtype(call))),
        data,
        relax.const(pack_dense_weight(weight.T, tile.vectors * lanes)),
        bias,
        *others,
        primfunc_name_hint="dense_int8",
        primfunc_attrs=ANCHOR,
    )
    return _in_shape(bb, product, shape, channels)


def _dot_conv2d(
    machine: Machine,
    compact: bool,
    plain: Legalization,
    bb: relax.BlockBuilder,
    call: relax.Call,
) -> relax.Expr:
    data, _, bias, *others = call.args
    if int(call.attrs["groups"]) > 1:
        return _depthwise(machine, plain, bb, call)
    if str(data.ty.dtype) != "uint8":
        return plain(bb, call)
    weight = _constant(call, 1)
    window = _window(call, weight.shape[1:3])
    ways = [tile_kernels.lower_conv2d, matrix_kernels.lower_conv2d]
    if not compact:
        ways.append(winograd_lowering.lower_conv2d)
    for lower in ways:
        lowered = lower(
            machine,
            bb,
            [data, bias, *others],
            weight,
            window,
            out_dtype=_dtype(call),
            wrap=_in_order(call),
        )
        if lowered is not None:
            return lowered
    cut = dot_kernels.Rows.of(window)
    height, width = window.output
    tile = choose_dot_tile(
        machine,
        height=height,
        width=width,
        channels=weight.shape[0],
        depth=cut.groups,
        taps=window.taps[0] * cut.taps,
    )
    offset = LEVEL_OFFSET.get(machine.integer_dot, 0)
    kernel = partial(
        dot_kernels.conv2d,
        window=window,
        rows=cut,
        tile_columns=tile.columns,
        offset=offset,
        out_dtype=_dtype(call),
    )
    return bb.call_te(
        _in_order(call)(kernel),
        data,
        relax.const(dot_kernels.pack_conv2d(weight, cut, tile.vectors * machine.lanes)),
        _corrected(bb, bias, weight, offset),
        *others,
        primfunc_name_hint="conv2d_int8",
        primfunc_attrs=ANCHOR,
    )


def _depthwise(
    machine: Machine, plain: Legalization, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    data, _, *others = call.args
    weight = _constant(call, 1)
    window = _window(call, weight.shape[1:3])
    dot = word_dot_of(machine.integer_dot)
    if dot is None or not depthwise_kernels.in_pairs(machine, window):
        return plain(bb, call)
    return bb.call_te(
        partial(depthwise_kernels.conv2d, window=window, dot=dot, out_dtype=_dtype(call)),
        data,
        relax.const(depthwise_kernels.pack(weight[..., 0].transpose(1, 2, 0))),
        *others,
        primfunc_name_hint="depthwise_conv2d_int8",
        primfunc_attrs=ANCHOR,
    )


def _dot_dense(
    machine: Machine, plain: Legalization, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    data, _, bias, *others = call.args
    if str(data.ty.dtype) != "uint8":
        return plain(bb, call)
    weight = _constant(call, 1)
    channels, depth = weight.shape
    data, others, shape = _as_rows(bb, data, others)
    rows = int(data.ty.shape[0])
    for lower in (tile_kernels.lower_dense, matrix_kernels.lower_dense):
        lowered = lower(
            machine,
            bb,
            [data, bias, *others],
            weight,
            out_dtype=_dtype(call),
            wrap=_in_order(call),
        )
        if lowered is not None:
            return _in_shape(bb, lowered, shape, channels)
    groups = dot_kernels.rounded_up(depth, GROUP) // GROUP
    tile = choose_dot_tile(machine, height=1, width=rows, channels=channels, depth=groups, taps=1)
    offset = LEVEL_OFFSET.get(machine.integer_dot, 0)
    kernel = partial(
        dot_kernels.dense, tile_rows=tile.columns, offset=offset, out_dtype=_dtype(call)
    )
    product = bb.call_te(
        _in_order(call)(kernel),
        data,
        relax.const(dot_kernels.pack_dense(weight, tile.vectors * machine.lanes)),
        _corrected(bb, bias, weight, offset),
        *others,
        primfunc_name_hint="dense_int8",
        primfunc_attrs=ANCHOR,
    )
    return _in_shape(bb, product, shape, channels)


def _corrected(
    bb: relax.BlockBuilder, bias: relax.Expr, weight: np.ndarray, offset: int
) -> relax.Expr:
    """Return the bias with what an instruction takes off the levels, times the weights."""
    if not offset:
        return bias
    sums = weight.reshape(len(weight), -1).sum(1, dtype=np.int32)
    return bb.normalize(bb.emit(relax.op.add(bias, relax.const(sums * np.int32(offset)))))


def _in_order(call: relax.Call) -> tile_kernels.Wrap:
    """Return what makes a kernel take the arguments of a call: offsets without a residual too."""
    if not bool(call.attrs["offsets"]):
        return _as_it_is
    return _with_offsets


def _as_it_is(kernel: tile_kernels.Kernel) -> tile_kernels.Kernel:
    return kernel


def _with_offsets(kernel: tile_kernels.Kernel) -> tile_kernels.Kernel:
    def reordered(*arguments: te.Tensor) -> te.Tensor:
        *others, offsets, window_sums = arguments
        return kernel(*others, offsets=offsets, window_sums=window_sums)

    return reordered


def _as_rows(
    bb: relax.BlockBuilder, data: relax.Expr, others: list[relax.Expr]
) -> tuple[relax.Expr, list[relax.Expr], list[int]]:
    """Return the data and what stands beside it as matrices, and the data's shape.

    ``others`` are the arguments after the bias; a residual and sums of rows have the data's rows.
    """
    shape = [int(extent) for extent in data.ty.shape]
    if len(shape) > 2:
        rows = math.prod(shape[:-1])
        data = bb.emit(relax.op.reshape(data, (rows, shape[-1])))
        others = [
            bb.emit(relax.op.reshape(x, (rows, int(x.ty.shape[-1])))) if _rank(x) > 2 else x
            for x in others
        ]
    return data, others, shape


def _rank(value: relax.Expr) -> int:
    return len(value.ty.shape)


def _in_shape(
    bb: relax.BlockBuilder, product: relax.Expr, shape: list[int], channels: int
) -> relax.Expr:
    """Return a matrix as the product of data that had a shape."""
    if len(shape) > 2:
        product = relax.op.reshape(bb.emit(product), (*shape[:-1], channels))
    return product


def _row_sums(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    shape = [int(extent) for extent in call.args[0].ty.shape]
    sums = bb.call_te(kernels.row_sums, call.args[0], primfunc_name_hint="row_sums")
    return relax.op.reshape(bb.emit(sums), (*shape[:-1], 1))


def _window_sums(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    data, border = call.args
    window = _window(call, _ints(call, "taps"))
    image = bb.emit(relax.op.reshape(data, window.shape[:3]))
    kernel = partial(kernels.window_sums, window=window)
    sums = bb.call_te(kernel, image, border, primfunc_name_hint="window_sums")
    return relax.op.reshape(bb.emit(sums), (window.shape[0], *window.output, 1))


def _add(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    kernel = partial(kernels.add, out_dtype=_dtype(call))
    return bb.call_te(kernel, *call.args, primfunc_name_hint="add_int8")


def _multiply(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    kernel = partial(kernels.multiply, out_dtype=_dtype(call))
    return bb.call_te(kernel, *call.args, primfunc_name_hint="multiply_int8")


def _table(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    return bb.call_te(kernels.table, *call.args, primfunc_name_hint="table_int8")


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
