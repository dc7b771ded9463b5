"""Writes ``x (1 + erf(x / sqrt 2)) / 2`` as one operator, whose polynomial is cheaper than erf's.

Rewrites a float32 product of ``x``, ``1 + erf(x / sqrt 2)`` and numbers, in any order and with
divisions by numbers among them, to ``relax.nn.gelu`` (times what the numbers leave, where they are
not 1/2 together). Runs before legalization. Numerics: see `elementary.gelu`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import Dataflow, Rebuilder, is_dataflow, shape_of

from .attention_scores import factor_of

_MULTIPLY = Op.get("relax.multiply")
_DIVIDE = Op.get("relax.divide")
_ADD = Op.get("relax.add")
_ERF = Op.get("relax.erf")
# How far a number may be from the root of 1/2: what rounding to float32 leaves of it.
_CLOSE = 1e-6


@dataclass(kw_only=True)
class _Product:
    """Factors of a product: tensors, and the product of all numbers."""

    tensors: list[relax.Expr]
    number: float = 1.0


def _collect(graph: Dataflow, expr: relax.Expr, into: _Product, *, top: bool) -> None:
    """Take a product apart; what is used elsewhere too is a factor as a whole."""
    call = graph.call(expr)
    inside = top or (isinstance(expr, relax.Var) and graph.used_once(expr))
    if call is not None and inside and (call.op.same_as(_MULTIPLY) or call.op.same_as(_DIVIDE)):
        scaled = factor_of(graph, call)
        if scaled is not None and shape_of(scaled[0]) == shape_of(call):
            into.number *= scaled[1]
            _collect(graph, scaled[0], into, top=False)
            return
        if scaled is None and call.op.same_as(_MULTIPLY):
            for argument in call.args:
                _collect(graph, argument, into, top=False)
            return
    into.tensors.append(expr)


def _argument(graph: Dataflow, expr: relax.Expr) -> relax.Expr | None:
    """Return x of ``1 + erf(x / sqrt 2)``."""
    total = graph.call(expr, _ADD)
    if total is None:
        return None
    for data, other in (total.args, tuple(total.args)[::-1]):
        one = graph.constant(other)
        erf = graph.call(data, _ERF)
        if one is None or one.size != 1 or one.reshape(()) != 1 or erf is None:
            continue
        scaled = graph.call(erf.args[0])
        found = None if scaled is None else factor_of(graph, scaled)
        if found is not None and math.isclose(found[1], math.sqrt(0.5), rel_tol=_CLOSE):
            return found[0]
    return None


def _match(graph: Dataflow, var: relax.Var) -> tuple[relax.Expr, float] | None:
    """Return x and what its gelu is multiplied with."""
    call = graph.call(var)
    # A split has a tuple for its type.
    if call is None or not isinstance(call.ty, relax.TensorType) or str(call.ty.dtype) != "float32":
        return None
    product = _Product(tensors=[])
    _collect(graph, var, product, top=True)
    if len(product.tensors) != 2:
        return None
    for x, other in (product.tensors, product.tensors[::-1]):
        argument = _argument(graph, other)
        if argument is not None and argument.same_as(x) and shape_of(x) == shape_of(call):
            return x, 2 * product.number
    return None


@relax.transform.function_pass(opt_level=0)
class FuseGelu:
    """Find gelu in a dataflow function."""

    def transform_function(
        self, function: relax.Function, _module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> relax.Function:
        """Return the function with each gelu as one operator, or the very same function."""
        if not is_dataflow(function):
            return function
        graph = Dataflow(function)
        matches = {binding.var: _match(graph, binding.var) for binding in graph.bindings}
        # Of `x erf 0.5` the inner product matches as well, times 2: the outermost counts.
        found = {var: match for var, match in matches.items() if match is not None}
        for var in list(found):
            users = graph.users.get(var, [])
            if len(users) == 1 and users[0] in found:
                del found[var]
        if not found:
            return function
        builder = Rebuilder(function)
        for binding in graph.bindings:
            match = found.get(binding.var)
            if match is None:
                builder.copy(binding)
                continue
            result = relax.op.nn.gelu(builder.use(match[0]))
            if match[1] != 1:
                result = builder.emit(result, f"{binding.var.name}_gelu")
                result = relax.op.multiply(result, relax.const(match[1], "float32"))
            builder.bind(binding.var, result)
        return builder.finish()
