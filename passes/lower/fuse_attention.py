"""Writes ``softmax(Q K^T scale + bias) V`` as one operator, transpositions of heads included.

Rewrites a ``relax.matmul`` of a float32 ``relax.nn.softmax`` along the last axis, whose argument is
what `attention_scores` reads, to ``hone.attention``, which `attention` lowers. Q, K and V are read
where they lie: a chain of reshapes, permutations, splits and scalings is taken back to a slice of
heads of one tensor wherever strides can express it, and heads of keys that are repeated for several
of queries are read in their place. Runs on a lowered-to-be module before legalization. Numerics:
divisions by constants become multiplications; sums may be taken in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import Dataflow, Rebuilder, is_dataflow, shape_of
from hone.targets.schedule.machine import Machine

from .attention import choose_blocks
from .attention_operator import Attention
from .attention_scores import (
    Scores,
    cover_over,
    factor_of,
    mask_over,
    product_of,
    read_scores,
)

_MATMUL = Op.get("relax.matmul")
_SOFTMAX = Op.get("relax.nn.softmax")
_MULTIPLY = Op.get("relax.multiply")
_DIVIDE = Op.get("relax.divide")
_PERMUTE = Op.get("relax.permute_dims")
_RESHAPE = Op.get("relax.reshape")
_SPLIT = Op.get("relax.split")
_BROADCAST = Op.get("relax.broadcast_to")

HEADS_BEHIND_ROWS = [0, 2, 1, 3]


@dataclass(frozen=True, kw_only=True)
class _Match:
    """The parts of a match; values ``[B, H, S, C]`` or without heads."""

    scores: Scores
    value: relax.Expr


@dataclass(frozen=True, kw_only=True, eq=False)
class _View:
    """An expression as a view of another one's memory, and as a permutation of one that is nearer.

    Parameters
    ----------
    base : relax.Expr
        What lies in memory.
    memory, array : ndarray
        In its place, and the view of it; only addresses mean anything.
    factor : float
        The expression is the view times this.
    repeated : bool
        Each head of the view, ``[B, G, S, D]`` in some order, stands for several.
    near : relax.Expr
        Of which the expression is a permutation; ``[B, G, 1, S, D]`` where heads are repeated.
    order : tuple of int
        The permutation.
    rest : float
        The expression is the permutation times this.
    """

    base: relax.Expr
    memory: np.ndarray
    array: np.ndarray
    near: relax.Expr
    order: tuple[int, ...]
    factor: float = 1.0
    repeated: bool = False
    rest: float = 1.0

    @classmethod
    def whole(cls, expr: relax.Expr) -> _View:
        """Return the view of an expression that is its own memory."""
        memory = np.empty(shape_of(expr), np.int8)
        order = tuple(range(memory.ndim))
        return cls(base=expr, memory=memory, array=memory, near=expr, order=order)

    @property
    def groups(self) -> int:
        """How many heads the view has; 0 where what is repeated did not stay the heads."""
        if self.repeated and self.order[:2] != (0, 1):
            return 0
        return self.array.shape[1] if self.repeated or self.array.ndim == 4 else 1

    @property
    def is_scaled(self) -> bool:
        """Whether the expression is the view, or the permutation, times another number than 1."""
        return self.factor != 1 or self.rest != 1

    def stepped(self, expr: relax.Expr, array: np.ndarray) -> _View:
        """Return the view of an expression of other axes."""
        return replace(self, array=array, near=expr, order=tuple(range(array.ndim)), rest=1.0)

    def permuted(self, axes: Sequence[int]) -> _View:
        """Return the view with its axes in another order."""
        order = tuple(self.order[axis] for axis in axes)
        return replace(self, array=self.array.transpose(axes), order=order)

    def scaled(self, factor: float) -> _View:
        """Return the view times a number."""
        return replace(self, factor=self.factor * factor, rest=self.rest * factor)


def _match(graph: Dataflow, call: relax.Call | None, machine: Machine) -> _Match | None:
    outer = None if call is None else product_of(graph, call)
    if outer is None or not isinstance(outer.args[0], relax.Var):
        return None
    softmax = graph.call(outer.args[0], _SOFTMAX)
    if softmax is None or not graph.used_once(outer.args[0]):
        return None
    shape = shape_of(softmax)
    if int(softmax.attrs.axis) % len(shape) != len(shape) - 1:
        return None
    scores = read_scores(graph, softmax.args[0])
    if scores is None or shape_of(scores.product) != shape:
        return None
    channels, depth = shape_of(outer)[-1], shape_of(scores.product.args[0])[-1]
    if not choose_blocks(machine, rows=shape[-2], keys=shape[-1], depth=depth, channels=channels):
        return None
    if scores.bias is not None and str(scores.bias.ty.dtype) != "float32":
        return None
    return _Match(scores=scores, value=outer.args[1])


def _step(view: np.ndarray, call: relax.Call, index: int) -> np.ndarray | None:
    """Return what a split or reshape makes of a view, None where it would move elements."""
    if call.op.same_as(_SPLIT):
        sections = call.attrs.indices_or_sections
        parts = int(sections) if isinstance(sections, tvm.tirx.IntImm) else None
        cuts = parts if parts is not None else [int(cut) for cut in sections]
        return np.split(view, cuts, axis=int(call.attrs.axis))[index]
    moved = view.reshape(shape_of(call))
    return moved if np.may_share_memory(moved, view) else None


def _repeated(graph: Dataflow, call: relax.Call) -> relax.Expr | None:
    """Return ``[B, G, 1, S, D]`` of which a call makes ``[B, r G, S, D]``, each head r times."""
    source = graph.call(call.args[0], _BROADCAST) if call.op.same_as(_RESHAPE) else None
    if source is None:
        return None
    before, wide, after = shape_of(source.args[0]), shape_of(source), shape_of(call)
    if len(before) != 5 or before[2] != 1 or before != (*wide[:2], 1, *wide[3:]):
        return None
    return source.args[0] if after == (wide[0], wide[1] * wide[2], *wide[3:]) else None


def _view(graph: Dataflow, expr: relax.Expr) -> _View:
    """Take an expression back through operators that only look at memory differently, or scale."""
    value = graph.definition.get(expr) if isinstance(expr, relax.Var) else None
    index = 0
    if isinstance(value, relax.TupleGetItem):
        index, value = int(value.index), graph.call(value.tuple_value, _SPLIT)
    if not isinstance(value, relax.Call):
        return _View.whole(expr)
    if value.op.same_as(_MULTIPLY) or value.op.same_as(_DIVIDE):
        scaled = factor_of(graph, value)
        if scaled is not None and shape_of(scaled[0]) == shape_of(expr):
            return _view(graph, scaled[0]).scaled(scaled[1])
    elif value.op.same_as(_PERMUTE):
        axes = value.attrs.axes
        axes = range(len(shape_of(expr)))[::-1] if axes is None else [int(axis) for axis in axes]
        return _view(graph, value.args[0]).permuted(axes)
    repeated = _repeated(graph, value)
    if repeated is not None:
        view = _view(graph, repeated)
        if not view.repeated:
            view = view.stepped(repeated, view.array[:, :, 0])
            return replace(view, repeated=True)
    if value.op.same_as(_RESHAPE) or value.op.same_as(_SPLIT):
        view = _view(graph, value.args[0])
        stepped = None if view.repeated else _step(view.array, value, index)
        if stepped is not None:
            return view.stepped(expr, stepped)
    return _View.whole(expr)


def _slice_of_heads(
    builder: Rebuilder, view: _View, axes: tuple[int, ...], name: str
) -> relax.Expr | None:
    """Return a view as ``[B, rows, H, D]``, None where strides cannot express it."""
    array = view.array[:, None] if view.array.ndim == 3 else view.array
    array = array.transpose(axes)
    batch, rows, heads, depth = array.shape
    over_batch, over_rows, over_heads, over_depth = array.strides
    memory = view.memory
    first = array.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
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
    if not fits or begin + (heads - 1) * step >= over_rows // depth:
        return None
    all_heads = over_rows // depth
    operand = builder.use(view.base)
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


def _rows_of_heads(
    builder: Rebuilder, view: _View, axes: tuple[int, ...], name: str
) -> tuple[relax.Expr, float]:
    """Return an operand as ``[B, rows, H, D]``, read where it lies if that can be expressed.

    Parameters
    ----------
    builder : Rebuilder
        Takes the bindings.
    view : _View
        Of the operand, ``[B, H, ., .]`` or ``[B, ., .]``; heads that stand for several stay so.
    axes : tuple of int
        Where batch, rows, heads and depth are, once heads are an axis.
    name : str
        Of the new bindings.

    Returns
    -------
    tuple
        The operand, and what it is still to be multiplied with.
    """
    found = _slice_of_heads(builder, view, axes, name)
    if found is not None:
        return found, view.factor
    order, shape = view.order, shape_of(view.near)
    if len(order) == 3:
        order = (0, 1, *(axis + 1 for axis in order[1:]))
    operand = builder.use(view.near)
    if len(shape) != 4:
        # One head that stands for several, or none.
        shape = (*shape[:2], *shape[3:]) if view.repeated else (shape[0], 1, *shape[1:])
        operand = builder.emit(relax.op.reshape(operand, shape), f"{name}_heads")
    permuted = relax.op.permute_dims(operand, [order[axis] for axis in axes])
    return builder.emit(permuted, f"{name}_rows"), view.rest


def _emit(graph: Dataflow, builder: Rebuilder, match: _Match, name: str) -> relax.Expr:
    """Append the operator's operands and return its call, ``[B, M, H, C]``."""
    scores = match.scores
    rows_first = (0, 2, 1, 3)
    left, right = scores.product.args
    of_query, of_key, of_value = (_view(graph, expr) for expr in (left, right, match.value))
    if of_query.repeated or of_query.order[0] != 0:
        of_query = _View.whole(left)
    if not of_key.groups == of_value.groups > 0 or (of_value.repeated and of_value.is_scaled):
        of_key, of_value = _View.whole(right), _View.whole(match.value)
    if of_key.order[0] != 0:
        of_key = _View.whole(right)
    if of_value.is_scaled or of_value.order[0] != 0:
        of_value = _View.whole(match.value)
    query, by_query = _rows_of_heads(builder, of_query, rows_first, f"{name}_query")
    key, by_key = _rows_of_heads(builder, of_key, (0, 3, 1, 2), f"{name}_key")
    value, _ = _rows_of_heads(builder, of_value, rows_first, f"{name}_value")
    shape = shape_of(scores.product)
    bias = cover = None
    if scores.bias is not None:
        bias = mask_over(builder, scores.bias, shape, f"{name}_bias")
    if scores.cover is not None:
        cover = cover_over(builder, scores.cover, shape, f"{name}_cover")
    return Attention(
        query=query,
        key=key,
        value=value,
        scale=scores.scale * by_query * by_key,
        cap=scores.cap,
        bias=bias,
        cover=cover,
        fill=-math.inf if scores.cover is None else scores.cover.fill,
        cover_first=scores.cover_first,
        causal=scores.causal,
    ).call()


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
