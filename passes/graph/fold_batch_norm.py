"""Folds inference batch norm into the convolution or matmul before it.

Rewrites ``relax.nn.batch_norm`` on its own, after conv or matmul, or after conv or matmul + bias.
Runs on the imported module, before pruning, quantization and layout changes; afterwards no
inference batch norm is left: one that cannot be folded is a multiply and an add per channel.
Numerics: exact up to rounding (the scale is computed in float64, then rounded once per weight).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from .dataflow import Dataflow, Rebuilder, is_dataflow, layer_of, part_of, shape_of, with_args

BATCH_NORMALIZED = "hone.batch_normalized"
"""Attribute of a function: the layers whose results a batch norm, folded since, normalized."""
_BATCH_NORM = tvm.ir.Op.get("relax.nn.batch_norm")
_ADD = tvm.ir.Op.get("relax.add")
_MATMUL = tvm.ir.Op.get("relax.matmul")
_CONVOLUTIONS = tuple(tvm.ir.Op.get(f"relax.nn.conv{n}d") for n in (1, 2, 3))
_TRANSPOSED = tuple(tvm.ir.Op.get(f"relax.nn.conv{n}d_transpose") for n in (1, 2, 3))


@relax.transform.function_pass(opt_level=0)
class FoldBatchNorm:
    """Scale the weights and set the bias of the layer before each batch norm.

    ``y = gamma * (conv(x, w) + b - mean) / sqrt(var + epsilon) + beta`` becomes
    ``conv(x, w * s) + ((b - mean) * s + beta)`` with ``s = gamma / sqrt(var + epsilon)``
    (Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3.2).
    With gamma 2, var 3.99, epsilon 0.01, a weight of 0.5 becomes 0.5.

    The folded result keeps the layer id of the convolution; the batch norm's id disappears. A
    batch norm in training mode stays as it is.
    """

    def transform_function(
        self, function: relax.Function, _module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> relax.Function:
        """Return the function without inference batch norm, or the very same function."""
        if not is_dataflow(function):
            return function
        graph = Dataflow(function)
        norms = [
            binding.var
            for binding in graph.bindings
            if (call := graph.call(binding.var, _BATCH_NORM)) is not None
            and not call.attrs.training
        ]
        if not norms:
            return function
        result = _rewrite(graph, norms)
        before = result.attrs.get(BATCH_NORMALIZED, ()) if result.attrs else ()
        layers = {*map(str, before), *_normalized_layers(graph, norms)}
        return result.with_attr(BATCH_NORMALIZED, sorted(layers))


def _normalized_layers(graph: Dataflow, norms: list[relax.Var]) -> Iterator[str]:
    """Yield the layers that stand for batch norms once they are folded."""
    for norm in norms:
        fold = _fold(graph, norm)
        if fold is None:
            yield from (layer_of(user) for user in graph.users.get(norm, ()) if user is not None)
        else:
            yield layer_of(fold.linear)
            if fold.bias is not None:
                yield layer_of(fold.bias)


@dataclass(frozen=True, kw_only=True)
class _Fold:
    """One batch norm that can be folded: the variables of its chain and the new constants."""

    linear: relax.Var
    bias: relax.Var | None
    weight: np.ndarray
    shift: np.ndarray


def _rewrite(graph: Dataflow, norms: list[relax.Var]) -> relax.Function:
    folds = {norm: _fold(graph, norm) for norm in norms}
    found = [fold for fold in folds.values() if fold is not None]
    by_linear = {fold.linear: fold for fold in found}
    by_bias = {fold.bias: fold for fold in found if fold.bias is not None}
    builder = Rebuilder(graph.function)
    applied: dict[relax.Var, relax.Expr] = {}
    for binding in graph.bindings:
        var, value = binding.var, binding.value
        if var in by_linear:
            fold = by_linear[var]
            call = with_args(value, [builder.use(value.args[0]), relax.const(fold.weight)])
            if fold.bias is None:
                linear = builder.emit(call, part_of(var.name, call.op))
                shifted = builder.emit(relax.op.add(linear, relax.const(fold.shift)), var.name)
                builder.replace(var, shifted)
            else:
                builder.bind(var, call)
        elif var in by_bias:
            fold = by_bias[var]
            builder.bind(var, relax.op.add(builder.use(fold.linear), relax.const(fold.shift)))
        elif var in folds:
            if folds[var] is None:
                applied[var] = _apply(graph, builder, value, _result_name(graph, var))
            else:
                applied[var] = builder.use(value.args[0])
        elif isinstance(value, relax.TupleGetItem) and value.tuple_value in folds:
            # In inference the running mean and variance are returned as they came.
            norm = value.tuple_value
            result = (
                applied[norm]
                if value.index == 0
                else builder.use(graph.definition[norm].args[2 + value.index])
            )
            if isinstance(var, relax.DataflowVar):
                builder.replace(var, result)
            else:
                builder.bind(var, result)
        else:
            builder.copy(binding)
    return builder.finish()


def _fold(graph: Dataflow, norm: relax.Var) -> _Fold | None:
    """Return how to fold one batch norm, or None where any condition does not hold."""
    call = graph.definition[norm]
    data = call.args[0]
    axis = int(call.attrs.axis) % len(shape_of(data))
    affine = _scale_and_shift(graph, call)
    if affine is None or not isinstance(data, relax.Var) or not graph.used_once(data):
        return None
    scale, shift = affine

    bias: relax.Var | None = None
    offset: np.ndarray | float = 0.0
    add = graph.call(data, _ADD)
    if add is not None:
        found = _bias(graph, add, axis, scale.size)
        if found is None:
            return None
        bias, (data, offset) = data, found
        if not graph.used_once(data):
            return None

    linear = graph.call(data)
    if linear is None:
        return None
    weight = graph.constant(linear.args[1]) if len(linear.args) == 2 else None
    if weight is None or weight.dtype.kind != "f":
        return None
    output = _output_axis(linear, len(shape_of(data)), weight.ndim)
    if output is None or output.result != axis or weight.shape[output.weight] != scale.size:
        return None
    dtype = data.ty.dtype
    return _Fold(
        linear=data,
        bias=bias,
        weight=(weight * _along(scale, output.weight, weight.ndim)).astype(weight.dtype),
        shift=_along(offset * scale + shift, axis, len(shape_of(data))).astype(str(dtype)),
    )


def _scale_and_shift(graph: Dataflow, call: relax.Call) -> tuple[np.ndarray, np.ndarray] | None:
    """Return s and t of ``y = x * s + t`` in float64, [C] each, or None if they are not known."""
    values = [graph.constant(argument) for argument in call.args[1:]]
    if any(value is None for value in values):
        return None
    gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in values)
    scale = 1.0 / np.sqrt(variance + float(call.attrs.epsilon))
    if call.attrs.scale:
        scale = scale * gamma
    shift = -mean * scale
    return scale, shift + beta if call.attrs.center else shift


def _bias(
    graph: Dataflow, add: relax.Call, axis: int, channels: int
) -> tuple[relax.Var, np.ndarray] | None:
    """Return the variable and the constant, as float64 [C] or [1], of a per-channel add."""
    rank = len(shape_of(add))
    for data, other in (tuple(add.args), tuple(add.args)[::-1]):
        value = graph.constant(other)
        if value is None or not isinstance(data, relax.Var) or graph.constant(data) is not None:
            continue
        shape = (1,) * (rank - value.ndim) + value.shape
        if len(shape_of(data)) == rank and all(
            extent == 1 or (dim == axis and extent == channels) for dim, extent in enumerate(shape)
        ):
            return data, value.astype(np.float64).reshape(-1)
    return None


@dataclass(frozen=True, kw_only=True)
class _OutputAxis:
    """Which axis of the result, and which of the weight, is the output channel."""

    result: int
    weight: int


def _output_axis(call: relax.Call, rank: int, weight_rank: int) -> _OutputAxis | None:
    if call.op.same_as(_MATMUL):
        # A weight of three or more axes is batched: it has no single output channel axis.
        return _OutputAxis(result=rank - 1, weight=1) if weight_rank == 2 else None
    transposed = any(call.op.same_as(op) for op in _TRANSPOSED)
    if not transposed and not any(call.op.same_as(op) for op in _CONVOLUTIONS):
        return None
    if transposed and int(call.attrs.groups) != 1:
        return None  # its O axis counts the channels of one group only
    layout = str(call.attrs.out_layout) or str(call.attrs.data_layout)
    kernel = str(call.attrs.kernel_layout)
    if len(layout) != rank or len(kernel) != weight_rank:
        return None  # packed, such as NCHW16c
    return _OutputAxis(result=layout.index("C"), weight=kernel.index("O"))


def _apply(graph: Dataflow, builder: Rebuilder, call: relax.Call, name: str) -> relax.Var:
    """Emit a batch norm as a multiply and an add per channel."""

    def emit(value: relax.Call) -> relax.Var:
        return builder.emit(value, part_of(name, value.op))

    data = builder.use(call.args[0])
    rank = len(shape_of(data))
    axis = int(call.attrs.axis) % rank
    affine = _scale_and_shift(graph, call)
    if affine is not None:
        dtype = str(data.ty.dtype)
        scale, shift = (relax.const(_along(part, axis, rank).astype(dtype)) for part in affine)
    else:
        gamma, beta, mean, variance = (builder.use(argument) for argument in call.args[1:])
        epsilon = relax.const(float(call.attrs.epsilon), str(variance.ty.dtype))
        scale = emit(relax.op.rsqrt(emit(relax.op.add(variance, epsilon))))
        if call.attrs.scale:
            scale = emit(relax.op.multiply(scale, gamma))
        shift = emit(relax.op.negative(emit(relax.op.multiply(mean, scale))))
        if call.attrs.center:
            shift = emit(relax.op.add(shift, beta))
        extents = [-1 if dim == axis else 1 for dim in range(rank)]
        scale, shift = (emit(relax.op.reshape(part, extents)) for part in (scale, shift))
    return builder.emit(relax.op.add(emit(relax.op.multiply(data, scale)), shift), name)


def _result_name(graph: Dataflow, norm: relax.Var) -> str:
    """Return the layer id of a batch norm: the name of its first result."""
    for user in graph.users.get(norm, []):
        value = graph.definition.get(user)
        if isinstance(value, relax.TupleGetItem) and value.index == 0:
            return layer_of(user)
    return layer_of(norm)


def _along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return values.reshape([-1 if dim == axis else 1 for dim in range(rank)])
