"""How each operator carries the batch from its inputs to its output.

Used by `Rebatch`. The samples of a batch are the outermost factor of one axis of each tensor that
depends on an input. A rule returns that axis of the output and the new arguments; what has no
rule, or would mix samples, is an error that names the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import numpy as np
from tvm import relax
from tvm.ir import Op

from hone.errors import ModelError

from .batch_rules_of_levels import LEVEL_RULES, own_ops
from .dataflow import Dataflow, Rebuilder, layer_of, shape_of, variables, with_args

Rule = Callable[["BatchRules", relax.Var, relax.Call], tuple[int, list[relax.Expr]]]


class BatchRules:
    """The batch axis of every tensor seen so far.

    Parameters
    ----------
    graph : Dataflow
        The original function.
    builder : Rebuilder
        The copy being written; its parameters already have the new batch.
    batch : int
        The original batch.
    new_batch : int
        That of the copy: a multiple of the original one, or one of its divisors.
    """

    def __init__(self, graph: Dataflow, builder: Rebuilder, *, batch: int, new_batch: int) -> None:
        self._graph = graph
        self._builder = builder
        self._axes: dict[relax.Var, tuple[int | None, ...]] = dict.fromkeys(
            graph.function.params, (0,)
        )
        self.batch = batch
        self.new_batch = new_batch

    def scaled(self, extent: int) -> int:
        """Return the new extent of an axis whose outermost factor is the batch."""
        return extent * self.new_batch // self.batch

    def axes(self, var: relax.Var) -> tuple[int | None, ...]:
        """Return the batch axis of each field of a tuple (of the one tensor)."""
        return self._axes.get(var, (None,) * _fields(var))

    def axis(self, expr: relax.Expr) -> int | None:
        """Return the batch axis of a tensor, or None where it does not depend on the inputs."""
        return self.axes(expr)[0] if isinstance(expr, relax.Var) else None

    def reads(self, value: relax.Expr) -> bool:
        """Tell whether a value depends on the inputs."""
        return any(axis is not None for var in variables(value) for axis in self.axes(var))

    def follow(self, var: relax.Var, value: relax.Expr) -> None:
        """Carry the batch through a rename, a tuple or the choice from a tuple."""
        if isinstance(value, relax.Var):
            self._axes[var] = self.axes(value)
        elif isinstance(value, relax.Tuple):
            self._axes[var] = tuple(self.axis(field) for field in value.fields)
        elif isinstance(value, relax.TupleGetItem):
            self._axes[var] = (self.axes(value.tuple_value)[value.index],)

    def call(self, var: relax.Var, call: relax.Call) -> relax.Call:
        """Return the call with new arguments, and note the batch axis of its result."""
        rule = _RULES.get(call.op)
        if rule is None:
            name = call.op.name if isinstance(call.op, Op) else call.op
            raise self.error(var, f"no rule says how {name} carries the batch")
        axis, arguments = rule(self, var, call)
        fields = _fields(var)
        self._axes[var] = (
            (axis, *(None,) * (fields - 1)) if call.op in _FIRST_FIELD else (axis,) * fields
        )
        return with_args(call, arguments)

    def use(self, arguments: Iterable[relax.Expr]) -> list[relax.Expr]:
        """Return arguments with their variables replaced."""
        return [self._builder.use(argument) for argument in arguments]

    def tile(self, var: relax.Var, operand: relax.Expr, axis: int) -> relax.Expr:
        """Return a constant with as many samples along an axis as the new batch has."""
        value = self._graph.constant(operand)
        if value is None:
            raise self.error(var, "a tensor that does not depend on the inputs has a batch axis")
        if self.new_batch > self.batch:
            counts = [self.scaled(1) if dim == axis else 1 for dim in range(value.ndim)]
            return relax.const(np.tile(value, counts))
        kept, *others = np.split(value, self.batch // self.new_batch, axis)
        if not all(np.array_equal(kept, other) for other in others):
            raise self.error(var, "a constant differs from sample to sample")
        return relax.const(kept)

    def fields(self, operand: relax.Expr) -> list[relax.Expr]:
        """Return the fields of a tuple operand."""
        operand = self._graph.resolve(operand)
        return list(operand.fields) if isinstance(operand, relax.Tuple) else []

    def first(self, var: relax.Var, call: relax.Call) -> int:
        """Return the batch axis of the first argument, the only one that may have one."""
        axis = self.axis(call.args[0])
        if axis is None or any(self.reads(argument) for argument in call.args[1:]):
            raise self.error(var, "the batch reaches another operand than the data")
        return axis

    def error(self, var: relax.Var, message: str) -> ModelError:
        """Return the error of a layer."""
        return ModelError(message, where=layer_of(var))


def _fields(var: relax.Var) -> int:
    if isinstance(var.ty, relax.TupleType):
        return len(var.ty.fields)
    return int(isinstance(var.ty, relax.TensorType))


def _pointwise(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    return rules.first(var, call), rules.use(call.args)


def _elementwise(
    rules: BatchRules, var: relax.Var, call: relax.Call
) -> tuple[int, list[relax.Expr]]:
    rank = len(shape_of(var))
    operands = [(argument, rules.axis(argument)) for argument in call.args]
    found = {
        axis + rank - len(shape_of(argument)) for argument, axis in operands if axis is not None
    }
    if len(found) != 1:
        raise rules.error(var, "the batch is along different axes of its operands")
    (axis,) = found
    arguments = rules.use(call.args)
    for index, (argument, own) in enumerate(operands):
        shape = shape_of(argument)
        aligned = axis - (rank - len(shape))
        if own is None and aligned >= 0 and shape[aligned] != 1:
            arguments[index] = rules.tile(var, argument, aligned)
    return axis, arguments


def _spatial(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    attrs = call.attrs
    layout = str(attrs.data_layout if hasattr(attrs, "data_layout") else attrs.layout)
    out_layout = str(attrs.out_layout) if hasattr(attrs, "out_layout") else ""
    axis = rules.first(var, call)
    if layout.find("N") != axis:
        raise rules.error(var, f"the batch is along axis {axis} of the layout {layout}")
    return (out_layout or layout).index("N"), rules.use(call.args)


def _matmul(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    ranks = [len(shape_of(operand)) for operand in call.args]
    axes = [rules.axis(operand) for operand in call.args]
    # Counted from the right, where the operands' batch axes are aligned: -1 and -2 are the matrix.
    left, right = (
        None if axis is None else axis - rank for axis, rank in zip(axes, ranks, strict=True)
    )
    if min(ranks) < 2:
        raise rules.error(var, "a matmul of vectors is not followed")
    arguments = rules.use(call.args)
    if left is not None and right is not None:
        if left != right or left >= -2:
            raise rules.error(var, "a matmul would mix the samples of its two operands")
        return left + len(shape_of(var)), arguments
    mine, contracted, other = (left, -1, 1) if left is not None else (right, -2, 0)
    if mine is None or mine == contracted:
        raise rules.error(var, "a matmul would sum over the samples")
    if mine < -2 and ranks[other] >= -mine and shape_of(call.args[other])[mine] != 1:
        arguments[other] = rules.tile(var, call.args[other], mine + ranks[other])
    return mine + len(shape_of(var)), arguments


def _apart_from(
    rules: BatchRules, var: relax.Var, call: relax.Call
) -> tuple[int, list[relax.Expr]]:
    """Operators with an axis of their own, which must not be the batch's."""
    axis = rules.first(var, call)
    rank = len(shape_of(call.args[0]))
    own = call.attrs.axes if hasattr(call.attrs, "axes") else [call.attrs.axis]
    if axis in {int(dim) % rank for dim in own}:
        raise rules.error(var, "it works across the samples of the batch")
    return axis, rules.use(call.args)


def _reduction(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    axis = rules.first(var, call)
    rank = len(shape_of(call.args[0]))
    own = range(rank) if call.attrs.axis is None else call.attrs.axis
    reduced = {int(dim) % rank for dim in ([own] if isinstance(own, int) else own)}
    if axis in reduced:
        raise rules.error(var, "it reduces over the samples of the batch")
    return axis - _gone(call, reduced, axis), rules.use(call.args)


def _gone(call: relax.Call, reduced: set[int], axis: int) -> int:
    return 0 if call.attrs.keepdims else sum(dim < axis for dim in reduced)


def _concat(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    fields = rules.fields(call.args[0])
    found = {axis for field in fields if (axis := rules.axis(field)) is not None}
    own = 0 if call.attrs.axis is None else int(call.attrs.axis) % len(shape_of(var))
    if len(found) != 1 or own in found:
        raise rules.error(var, "it concatenates samples, or tensors with different batch axes")
    (axis,) = found
    used = rules.use(fields)
    tiled = [
        rules.tile(var, field, axis) if rules.axis(field) is None else new
        for field, new in zip(fields, used, strict=True)
    ]
    return axis, [relax.Tuple(tiled)]


def _reshape(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    """Place the batch where the extents before it have the same product."""
    axis = rules.first(var, call)
    old, new = shape_of(call.args[0]), shape_of(var)
    before = prod(old[:axis])
    places = [dim for dim in range(len(new)) if prod(new[:dim]) == before]
    fitting = [dim for dim in places if new[dim] % rules.batch == 0]
    if not fitting:
        raise rules.error(var, f"it splits the batch, {list(old)} → {list(new)}")
    # An axis that is the batch alone is better than one that holds more.
    place = min(fitting, key=lambda dim: (new[dim] != rules.batch, new[dim] != old[axis], dim))
    return place, [rules.use(call.args)[0], *_shape(rules, new, place)]


def _shape(rules: BatchRules, shape: tuple[int, ...], axis: int) -> list[relax.Expr]:
    extents = list(shape)
    extents[axis] = rules.scaled(extents[axis])
    return [relax.ShapeExpr(extents)]


def _broadcast(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    shape = shape_of(var)
    axis = rules.first(var, call) + len(shape) - len(shape_of(call.args[0]))
    return axis, [rules.use(call.args)[0], *_shape(rules, shape, axis)]


def _permute(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    rank = len(shape_of(var))
    axes = call.attrs.axes
    order = [*range(rank)][::-1] if axes is None else [int(dim) % rank for dim in axes]
    return order.index(rules.first(var, call)), rules.use(call.args)


def _squeeze(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    axis = rules.first(var, call)
    shape = shape_of(call.args[0])
    own = call.attrs.axis
    ones = [dim for dim, extent in enumerate(shape) if extent == 1]
    gone = ones if own is None else [int(dim) % len(shape) for dim in own]
    if axis in gone:
        raise rules.error(var, "it removes the batch axis")
    if own is None:
        raise rules.error(var, "a squeeze without axes depends on the batch")
    return axis - sum(dim < axis for dim in gone), rules.use(call.args)


def _expand_dims(
    rules: BatchRules, var: relax.Var, call: relax.Call
) -> tuple[int, list[relax.Expr]]:
    rank = len(shape_of(var))
    inserted = {int(dim) % rank for dim in call.attrs.axis}
    kept = [dim for dim in range(rank) if dim not in inserted]
    return kept[rules.first(var, call)], rules.use(call.args)


def _pad(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    axis = rules.first(var, call)
    if any(int(width) for width in list(call.attrs.pad_width)[2 * axis : 2 * axis + 2]):
        raise rules.error(var, "it pads the batch")
    return axis, rules.use(call.args)


def _slice(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    axis = rules.first(var, call)
    rank = len(shape_of(call.args[0]))
    if axis in {int(dim.value) % rank for dim in call.args[1].fields}:
        raise rules.error(var, "it takes some samples of the batch")
    return axis, rules.use(call.args)


def _take(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    data, indices = call.args
    if call.attrs.axis is None or (rules.reads(data) and rules.reads(indices)):
        raise rules.error(var, "it takes by indices that depend on the batch")
    own = int(call.attrs.axis) % len(shape_of(data))
    axis = rules.axis(data)
    if axis is None:
        return own + (rules.axis(indices) or 0), rules.use(call.args)
    if axis == own:
        raise rules.error(var, "it takes some samples of the batch")
    moved = len(shape_of(indices)) - 1 if axis > own else 0
    return axis + moved, rules.use(call.args)


def _ops(*names: str) -> tuple[Op, ...]:
    return tuple(Op.get(f"relax.{name}") for name in names)


# Their other results (running statistics) are per channel.
_FIRST_FIELD = frozenset(_ops("nn.batch_norm"))

_RULES: dict[Op, Rule] = {
    **dict.fromkeys(
        _ops(
            *("abs", "astype", "ceil", "clip", "cos", "erf", "exp", "floor", "log", "negative"),
            *("round", "rsqrt", "sigmoid", "sign", "sin", "sqrt", "square", "tanh", "trunc"),
            *("nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu", "nn.selu", "nn.silu"),
            *("nn.softplus", "isnan", "isinf", "logical_not"),
        ),
        _pointwise,
    ),
    **dict.fromkeys(own_ops("table_int8", "quantize", "dequantize", "binarize"), _pointwise),
    **LEVEL_RULES,
    **dict.fromkeys(
        _ops(
            *("add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "where"),
            *("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"),
            *("logical_and", "logical_or", "logical_xor", "mod", "floor_divide"),
        ),
        _elementwise,
    ),
    **dict.fromkeys(
        _ops(
            *(f"nn.conv{n}d" for n in (1, 2, 3)),
            *(f"nn.conv{n}d_transpose" for n in (1, 2, 3)),
            *(f"nn.max_pool{n}d" for n in (1, 2, 3)),
            *(f"nn.avg_pool{n}d" for n in (1, 2, 3)),
            *(f"nn.adaptive_avg_pool{n}d" for n in (1, 2, 3)),
            "image.resize2d",
        ),
        _spatial,
    ),
    **dict.fromkeys(
        _ops(
            *("nn.softmax", "nn.log_softmax", "nn.layer_norm", "nn.rms_norm", "nn.batch_norm"),
            *("nn.prelu", "split"),
        ),
        _apart_from,
    ),
    **dict.fromkeys(
        _ops("mean", "sum", "max", "min", "prod", "variance", "std", "argmax", "argmin"),
        _reduction,
    ),
    **dict.fromkeys(_ops("matmul"), _matmul),
    **dict.fromkeys(_ops("concat"), _concat),
    **dict.fromkeys(_ops("reshape"), _reshape),
    **dict.fromkeys(_ops("broadcast_to"), _broadcast),
    **dict.fromkeys(_ops("permute_dims"), _permute),
    **dict.fromkeys(_ops("squeeze"), _squeeze),
    **dict.fromkeys(_ops("expand_dims"), _expand_dims),
    **dict.fromkeys(_ops("nn.pad"), _pad),
    **dict.fromkeys(_ops("strided_slice"), _slice),
    **dict.fromkeys(_ops("take"), _take),
}
