"""hone's own conversions of ONNX operators, where TVM's are wrong or opaque.

Every shape is static here and constants are folded, so that most operators become one Relax
operator. None of these uses ``call_tir``, which hides an operator from layout conversion, fusion
and training. An operator that is not listed is converted by TVM's importer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from tvm import relax
from tvm.relax import op

from .attention import attention
from .call import Call, Converter, const
from .division import DIVISIONS
from .quantize import QUANTIZATION
from .resize import resize
from .windows import WINDOWS


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


# ---------------------------------------------------------------- shapes


def _reshape(call: Call) -> Any:
    shape = call.outputs[0].shape
    return call.inputs[0] if shape == call.shape() else op.reshape(call.inputs[0], shape)


def _identity(call: Call) -> Any:
    return call.inputs[0]


def _dropout(call: Call) -> Any:
    """Inference: the input, and a mask that keeps everything."""
    mask = [op.ones(o.shape, "bool") for o in call.outputs[1:]]
    return [call.inputs[0], *mask] if mask else call.inputs[0]


def _transpose(call: Call) -> Any:
    return op.permute_dims(call.inputs[0], call.attributes.get("perm"))


def _expand(call: Call) -> Any:
    shape = call.outputs[0].shape
    return call.inputs[0] if shape == call.shape() else op.broadcast_to(call.inputs[0], shape)


def _tile(call: Call) -> Any:
    repeats = call.ints(1, "repeats")
    return None if repeats is None else op.tile(call.inputs[0], repeats)


def _concat(call: Call) -> Any:
    return op.concat(list(call.inputs), call.axis())


def _split(call: Call) -> Any:
    axis = call.axis()
    sizes = call.ints(1, "split")
    if sizes is None:
        # Equal parts, the last one smaller where they do not fit.
        count = int(call.attributes.get("num_outputs", len(call.outputs)))
        part = -(-call.shape()[axis] // count)
        sizes = [part] * (count - 1)
    else:
        sizes = sizes[:-1]
    if not sizes:
        return [call.inputs[0]]
    ends = np.cumsum(sizes)
    return op.split(call.inputs[0], [int(e) for e in ends], axis)


def _slice(call: Call) -> Any:
    rank = len(call.shape())
    starts, stops = call.ints(1, "starts"), call.ints(2, "ends")
    if starts is None or stops is None:
        return None
    axes = call.ints(3, "axes") or list(range(len(starts)))
    steps = call.ints(4, "steps") or [1] * len(starts)
    begins, ends = [], []
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        size = call.shape()[axis]
        begin, end, _ = slice(start, stop, step).indices(size)
        begins.append(begin)
        ends.append(end if end >= 0 else -size - 1)
    return op.strided_slice(call.inputs[0], [a % rank for a in axes], begins, ends, steps)


def _constant_of_shape(call: Call) -> Any:
    value = call.attributes.get("value")
    output = call.outputs[0]
    fill = 0 if value is None else _scalar(value)
    return op.full(output.shape, const(fill, output.dtype), output.dtype)


def _scalar(tensor: Any) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor).reshape(-1)[0]


# ---------------------------------------------------------------- indexing


def _gather(call: Call) -> Any:
    """``take``; in range at any index, since TVM's default reads beyond the table."""
    axis = call.axis()
    indices = call.value(1)
    if indices is None:
        # Negative indices count from the end: wrapping is one rule for all that are valid.
        return op.take(call.inputs[0], call.inputs[1], axis, mode="wrap")
    size = call.shape()[axis]
    if ((indices < -size) | (indices >= size)).any():
        raise ValueError(f"indices must lie in {-size} to {size - 1}")
    indices = np.where(indices < 0, indices + size, indices)
    return op.take(call.inputs[0], const(indices, str(call.inputs[1].ty.dtype)), axis, mode="clip")


def _cumsum(call: Call) -> Any:
    axes = call.ints(1, "axis")
    if axes is None:
        return None
    axis = axes[0] % len(call.shape())
    data, reverse = call.inputs[0], bool(call.attributes.get("reverse", 0))
    if reverse:
        data = op.flip(data, axis)
    exclusive = bool(call.attributes.get("exclusive", 0))
    data = op.cumsum(data, axis, call.dtype(), exclusive)
    return op.flip(data, axis) if reverse else data


def _one_hot(call: Call) -> Any:
    """``where(indices == arange(depth), on, off)``; indices out of range give a row of off."""
    depth = call.value(1)
    if depth is None:
        return None
    count = int(depth.reshape(-1)[0])
    kind = call.dtype()
    rank = len(call.outputs[0].shape)
    axis = call.axis(-1, rank=rank)
    indices = op.expand_dims(call.inputs[0], axis)
    zero = const(0, kind)
    wrapped = op.where(op.less(indices, zero), op.add(indices, const(count, kind)), indices)
    classes = np.arange(count).reshape([count if i == axis else 1 for i in range(rank)])
    off, on = (op.take(call.inputs[2], const(i, "int64"), 0, mode="clip") for i in (0, 1))
    return op.where(op.equal(wrapped, const(classes, kind)), on, off)


# ---------------------------------------------------------------- elementwise


def _mish(call: Call) -> Any:
    """``x tanh(ln(1 + e^x)) = x n / (n + 2)`` with ``n = e^x (e^x + 2)``; beyond 20 it is x.

    At x = 1: e^x = 2.71828, n = 12.82562, and the result is 0.86510.
    """
    x, dtype = call.inputs[0], call.dtype()
    if dtype == "float64":
        return None
    # In float16 e^5 (e^5 + 2) is still finite, and n / (n + 2) rounds to 1.
    most = const(5 if dtype == "float16" else 20, dtype)
    two = const(2, dtype)
    power = call.bb.emit(op.exp(op.minimum(most, x)))
    n = call.bb.emit(op.multiply(power, op.add(power, two)))
    return op.multiply(x, op.divide(n, op.add(n, two)))


def _elu(call: Call) -> Any:
    """``max(x, 0) - alpha max(1 - exp(x), 0)``."""
    x, dtype = call.inputs[0], call.dtype()
    below = op.nn.relu(op.subtract(const(1, dtype), op.exp(x)))
    alpha = const(call.attributes.get("alpha", 1.0), dtype)
    return op.subtract(op.nn.relu(x), op.multiply(alpha, below))


def _clip(call: Call) -> Any:
    """``min(max(x, low), high)``; relu where low is 0, which fuses and trains everywhere."""
    x, dtype = call.inputs[0], call.dtype()
    bounds: list[Any]
    if call.opset < 11:
        bounds = [call.attributes.get("min"), call.attributes.get("max")]
    elif any(call.input(i) is not None and call.value(i) is None for i in (1, 2)):
        return _clip_at_run_time(call)
    else:
        bounds = [call.value(1), call.value(2)]
    low, high = (None if b is None or np.isnan(b) else np.asarray(b).item() for b in bounds)
    if low is not None:
        x = op.nn.relu(x) if low == 0 and _is_float(dtype) else op.maximum(x, const(low, dtype))
    return x if high is None else op.minimum(x, const(high, dtype))


def _clip_at_run_time(call: Call) -> Any:
    x = call.inputs[0]
    if call.input(1) is not None:
        x = op.maximum(x, call.inputs[1])
    return x if call.input(2) is None else op.minimum(x, call.inputs[2])


def _pairwise(operator: Any) -> Converter:
    """Combine inputs two by two; stacked scalars divide by zero in TVM's layout inference."""

    def convert(call: Call) -> Any:
        result = call.inputs[0]
        for operand in call.inputs[1:]:
            result = call.bb.normalize(operator(result, operand))
        return result

    return convert


def _thresholded_relu(call: Call) -> Any:
    """``x`` above alpha, else 0, also for infinities and NaN."""
    x, dtype = call.inputs[0], call.dtype()
    above = op.greater(x, const(call.attributes.get("alpha", 1.0), dtype))
    return op.where(call.bb.normalize(above), x, const(0, dtype))


def _hard_sigmoid(call: Call) -> Any:
    """``min(max(alpha x + beta, 0), 1)``."""
    alpha, beta = call.attributes.get("alpha", 0.2), call.attributes.get("beta", 0.5)
    return _hard(call.inputs[0], alpha, beta, call.dtype())


def _hard_swish(call: Call) -> Any:
    """``x hard_sigmoid(x)`` with alpha 1/6 and beta 1/2."""
    return op.multiply(call.inputs[0], _hard(call.inputs[0], 1 / 6, 0.5, call.dtype()))


def _hard(x: Any, alpha: float, beta: float, dtype: str) -> Any:
    line = op.add(op.multiply(x, const(alpha, dtype)), const(beta, dtype))
    return op.minimum(op.nn.relu(line), const(1, dtype))


def _pow(call: Call) -> Any:
    """Square by one product, square root; the exponent in the type of the base."""
    base, exponent = call.inputs[0], call.value(1)
    scalar = (
        exponent is not None and exponent.size == 1 and len(exponent.shape) <= len(call.shape())
    )
    power = float(exponent.reshape(-1)[0]) if exponent is not None and scalar else None
    if power == 1:
        return base
    if power == 2:
        return op.multiply(base, base)
    if power == 0.5 and _is_float(call.dtype()):
        return op.sqrt(base)
    if call.dtype(1) == call.dtype():
        return op.power(base, call.inputs[1])
    return op.power(base, op.astype(call.inputs[1], call.dtype()))


def _is_inf(call: Call) -> Any:
    x, dtype = call.inputs[0], call.dtype()
    negative = call.attributes.get("detect_negative", 1)
    positive = call.attributes.get("detect_positive", 1)
    if negative and positive:
        return op.isinf(x)
    if not negative and not positive:
        return op.zeros(call.shape(), "bool")
    return op.equal(x, const(np.inf if positive else -np.inf, dtype))


# ---------------------------------------------------------------- linear algebra


def _gemm(call: Call) -> Any:
    """``alpha A' B' + beta C``; constant operands are transposed and scaled here."""
    dtype = call.dtype()
    a, b = call.inputs[0], call.inputs[1]
    alpha, beta = (float(call.attributes.get(k, 1.0)) for k in ("alpha", "beta"))
    if call.attributes.get("transA", 0):
        a = op.permute_dims(a, [1, 0])
    weight = call.value(1)
    if weight is not None and _is_float(dtype):
        weight = weight.T if call.attributes.get("transB", 0) else weight
        if alpha != 1:
            weight = weight.astype(np.float64) * alpha
        b, alpha = const(np.ascontiguousarray(weight), dtype), 1.0
    elif call.attributes.get("transB", 0):
        b = op.permute_dims(b, [1, 0])
    result = op.matmul(a, b)
    if alpha != 1:
        result = op.multiply(result, const(alpha, dtype))
    bias = call.input(2)
    if bias is None or beta == 0:
        return result
    value = call.value(2)
    if beta != 1:
        scaled = None if value is None else const(value.astype(np.float64) * beta, dtype)
        bias = op.multiply(bias, const(beta, dtype)) if scaled is None else scaled
    return op.add(result, bias)


def _einsum(call: Call) -> Any:
    return op.einsum(list(call.inputs), call.attributes["equation"].replace(" ", ""))


# ---------------------------------------------------------------- normalization


def _layer_normalization(call: Call) -> Any:
    rank = len(call.shape())
    axis = call.axis(-1)
    normalized = call.shape()[axis:]
    if len(call.outputs) > 1 or call.shape(1) != normalized:
        return None
    bias = call.input(2)
    if bias is None:
        bias = const(np.zeros(normalized), call.dtype(1))
    elif call.shape(2) != normalized:
        return None
    epsilon = call.attributes.get("epsilon", 1e-5)
    return op.nn.layer_norm(
        call.inputs[0], call.inputs[1], bias, axes=list(range(axis, rank)), epsilon=epsilon
    )


def _batch_normalization(call: Call) -> Any:
    """Inference: ``(x - mean) / sqrt(variance + epsilon) * scale + bias`` along axis 1."""
    if any(call.dtype(i) != call.dtype() for i in range(5)):
        return None
    return relax.TupleGetItem(
        call.bb.emit(
            op.nn.batch_norm(
                *call.inputs[:5],
                axis=1,
                epsilon=call.attributes.get("epsilon", 1e-5),
                training=False,
            )
        ),
        0,
    )


CONVERTERS: Final[Mapping[str, Converter]] = {
    **DIVISIONS,
    **QUANTIZATION,
    **WINDOWS,
    "Attention": attention,
    "BatchNormalization": _batch_normalization,
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumsum,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "Elu": _elu,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Gemm": _gemm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _identity,
    "IsInf": _is_inf,
    "LayerNormalization": _layer_normalization,
    "Max": _pairwise(op.maximum),
    "Min": _pairwise(op.minimum),
    "Mish": _mish,
    "OneHot": _one_hot,
    "Pow": _pow,
    "Reshape": _reshape,
    "Resize": resize,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "ThresholdedRelu": _thresholded_relu,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
    "Upsample": resize,
}
"""By operator of the default domain."""
