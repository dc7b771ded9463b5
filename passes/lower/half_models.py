"""Lowers products of models that are of 16-bit floats themselves: sums in float32, rounded once.

Rewrites ``relax.nn.conv2d`` and ``relax.matmul`` whose result is of the 16-bit float of their
operands. Products that `hone.passes.graph.to_half.ToHalf` makes as well take the same kernels,
others those of float32 with their operands widened. Runs before fusion. Numerics: products and
sums in float32, the result rounded to nearest even; TVM's own lowering rounds every sum.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import shape_of

from .anchors import is_constant

Rule = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]

_CONV2D = Op.get("relax.nn.conv2d")


def legalize_half_model(
    single: Rule, half: Rule, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    """Legalize one product whose operands and result are of one 16-bit float.

    Parameters
    ----------
    single : callable
        Rule for float32.
    half : callable
        Rule for 16-bit floats with a float32 result.
    bb : BlockBuilder
        Of the function.
    call : Call
        ``relax.nn.conv2d`` or ``relax.matmul``.
    """
    rule, operands = half, list(call.args)
    if not _has_kernel(call):
        rule, operands = single, [_widened(bb, operand) for operand in operands]
    product = bb.normalize(rule(bb, bb.normalize(_summed_in_float(call, operands))))
    return relax.op.astype(bb.emit(product), str(call.ty.dtype))


def _has_kernel(call: relax.Call) -> bool:
    """Tell whether the rule of 16-bit floats takes a call."""
    left, right = (shape_of(operand) for operand in call.args)
    if call.op.same_as(_CONV2D):
        return is_constant(call.args[1]) and int(call.attrs.groups) == 1
    if is_constant(call.args[1]):
        return len(right) == 2 <= len(left)
    return len(left) == len(right) >= 3 and left[:-2] == right[:-2]


def _widened(bb: relax.BlockBuilder, operand: relax.Expr) -> relax.Expr:
    if is_constant(operand):
        return relax.const(operand.value.numpy().astype("float32"))
    return bb.emit(relax.op.astype(operand, "float32"))


def _summed_in_float(call: relax.Call, operands: list[relax.Expr]) -> relax.Call:
    """Return a call on other operands, its result float32."""
    attrs = call.attrs
    if not call.op.same_as(_CONV2D):
        return relax.op.matmul(*operands, out_dtype="float32")
    return relax.op.nn.conv2d(
        *operands,
        strides=[int(x) for x in attrs.strides],
        padding=[int(x) for x in attrs.padding],
        dilation=[int(x) for x in attrs.dilation],
        groups=int(attrs.groups),
        data_layout=attrs.data_layout,
        kernel_layout=attrs.kernel_layout,
        out_layout=attrs.out_layout,
        out_dtype="float32",
    )
