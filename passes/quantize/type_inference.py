"""Type inference of hone's integer operators: every rule that a call must keep.

Called by the constructors in `hone.passes.quantize.operators`, and by TVM whenever a pass rebuilds
a call. Each rule raises `ModelError` with the operator's name; TVM passes its text on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import relax, tirx

from hone.errors import ModelError

LEVEL_TYPES = ("uint8", "int8")


def _tensor(call: relax.Call, index: int, name: str, dtypes: Sequence[str]) -> tuple[int, ...]:
    """Check one argument's dtype, and return its static shape."""
    type_ = call.args[index].ty
    op = call.op.name
    if not isinstance(type_, relax.TensorType) or type_.shape is None:
        raise ModelError(f"{name} must be a tensor of known shape, not {type_}", where=op)
    if str(type_.dtype) not in dtypes:
        raise ModelError(f"{name} must be {' or '.join(dtypes)}, not {type_.dtype}", where=op)
    if not all(isinstance(extent, tirx.IntImm) for extent in type_.shape):
        raise ModelError(f"{name} must have a static shape, not {type_.shape}", where=op)
    return tuple(int(extent) for extent in type_.shape)


def _shaped(call: relax.Call, index: int, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    given = _tensor(call, index, name, [dtype])
    if given != shape:
        raise ModelError(
            f"{name} must have shape {list(shape)}, not {list(given)}", where=call.op.name
        )


def _out_dtype(call: relax.Call, allowed: Sequence[str]) -> str:
    dtype = str(call.attrs["out_dtype"])
    if dtype not in allowed:
        raise ModelError(
            f"out_dtype must be {' or '.join(allowed)}, not {dtype}", where=call.op.name
        )
    return dtype


def _ints(call: relax.Call, name: str, count: int, least: int) -> tuple[int, ...]:
    values = tuple(int(x) for x in call.attrs[name])
    if len(values) != count or min(values) < least:
        raise ModelError(
            f"{name} must be {count} integers of at least {least}, not {list(values)}",
            where=call.op.name,
        )
    return values


def _window(call: relax.Call, shape: tuple[int, ...], taps: tuple[int, ...]) -> tuple[int, int]:
    """Output height and width of a window over ``[N, H, W, C]``."""
    strides, dilation = _ints(call, "strides", 2, 1), _ints(call, "dilation", 2, 1)
    padding = _ints(call, "padding", 4, 0)
    sizes = [
        (shape[1 + i] + padding[i] + padding[2 + i] - dilation[i] * (taps[i] - 1) - 1) // strides[i]
        + 1
        for i in range(2)
    ]
    if min(sizes) < 1:
        raise ModelError(
            f"the window {list(taps)} is larger than the padded input {list(shape)}",
            where=call.op.name,
        )
    return sizes[0], sizes[1]


def _contraction(call: relax.Call, channels: int, output: tuple[int, ...]) -> relax.TensorType:
    """Check what convolution and matrix product share, after data and weight."""
    _shaped(call, 2, "bias", "int32", (channels,))
    _shaped(call, 3, "multiplier", "float32", (channels,))
    dtype = _out_dtype(call, (*LEVEL_TYPES, "float32"))
    offsets = bool(call.attrs["offsets"])
    residual = len(call.args) - 2 * offsets == 7
    if offsets:
        _shaped(call, len(call.args) - 2, "weight_offsets", "int32", (channels,))
        _shaped(call, len(call.args) - 1, "window_sums", "int32", (*output[:-1], 1))
    if residual:
        if dtype == "float32":
            raise ModelError("a residual needs a quantized output", where=call.op.name)
        given = _tensor(call, 5, "residual", LEVEL_TYPES)
        if given != output:
            raise ModelError(
                f"residual must have the output's shape {list(output)}, not {list(given)}",
                where=call.op.name,
            )
        _shaped(call, 6, "residual_multiplier", "float32", (1,))
    count = 1 if dtype == "float32" else 4 + residual
    _shaped(call, 4, "levels", "int32", (count,))
    return relax.TensorType(output, dtype)


def _infer_conv2d(call: relax.Call) -> relax.TensorType:
    data = _tensor(call, 0, "data", LEVEL_TYPES)
    groups = int(call.attrs["groups"])
    # Of a depthwise convolution every product is its own: weights less their zero point, 9 bits
    # with a sign, cost it nothing.
    weight = _tensor(call, 1, "weight", ["int8", "int16"] if groups > 1 else ["int8"])
    if len(data) != 4 or len(weight) != 4:
        raise ModelError(
            f"data [N, H, W, C] and weight [K, R, S, C / groups] are required, not {list(data)} "
            f"and {list(weight)}",
            where=call.op.name,
        )
    channels = weight[0]
    depthwise = groups == data[3] == channels and weight[3] == 1
    if not depthwise and not (groups == 1 and weight[3] == data[3]):
        raise ModelError(
            f"groups must be 1, or C with one filter for each channel; not {groups} for data "
            f"{list(data)} and weight {list(weight)}",
            where=call.op.name,
        )
    if depthwise and groups > 1 and bool(call.attrs["offsets"]):
        raise ModelError(
            "weights of one filter for each channel have no offsets: they are int16",
            where=call.op.name,
        )
    height, width = _window(call, data, weight[1:3])
    return _contraction(call, channels, (data[0], height, width, channels))


def _infer_dense(call: relax.Call) -> relax.TensorType:
    data = _tensor(call, 0, "data", LEVEL_TYPES)
    weight = _tensor(call, 1, "weight", ["int8"])
    if len(data) < 2 or len(weight) != 2 or data[-1] != weight[1]:
        raise ModelError(
            f"data [..., C] and weight [K, C] are required, not {list(data)} and {list(weight)}",
            where=call.op.name,
        )
    return _contraction(call, weight[0], (*data[:-1], weight[0]))


def _infer_row_sums(call: relax.Call) -> relax.TensorType:
    data = _tensor(call, 0, "data", LEVEL_TYPES)
    if len(data) < 2:
        raise ModelError(f"data [..., C] is required, not {list(data)}", where=call.op.name)
    return relax.TensorType((*data[:-1], 1), "int32")


def _infer_window_sums(call: relax.Call) -> relax.TensorType:
    data = _tensor(call, 0, "data", ["int32"])
    if len(data) != 4 or data[3] != 1:
        raise ModelError(f"data [N, H, W, 1] is required, not {list(data)}", where=call.op.name)
    _shaped(call, 1, "border", "int32", (1,))
    height, width = _window(call, data, _ints(call, "taps", 2, 1))
    return relax.TensorType((data[0], height, width, 1), "int32")


def _infer_add(call: relax.Call) -> relax.TensorType:
    left = _tensor(call, 0, "left", LEVEL_TYPES)
    right = _tensor(call, 1, "right", LEVEL_TYPES)
    if left != right:
        raise ModelError(
            f"left and right must have one shape, not {list(left)} and {list(right)}",
            where=call.op.name,
        )
    _shaped(call, 2, "multipliers", "float32", (2,))
    _shaped(call, 3, "levels", "int32", (5,))
    return relax.TensorType(left, _out_dtype(call, LEVEL_TYPES))


def _infer_multiply(call: relax.Call) -> relax.TensorType:
    left = _tensor(call, 0, "left", LEVEL_TYPES)
    right = _tensor(call, 1, "right", LEVEL_TYPES)
    if len(left) != len(right) or any(
        a != b and 1 not in (a, b) for a, b in zip(left, right, strict=True)
    ):
        raise ModelError(
            f"left and right must broadcast axis by axis, not {list(left)} and {list(right)}",
            where=call.op.name,
        )
    _shaped(call, 2, "multiplier", "float32", (1,))
    _shaped(call, 3, "levels", "int32", (5,))
    shape = [max(a, b) for a, b in zip(left, right, strict=True)]
    return relax.TensorType(shape, _out_dtype(call, LEVEL_TYPES))


def _infer_table(call: relax.Call) -> relax.TensorType:
    data = _tensor(call, 0, "data", ["uint8"])
    _shaped(call, 1, "table", "uint8", (256,))
    return relax.TensorType(data, "uint8")


def _infer_avg_pool2d(call: relax.Call) -> relax.TensorType:
    data = _tensor(call, 0, "data", LEVEL_TYPES)
    if len(data) != 4:
        raise ModelError(f"data [N, H, W, C] is required, not {list(data)}", where=call.op.name)
    _shaped(call, 1, "multiplier", "float32", (1,))
    _shaped(call, 2, "levels", "int32", (4,))
    height, width = _window(call, data, _ints(call, "pool_size", 2, 1))
    return relax.TensorType((data[0], height, width, data[3]), _out_dtype(call, LEVEL_TYPES))


def _infer_mean(call: relax.Call) -> relax.TensorType:
    data = _tensor(call, 0, "data", LEVEL_TYPES)
    _shaped(call, 1, "multiplier", "float32", (1,))
    _shaped(call, 2, "levels", "int32", (4,))
    axes = [int(x) for x in call.attrs["axis"]]
    rank = len(data)
    if not axes or not all(-rank <= axis < rank for axis in axes):
        raise ModelError(
            f"axis must name dimensions of data {list(data)}, not {axes}", where=call.op.name
        )
    averaged = {axis % rank for axis in axes}
    keep = bool(call.attrs["keepdims"])
    shape = [
        1 if i in averaged else extent for i, extent in enumerate(data) if keep or i not in averaged
    ]
    return relax.TensorType(shape, _out_dtype(call, LEVEL_TYPES))


def _infer_quantize(call: relax.Call) -> relax.TensorType:
    data = _tensor(call, 0, "data", ["float32"])
    _shaped(call, 1, "scale", "float32", ())
    _shaped(call, 2, "zero_point", "int32", ())
    return relax.TensorType(data, _out_dtype(call, LEVEL_TYPES))


def _infer_dequantize(call: relax.Call) -> relax.TensorType:
    data = _tensor(call, 0, "data", (*LEVEL_TYPES, "int32"))
    _shaped(call, 1, "scale", "float32", ())
    _shaped(call, 2, "zero_point", "int32", ())
    return relax.TensorType(data, "float32")


INFERENCE: dict[str, Callable[[relax.Call], relax.TensorType]] = {
    "hone.conv2d_int8": _infer_conv2d,
    "hone.dense_int8": _infer_dense,
    "hone.row_sums": _infer_row_sums,
    "hone.window_sums": _infer_window_sums,
    "hone.add_int8": _infer_add,
    "hone.multiply_int8": _infer_multiply,
    "hone.table_int8": _infer_table,
    "hone.avg_pool2d_int8": _infer_avg_pool2d,
    "hone.mean_int8": _infer_mean,
    "hone.quantize": _infer_quantize,
    "hone.dequantize": _infer_dequantize,
}
