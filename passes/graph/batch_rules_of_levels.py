"""How hone's integer operators carry the batch; see `batch_rules`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm import relax
from tvm.ir import Op

from hone.passes.quantize import binarize as binarize  # registers its operator
from hone.passes.quantize import operators as operators  # registers those of levels

from .dataflow import shape_of

if TYPE_CHECKING:
    from .batch_rules import BatchRules


def own_ops(*names: str) -> tuple[Op, ...]:
    """Return operators of hone by their names."""
    return tuple(Op.get(f"hone.{name}") for name in names)


def _levels(rules: BatchRules, var: relax.Var, call: relax.Call) -> tuple[int, list[relax.Expr]]:
    """Integer layers, whose tensors all have their samples along the first axis."""
    if {rules.axis(argument) for argument in call.args if rules.reads(argument)} != {0}:
        raise rules.error(var, "the batch is not along the first axis of its operands")
    if rules.axis(call.args[0]) is None or any(map(rules.reads, list(call.args)[1:2])):
        raise rules.error(var, "the batch reaches another operand than the data")
    return 0, rules.use(call.args)


def _levels_together(
    rules: BatchRules, var: relax.Var, call: relax.Call
) -> tuple[int, list[relax.Expr]]:
    """Two tensors of levels, with the batch along the same axis of one rank."""
    left, right = (rules.axis(argument) for argument in call.args[:2])
    if left is None or left != right:
        raise rules.error(var, "the batch is along different axes of its operands")
    return left, rules.use(call.args)


def _mean_of_levels(
    rules: BatchRules, var: relax.Var, call: relax.Call
) -> tuple[int, list[relax.Expr]]:
    axis = rules.first(var, call)
    rank = len(shape_of(call.args[0]))
    averaged = {int(dim) % rank for dim in call.attrs["axis"]}
    if axis in averaged:
        raise rules.error(var, "it reduces over the samples of the batch")
    gone = 0 if call.attrs["keepdims"] else sum(dim < axis for dim in averaged)
    return axis - gone, rules.use(call.args)


LEVEL_RULES: dict[Op, Callable[[BatchRules, relax.Var, relax.Call], tuple[int, list[relax.Expr]]]]
LEVEL_RULES = {
    **dict.fromkeys(
        own_ops("conv2d_int8", "dense_int8", "row_sums", "window_sums", "avg_pool2d_int8"),
        _levels,
    ),
    **dict.fromkeys(own_ops("add_int8", "multiply_int8"), _levels_together),
    **dict.fromkeys(own_ops("mean_int8"), _mean_of_levels),
}
