"""Makes one product of the projections that an attention reads, where they share their input.

Rewrites ``hone.attention`` of ``x Wq + bq``, ``x Wk + bk`` and ``x Wv + bv`` (or two of the three),
constant weights in float32, to heads of ``x [Wq Wk Wv] + [bq bk bv]``: one kernel reads x, and
attention reads its heads where they lie. Where all have as many heads, those of one number are
neighbours, so that threads which share the columns share the heads. Runs behind `FuseAttention`.
Numerics: sums may be taken in another order, and by products of sums where those of the single
projections were not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import Dataflow, Rebuilder, is_dataflow, shape_of

from .anchors import is_constant
from .attention_operator import NAME

_ATTENTION = Op.get(NAME)
_MATMUL = Op.get("relax.matmul")
_ADD = Op.get("relax.add")
_RESHAPE = Op.get("relax.reshape")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Projection:
    """A product that one operand of an attention is, ``[B, rows, heads, depth]``.

    Parameters
    ----------
    operand : relax.Var
        What attention reads.
    result : relax.Var
        The projection behind its bias, if it has one.
    product : relax.Var
        The matrix product.
    data : relax.Var
        Its input.
    weight, bias : ndarray
        ``[C, heads depth]`` and ``[heads depth]``.
    """

    operand: relax.Var
    result: relax.Var
    product: relax.Var
    data: relax.Var
    weight: np.ndarray
    bias: np.ndarray | None


def _projection(graph: Dataflow, operand: relax.Expr) -> _Projection | None:
    reshape = graph.call(operand, _RESHAPE)
    if reshape is None or not isinstance(operand, relax.Var) or not graph.used_once(operand):
        return None
    result = product = reshape.args[0]
    if not isinstance(result, relax.Var) or not graph.used_once(result):
        return None
    shape, bias = shape_of(result), None
    added = graph.call(result, _ADD)
    if added is not None:
        pairs = ((added.args[0], added.args[1]), (added.args[1], added.args[0]))
        found = [(data, graph.constant(other)) for data, other in pairs]
        product, bias = next(((d, b) for d, b in found if b is not None), (None, None))
        if bias is None or bias.shape[-1:] != shape[-1:] or bias.size != shape[-1]:
            return None
        if not isinstance(product, relax.Var) or not graph.used_once(product):
            return None
    call = graph.call(product, _MATMUL)
    if call is None or shape_of(call) != shape or len(shape) != 3:
        return None
    data, weight = call.args
    fits = (
        isinstance(data, relax.Var)
        and is_constant(weight)
        and len(shape_of(weight)) == 2
        and all(str(e.ty.dtype) == "float32" for e in (data, weight, call))
        # The heads are columns of the product, not some of its rows.
        and shape_of(reshape)[:2] == shape[:2]
    )
    if not fits:
        return None
    return _Projection(
        operand=operand,
        result=result,
        product=product,
        data=data,
        weight=weight.value.numpy(),
        bias=None if bias is None else bias.reshape(-1),
    )


def _groups(graph: Dataflow) -> Iterator[list[_Projection]]:
    """Yield what can be joined: projections of one input that one attention reads."""
    for binding in graph.bindings:
        call = graph.call(binding.var, _ATTENTION)
        if call is None:
            continue
        found = [_projection(graph, operand) for operand in call.args[:3]]
        given = [projection for projection in found if projection is not None]
        for first in given[:1] if len(given) < 3 else given[:2]:
            group = [
                p
                for p in given
                if p.data.same_as(first.data)
                and shape_of(p.operand)[-1] == shape_of(first.operand)[-1]
                and (p.bias is None) == (first.bias is None)
            ]
            if len(group) > 1:
                yield group
                break


def _joined(parts: list[np.ndarray], heads: list[int], depth: int) -> np.ndarray:
    """Return ``[..., heads depth]`` side by side; head by head where there are as many of each."""
    split = [
        part.reshape(*part.shape[:-1], h, 1, depth) for part, h in zip(parts, heads, strict=True)
    ]
    if len(set(heads)) == 1:
        whole = np.concatenate(split, axis=-2)
    else:
        whole = np.concatenate(split, axis=-3)
    return np.ascontiguousarray(whole.reshape(*parts[0].shape[:-1], -1))


def _emit(builder: Rebuilder, group: list[_Projection]) -> list[relax.Expr]:
    """Append the joined product, and return what stands for each operand."""
    batch, rows, _, depth = shape_of(group[0].operand)
    heads = [shape_of(p.operand)[2] for p in group]
    name = "+".join(str(p.result.name) for p in group)
    weight = relax.const(_joined([p.weight for p in group], heads, depth))
    biases = [p.bias for p in group if p.bias is not None]
    value: relax.Expr = relax.op.matmul(builder.use(group[0].data), weight)
    if biases:
        product = builder.emit(value, "+".join(str(p.product.name) for p in group))
        value = relax.op.add(product, relax.const(_joined(biases, heads, depth)))
    joined = builder.emit(value, name)
    whole = builder.emit(
        relax.op.reshape(joined, (batch, rows, sum(heads), depth)), f"{name}_heads"
    )
    step = len(group) if len(set(heads)) == 1 else 1
    slices: list[relax.Expr] = []
    for index, count in enumerate(heads):
        begin = index if step > 1 else sum(heads[:index])
        end = begin + (count - 1) * step + 1
        slices.append(
            relax.op.strided_slice(whole, axes=[2], begin=[begin], end=[end], strides=[step])
        )
    return slices


@relax.transform.function_pass(opt_level=0)
class JoinProjections:
    """Join the projections of each attention in a dataflow function."""

    def transform_function(
        self, function: relax.Function, _module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> relax.Function:
        """Return the function with its projections joined, or the very same function."""
        if not is_dataflow(function):
            return function
        graph = Dataflow(function)
        groups = list(_groups(graph))
        if not groups:
            return function
        of = {projection.operand: group for group in groups for projection in group}
        builder = Rebuilder(function)
        slices: dict[relax.Var, relax.Expr] = {}
        for binding in graph.bindings:
            group = of.get(binding.var)
            if group is None:
                builder.copy(binding)
                continue
            if binding.var not in slices:
                operands = (projection.operand for projection in group)
                slices.update(zip(operands, _emit(builder, group), strict=True))
            builder.bind(binding.var, slices[binding.var])
        return builder.finish()
