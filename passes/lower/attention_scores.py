"""Reads what stands between ``Q K^T`` and a softmax: a scale, a bias, and what hides keys.

Exporters hide a key by adding a large negative number or minus infinity to its score, or by putting
it in the score's place with ``where``. Numerics: divisions by constants become multiplications;
where a constant hides the keys behind each row, they are not read, so that a NaN or an infinity
there stays there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import Dataflow, Rebuilder, shape_of

_MATMUL = Op.get("relax.matmul")
_ADD = Op.get("relax.add")
_MULTIPLY = Op.get("relax.multiply")
_DIVIDE = Op.get("relax.divide")
_WHERE = Op.get("relax.where")
_TANH = Op.get("relax.tanh")
_NOT = Op.get("relax.logical_not")

# A score of this or less has the power 0 beside any score that a network computes.
HIDDEN = -1e30


@dataclass(frozen=True, kw_only=True, eq=False)
class Cover:
    """What hides keys by taking the place of their scores.

    Parameters
    ----------
    condition : relax.Expr or ndarray
        bool, of a shape that broadcasts to that of the scores; a constant is read.
    shown : bool
        What the condition is where a score stays.
    fill : float
        The other scores.
    """

    condition: relax.Expr | np.ndarray
    shown: bool
    fill: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What is softmaxed.

    Parameters
    ----------
    product : relax.Call
        Of queries and keys.
    scale : float
        Of the product.
    cap : float, optional
        What is softmaxed is ``cap tanh(scale product)``, where it is there.
    bias : relax.Expr, optional
        Is added to it.
    cover : Cover, optional
        What hides keys.
    cover_first : bool
        The bias is added to what the cover leaves, rather than covered as well.
    causal : int, optional
        Row m sees the keys up to ``m + causal``.
    """

    product: relax.Call
    scale: float = 1.0
    cap: float | None = None
    bias: relax.Expr | None = None
    cover: Cover | None = None
    cover_first: bool = True
    causal: int | None = None

    @property
    def is_product(self) -> bool:
        """Whether nothing is added to the scores or hidden."""
        return self.bias is None and self.cover is None and self.causal is None


def product_of(graph: Dataflow, expr: relax.Expr) -> relax.Call | None:
    """Return the float32 product, of equal leading axes, that defines an expression."""
    call = graph.call(expr, _MATMUL)
    if call is None or any(str(e.ty.dtype) != "float32" for e in (call, *call.args)):
        return None
    left, right = (shape_of(argument) for argument in call.args)
    fit = len(left) == len(right) in (3, 4) and left[:-2] == right[:-2]
    return call if fit else None


def factor_of(graph: Dataflow, call: relax.Call) -> tuple[relax.Expr, float] | None:
    """Return what a call scales, and the number; None where it does something else."""
    left, right = call.args
    if call.op.same_as(_DIVIDE):
        number = _scalar(graph, right)
        return (left, 1 / number) if number else None
    if call.op.same_as(_MULTIPLY):
        for data, other in ((left, right), (right, left)):
            number = _scalar(graph, other)
            if number is not None:
                return data, number
    return None


def read_scores(graph: Dataflow, expr: relax.Expr) -> Scores | None:
    """Return how scores come about; every step must be used once.

    Parameters
    ----------
    graph : Dataflow
        Defines the expression.
    expr : relax.Expr
        What is softmaxed.
    """
    found = _read(graph, expr)
    return None if found is None else _without_constants(graph, found, shape_of(expr))


def _scalar(graph: Dataflow, expr: relax.Expr) -> float | None:
    value = graph.constant(expr)
    return float(value.reshape(())) if value is not None and value.size == 1 else None


def _read(graph: Dataflow, expr: relax.Expr) -> Scores | None:
    if not isinstance(expr, relax.Var) or not graph.used_once(expr):
        return None
    product = product_of(graph, expr)
    if product is not None:
        return Scores(product=product)
    call = graph.call(expr)
    if call is None or str(call.ty.dtype) != "float32":
        return None
    if call.op.same_as(_WHERE):
        return _covered(graph, call)
    if call.op.same_as(_ADD):
        return _biased(graph, call)
    if call.op.same_as(_TANH):
        found = _read(graph, call.args[0])
        fits = found is not None and found.is_product and found.cap is None
        return replace(found, cap=1.0) if found is not None and fits else None
    if not (call.op.same_as(_MULTIPLY) or call.op.same_as(_DIVIDE)):
        return None
    scaled = factor_of(graph, call)
    if scaled is None or shape_of(scaled[0]) != shape_of(call):
        return None
    found = _read(graph, scaled[0])
    if found is None or not found.is_product:
        return None
    if found.cap is not None:
        cap = found.cap * scaled[1]
        # The operator's 0 is no cap at all.
        return replace(found, cap=cap) if cap != 0 else None
    return replace(found, scale=found.scale * scaled[1])


def _biased(graph: Dataflow, call: relax.Call) -> Scores | None:
    left, right = call.args
    for data, other in ((left, right), (right, left)):
        found = _read(graph, data) if shape_of(data) == shape_of(call) else None
        if found is None or found.bias is not None:
            continue
        return replace(found, bias=other) if _fits(other, call) else None
    return None


def _covered(graph: Dataflow, call: relax.Call) -> Scores | None:
    condition, *sides = call.args
    for data, other, shown in (*[(*sides, True)], (*sides[::-1], False)):
        found = _read(graph, data) if shape_of(data) == shape_of(call) else None
        fill = graph.constant(other)
        if found is None or found.cover is not None or fill is None:
            continue
        if fill.size != np.count_nonzero(fill == fill.flat[0]) or not _fits(condition, call):
            return None
        if found.causal is not None and fill.flat[0] != -np.inf:
            return None
        inner = graph.call(condition, _NOT)
        while inner is not None:
            condition, shown = inner.args[0], not shown
            inner = graph.call(condition, _NOT)
        constant = graph.constant(condition)
        if constant is not None and fill.flat[0] == -np.inf and found.causal is None:
            causal = _causal(constant == shown, shape_of(call)[-2])
            if causal is not None:
                return replace(found, causal=causal)
        cover = Cover(
            condition=condition if constant is None else constant,
            shown=shown,
            fill=float(fill.flat[0]),
        )
        return replace(found, cover=cover, cover_first=found.bias is None)
    return None


def _fits(mask: relax.Expr, scores: relax.Call) -> bool:
    """Tell whether a mask has a value of its own for each key."""
    return shape_of(mask)[-1:] == shape_of(scores)[-1:]


def _causal(shown: np.ndarray, rows: int) -> int | None:
    """Return how many keys behind its number each row sees, where that is all that is hidden."""
    if shown.all() or shown.ndim < 2 or any(extent != 1 for extent in shown.shape[:-2]):
        return None
    own = shown.reshape(shown.shape[-2:])
    more = int(own[0].sum()) - 1
    same = len(own) == rows and np.array_equal(own, np.tri(*own.shape, more, dtype=bool))
    return more if same and more >= 0 else None


def _without_constants(graph: Dataflow, scores: Scores, shape: tuple[int, ...]) -> Scores:
    """Return scores without a constant mask that hides nothing, or the keys behind each row.

    A finite number that hides keys is as good as minus infinity only where the row sees a key whose
    score is its own: a bias may hide the keys that are left.
    """
    rows = shape[-2]
    cover, bias = scores.cover, scores.bias
    if cover is not None and isinstance(cover.condition, np.ndarray):
        shown = cover.condition == cover.shown
        if shown.all():
            return _without_constants(graph, replace(scores, cover=None, cover_first=True), shape)
        causal = _causal(shown, rows)
        if causal is not None and cover.fill <= HIDDEN and bias is None and scores.causal is None:
            return replace(scores, cover=None, cover_first=True, causal=causal)
    alone = cover is None and scores.causal is None
    added = graph.constant(bias) if bias is not None and alone else None
    if added is not None and np.all((added == 0) | (added <= HIDDEN)):
        causal = _causal(added == 0, rows)
        if not added.any() or causal is not None:
            return replace(scores, bias=None, causal=causal if added.any() else None)
    return scores


def mask_over(
    builder: Rebuilder, mask: relax.Expr, shape: tuple[int, ...], name: str
) -> relax.Expr:
    """Return a mask with the axes of ``[B, H, M, S]``, of which all but the last may be 1.

    Parameters
    ----------
    builder : Rebuilder
        Takes the binding, where one is needed.
    mask : relax.Expr
        Of the original function.
    shape : tuple of int
        Of the scores, ``[B, H, M, S]`` or ``[B, M, S]``.
    name : str
        Of the binding.
    """
    own = shape_of(mask)
    padded = _padded(own, shape)
    operand = builder.use(mask)
    return operand if own == padded else builder.emit(relax.op.reshape(operand, padded), name)


def cover_over(builder: Rebuilder, cover: Cover, shape: tuple[int, ...], name: str) -> relax.Expr:
    """Return a cover as the kernel takes it, a byte for each score: 1 where it stays, else 0.

    Parameters
    ----------
    builder : Rebuilder
        Takes the bindings.
    cover : Cover
        Of the original function.
    shape : tuple of int
        Of the scores, ``[B, H, M, S]`` or ``[B, M, S]``.
    name : str
        Of the bindings.
    """
    if isinstance(cover.condition, np.ndarray):
        values = (cover.condition == cover.shown).astype("uint8")
        return relax.const(values.reshape(_padded(values.shape, shape)), "uint8")
    condition = mask_over(builder, cover.condition, shape, f"{name}_axes")
    if not cover.shown:
        condition = builder.emit(relax.op.logical_not(condition), f"{name}_not")
    return builder.emit(relax.op.astype(condition, "uint8"), name)


def _padded(own: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    padded = (1,) * (len(shape) - len(own)) + own
    return padded if len(shape) == 4 else (padded[0], 1, *padded[1:])
