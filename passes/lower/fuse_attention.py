"""Writes ``softmax(Q K^T scale + bias) V`` as one operator, transpositions of heads included.

Rewrites a ``relax.matmul`` of a float32 ``relax.nn.softmax`` along the last axis, whose argument is
a product of two activations, scaled by constants and then added to a bias, in that order, to
``relax.nn.attention``, which `attention` lowers. Q, K and V are read where they lie: a chain of
reshapes, permutations and splits is taken back to a slice of heads of one tensor wherever strides
can express it. Runs on a lowered-to-be module before legalization. Numerics: divisions by constants
become multiplications; sums may be taken in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import Dataflow, Rebuilder, is_dataflow, shape_of
from hone.targets.schedule.machine import Machine

from .attention import choose_blocks

_MATMUL = Op.get("relax.matmul")
_SOFTMAX = Op.get("relax.nn.softmax")
_ADD = Op.get("relax.add")
_MULTIPLY = Op.get("relax.multiply")
_DIVIDE = Op.get("relax.divide")
_PERMUTE = Op.get("relax.permute_dims")
_RESHAPE = Op.get("relax.reshape")
_SPLIT = Op.get("relax.split")

HEADS_BEHIND_ROWS = [0, 2, 1, 3]


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """The parts of a match; shapes ``[B, H, M, D]``, ``[B, H, D, S]`` and ``[B, H, S, D]``."""

    query: relax.Expr
    key: relax.Expr
    value: relax.Expr
    scale: float
    bias: relax.Expr | None


def _scalar(graph: Dataflow, expr: relax.Expr) -> float | None:
    value = graph.constant(expr)
    return float(value.reshape(())) if value is not None and value.size == 1 else None


def _product(graph: Dataflow, expr: relax.Expr) -> relax.Call | None:
    """Return the float32 product, of equal leading axes, that defines an expression."""
    call = graph.call(expr, _MATMUL)
    if call is None or any(str(e.ty.dtype) != "float32" for e in (call, *call.args)):
        return None
    left, right = (shape_of(argument) for argument in call.args)
    fit = len(left) == len(right) in (3, 4) and left[:-2] == right[:-2]
    return call if fit else None


def _scores(
    graph: Dataflow, expr: relax.Expr
) -> tuple[relax.Call, float, relax.Expr | None] | None:
    """Return product, scale and bias of what is softmaxed; every step must be used once."""
    if not isinstance(expr, relax.Var) or not graph.used_once(expr):
        return None
    product = _product(graph, expr)
    if product is not None:
        return product, 1.0, None
    call = graph.call(expr)
    if call is None or not any(call.op.same_as(op) for op in (_ADD, _MULTIPLY, _DIVIDE)):
        return None
    left, right = call.args
    orders = [(left, right)] if call.op.same_as(_DIVIDE) else [(left, right), (right, left)]
    for data, other in orders:
        found = _scores(graph, data) if shape_of(data) == shape_of(call) else None
        if found is None or found[2] is not None:
            continue
        product, scale, _ = found
        number = _scalar(graph, other)
        if call.op.same_as(_ADD):
            return product, scale, other
        if call.op.same_as(_MULTIPLY) and number is not None:
            return product, scale * number, None
        if call.op.same_as(_DIVIDE) and number:
            return product, scale / number, None
    return None


def _match(graph: Dataflow, call: relax.Call | None, machine: Machine) -> _Attention | None:
    outer = None if call is None else _product(graph, call)
    if outer is None or not isinstance(outer.args[0], relax.Var):
        return None
    softmax = graph.call(outer.args[0], _SOFTMAX)
    if softmax is None or not graph.used_once(outer.args[0]):
        return None
    shape = shape_of(softmax)
    if int(softmax.attrs.axis) % len(shape) != len(shape) - 1:
        return None
    found = _scores(graph, softmax.args[0])
    if found is None:
        return None
    product, scale, bias = found
    query, key = product.args
    channels = shape_of(outer)[-1]
    depth = shape_of(query)[-1]
    if shape_of(product) != shape or depth != channels:
        return None
    if not choose_blocks(machine, rows=shape[-2], keys=shape[-1], depth=depth, channels=channels):
        return None
    if bias is not None and (str(bias.ty.dtype) != "float32" or shape_of(bias)[-1:] != shape[-1:]):
        return None
    return _Attention(query=query, key=key, value=outer.args[1], scale=scale, bias=bias)


def _step(view: np.ndarray, call: relax.Call, index: int) -> np.ndarray | None:
    """Return what an operator makes of a view of memory, None where it would move elements."""
    if call.op.same_as(_PERMUTE):
        axes = call.attrs.axes
        return view.transpose(None if axes is None else [int(axis) for axis in axes])
    if call.op.same_as(_SPLIT):
        sections = call.attrs.indices_or_sections
        parts = int(sections) if isinstance(sections, tvm.tirx.IntImm) else None
        cuts = parts if parts is not None else [int(cut) for cut in sections]
        return np.split(view, cuts, axis=int(call.attrs.axis))[index]
    moved = view.reshape(shape_of(call))
    return moved if np.may_share_memory(moved, view) else None


def _view(graph: Dataflow, expr: relax.Expr) -> tuple[relax.Expr, np.ndarray, np.ndarray]:
    """Take an expression back through operators that only look at memory differently.

    Returns
    -------
    tuple
        The expression that lies in memory, an array in its place, and the view of it; of the
        arrays only the addresses mean anything.
    """
    value = graph.definition.get(expr) if isinstance(expr, relax.Var) else None
    index = 0
    if isinstance(value, relax.TupleGetItem):
        index, value = int(value.index), graph.call(value.tuple_value, _SPLIT)
    if isinstance(value, relax.Call) and any(
        value.op.same_as(op) for op in (_PERMUTE, _RESHAPE, _SPLIT)
    ):
        base, memory, view = _view(graph, value.args[0])
        stepped = _step(view, value, index)
        if stepped is not None:
            return base, memory, stepped
    memory = np.empty(shape_of(expr), np.int8)
    return expr, memory, memory


def _rows_of_heads(
    graph: Dataflow, builder: Rebuilder, expr: relax.Expr, axes: tuple[int, ...], name: str
) -> relax.Expr:
    """Return an operand as ``[B, rows, H, D]``, read where it lies if that can be expressed.

    Parameters
    ----------
    graph, builder : Dataflow, Rebuilder
        Before and after.
    expr : relax.Expr
        ``[B, H, ., .]`` or ``[B, ., .]``.
    axes : tuple of int
        Where batch, rows, heads and depth are, once heads are an axis.
    name : str
        Of the new bindings.
    """
    base, memory, view = _view(graph, expr)
    if view.ndim == 3:
        view = view[:, None]
    view = view.transpose(axes)
    batch, rows, heads, depth = view.shape
    over_batch, over_rows, over_heads, over_depth = view.strides
    first = view.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    fits = (
        over_depth == 1
        and over_rows % depth == 0
        and over_rows > 0
        and (heads == 1 or (over_heads > 0 and over_heads % depth == 0))
        and first % depth == 0
        and (batch == 1 or over_batch == rows * over_rows)
        and memory.size == batch * rows * over_rows
    )
    step = over_heads // depth if heads > 1 else 1
    begin = first // depth
    if fits and begin + (heads - 1) * step < over_rows // depth:
        all_heads = over_rows // depth
        operand = builder.use(base)
        if shape_of(operand) != (batch, rows, all_heads, depth):
            operand = builder.emit(
                relax.op.reshape(operand, (batch, rows, all_heads, depth)), f"{name}_heads"
            )
        if (begin, step, all_heads) == (0, 1, heads):
            return operand
        end = begin + (heads - 1) * step + 1
        return builder.emit(
            relax.op.strided_slice(operand, axes=[2], begin=[begin], end=[end], strides=[step]),
            f"{name}_slice",
        )
    operand = builder.use(expr)
    shape = shape_of(expr)
    if len(shape) == 3:
        shape = (shape[0], 1, *shape[1:])
        operand = builder.emit(relax.op.reshape(operand, shape), f"{name}_heads")
    return builder.emit(relax.op.permute_dims(operand, list(axes)), f"{name}_rows")


def _bias(builder: Rebuilder, bias: relax.Expr, shape: tuple[int, ...], name: str) -> relax.Expr:
    """Return the bias with the axes of ``[B, H, M, S]``, of which all but the last may be 1."""
    own = shape_of(bias)
    padded = (1,) * (len(shape) - len(own)) + own
    if len(shape) == 3:
        padded = (padded[0], 1, *padded[1:])
    operand = builder.use(bias)
    return operand if own == padded else builder.emit(relax.op.reshape(operand, padded), name)


def _emit(graph: Dataflow, builder: Rebuilder, match: _Attention, name: str) -> relax.Expr:
    """Append the operator's operands and return its call, ``[B, M, H, D]``."""
    rows_first = (0, 2, 1, 3)
    query = _rows_of_heads(graph, builder, match.query, rows_first, f"{name}_query")
    key = _rows_of_heads(graph, builder, match.key, (0, 3, 1, 2), f"{name}_key")
    value = _rows_of_heads(graph, builder, match.value, rows_first, f"{name}_value")
    bias = None
    if match.bias is not None:
        scores = (*shape_of(match.query)[:-1], shape_of(match.key)[-1])
        bias = _bias(builder, match.bias, scores, f"{name}_bias")
    return relax.op.nn.attention(query, key, value, bias=bias, scale=match.scale)


@relax.transform.function_pass(opt_level=0)
class FuseAttention:
    """Find attention in a dataflow function.

    Parameters
    ----------
    machine : Machine
        Says what the kernel can take.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def transform_function(
        self, function: relax.Function, _module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> relax.Function:
        """Return the function with its attention fused, or the very same function."""
        if not is_dataflow(function):
            return function
        graph = Dataflow(function)
        builder = Rebuilder(function)
        found = False
        for binding in graph.bindings:
            call = graph.call(binding.var)
            behind = self._permuted(graph, call)
            match = _match(graph, call if behind is None else behind, self._machine)
            if match is None:
                builder.copy(binding)
                continue
            found = True
            result = _emit(graph, builder, match, str(binding.var.name))
            if behind is None:
                shape = shape_of(binding.var)
                rows = builder.emit(result, f"{binding.var.name}_rows")
                result = relax.op.permute_dims(rows, HEADS_BEHIND_ROWS)
                if len(shape) == 3:
                    result = relax.op.reshape(rows, shape)
            builder.bind(binding.var, result)
        return builder.finish() if found else function

    def _permuted(self, graph: Dataflow, call: relax.Call | None) -> relax.Call | None:
        """Return the product whose heads a permutation puts behind the rows."""
        if call is None or not call.op.same_as(_PERMUTE) or call.attrs.axes is None:
            return None
        if [int(axis) for axis in call.attrs.axes] != HEADS_BEHIND_ROWS:
            return None
        source = call.args[0]
        if not isinstance(source, relax.Var) or not graph.used_once(source):
            return None
        return graph.call(source, _MATMUL)
