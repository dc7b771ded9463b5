"""Gradients of operators for which Relax has none, so that networks with them can be trained.

Rewrites nothing: `register` adds them to Relax's operator registry, where the ``Gradient`` pass
finds them. Numerics: exact derivatives, apart from the kinks named below.
"""

from __future__ import annotations

from math import pi, sqrt

import tvm
from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import shape_of

_ATTRIBUTE = "FPrimalGradient"


def register() -> None:
    """Register the gradients of this module; again is the same as once."""
    for name, gradient in (
        ("relax.clip", _clip),
        ("relax.erf", _erf),
        ("relax.expand_dims", _same_elements),
        ("relax.nn.gelu", _gelu),
        ("relax.nn.layer_norm", _layer_norm),
        ("relax.nn.leakyrelu", _leaky_relu),
        ("relax.nn.pad", _pad),
        ("relax.rsqrt", _rsqrt),
        ("relax.square", _square),
        ("relax.squeeze", _same_elements),
    ):
        if not has_gradient(Op.get(name)):
            tvm.ir.register_op_attr(name, _ATTRIBUTE, gradient)


def has_gradient(op: Op) -> bool:
    """Tell whether an operator has a gradient."""
    return op.get_attr(_ATTRIBUTE) is not None


def _like(value: float, expr: relax.Expr) -> relax.Expr:
    return relax.const(value, str(expr.ty.dtype))


def _clip(
    _var: relax.Var, call: relax.Call, output: relax.Var, _builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return g where low ≤ x ≤ high, else 0; the bounds are numbers and get none."""
    op = relax.op
    x, low, high = call.args
    inside = op.logical_and(
        op.greater_equal(x, _like(float(low.value), x)),
        op.less_equal(x, _like(float(high.value), x)),
    )
    nothing = [op.grad.no_grad(bound) for bound in (low, high)]
    return [op.where(inside, output, op.zeros_like(output)), *nothing]


def _erf(
    _var: relax.Var, call: relax.Call, output: relax.Var, _builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return g · 2/√π · exp(−x²)."""
    op = relax.op
    (x,) = call.args
    slope = op.multiply(_like(2.0 / sqrt(pi), x), op.exp(op.negative(op.multiply(x, x))))
    return [op.multiply(output, slope)]


def _gelu(
    _var: relax.Var, call: relax.Call, output: relax.Var, _builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return g · (Φ(x) + x φ(x)), Φ and φ of the normal distribution."""
    op = relax.op
    (x,) = call.args
    distribution = op.multiply(
        _like(0.5, x),
        op.add(_like(1.0, x), op.erf(op.multiply(x, _like(sqrt(0.5), x)))),
    )
    bell = op.exp(op.multiply(_like(-0.5, x), op.multiply(x, x)))
    density = op.multiply(_like(1.0 / sqrt(2.0 * pi), x), bell)
    return [op.multiply(output, op.add(distribution, op.multiply(x, density)))]


def _layer_norm(
    _var: relax.Var, call: relax.Call, output: relax.Var, builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return the gradients of data, gamma and beta.

    With ``n = (x − mean) / sqrt(var + ε)`` and ``h = g · gamma``, means over the normalized axes:
    ``(h − mean(h) − n · mean(h n)) / sqrt(var + ε)``, and the sums of ``g n`` and of ``g``.
    """
    op, emit = relax.op, builder.emit
    x, gamma, beta = call.args
    axes = [int(axis) for axis in call.attrs.axes]

    def mean(value: relax.Expr) -> relax.Expr:
        return emit(op.mean(value, axes, keepdims=True))

    centred = emit(op.subtract(x, mean(x)))
    variance = mean(op.multiply(centred, centred))
    epsilon = _like(float(call.attrs.epsilon), x)
    root = emit(op.sqrt(emit(op.add(variance, epsilon))))
    normal = emit(op.divide(centred, root))
    scaled = emit(op.multiply(output, gamma)) if call.attrs.scale else output
    slope = op.subtract(
        scaled, op.add(mean(scaled), op.multiply(normal, mean(op.multiply(scaled, normal))))
    )
    return [
        op.divide(slope, root),
        op.collapse_sum_to(emit(op.multiply(output, normal)), shape_of(gamma)),
        op.collapse_sum_to(output, shape_of(beta)),
    ]


def _leaky_relu(
    _var: relax.Var, call: relax.Call, output: relax.Var, _builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return g where x > 0, else alpha · g."""
    op = relax.op
    (x,) = call.args
    scaled = op.multiply(_like(float(call.attrs.alpha), x), output)
    return [op.where(op.greater(x, _like(0.0, x)), output, scaled)]


def _pad(
    _var: relax.Var, call: relax.Call, output: relax.Var, _builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return the part of g that is not padding."""
    shape = shape_of(call.args[0])
    before = [int(width) for width in call.attrs.pad_width][::2]
    axes = list(range(len(shape)))
    end = [begin + extent for begin, extent in zip(before, shape, strict=True)]
    inner = relax.op.strided_slice(output, axes, before, end)
    return [inner, *(relax.op.grad.no_grad(other) for other in list(call.args)[1:])]


def _rsqrt(
    var: relax.Var, _call: relax.Call, output: relax.Var, _builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return −½ · g · y³, where y = 1/√x."""
    op = relax.op
    cube = op.multiply(var, op.multiply(var, var))
    return [op.multiply(_like(-0.5, var), op.multiply(output, cube))]


def _square(
    _var: relax.Var, call: relax.Call, output: relax.Var, _builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return 2 · g · x."""
    op = relax.op
    (x,) = call.args
    return [op.multiply(_like(2.0, x), op.multiply(output, x))]


def _same_elements(
    _var: relax.Var, call: relax.Call, output: relax.Var, _builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return g in the shape of the operand."""
    return [relax.op.reshape(output, shape_of(call.args[0]))]
