"""Functions of one level tensor, as tables of their 256 results.

Whatever operators compute element by element from one tensor and from constants of one number is a
function of a level: a sigmoid, ``x × sigmoid(x)``, a hard swish or GELU written in pieces. Its
values are computed here once for all levels, and looked up by ``hone.table_int8``. Reads a
dataflow function, changes nothing. Numerics: float64, rounded once, to nearest, ties to even.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir import GenericConst, Op

from hone.passes.graph.dataflow import Dataflow, shape_of

from .levels import Levels

Values = np.ndarray
"""float64 ``[256]``, one for each level, or ``[]``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelFunction:
    """A function of one tensor, element by element.

    Parameters
    ----------
    source : relax.Expr
        The tensor.
    inner : tuple of relax.Var
        Bindings that compute it, the last one its result, in the order of the function.
    apply : callable
        float64 values of the tensor → those of the result.
    """

    source: relax.Expr
    inner: tuple[relax.Var, ...]
    apply: Callable[[Values], Values]


def table_of(
    function: Callable[[Values], Values],
    data: Levels,
    output: Levels,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> np.ndarray:
    """Return uint8 ``[256]``: the level of the result for each level of the data.

    ``clamp(round(clip(f(s_x × (level - z_x)), low, high) / s_y) + z_y, 0, 255)``; where the result
    is no number, as everywhere, the lowest level.

    Worked number: a sigmoid of data with s_x = 0.05 and z_x = 100 to s_y = 1 / 256 and z_y = 0:
    level 120 is 1.0, whose sigmoid 0.731 is level round(187.2) = 187.

    Parameters
    ----------
    function : callable
        float64 values → values.
    data, output : Levels
        Of the tensors.
    bounds : tuple of float
        Of an activation that follows.
    """
    real = (np.arange(256.0) - data.zero_point) * data.scale
    with np.errstate(all="ignore"):
        values = np.broadcast_to(function(real), (256,))
        steps = np.rint(np.clip(values, *bounds) / output.scale) + output.zero_point
    levels = np.clip(np.nan_to_num(steps, nan=0.0, posinf=255, neginf=0), 0, 255)
    return np.asarray(levels, np.uint8)


def level_function(
    graph: Dataflow, var: relax.Var, is_source: Callable[[relax.Expr], bool]
) -> LevelFunction | None:
    """Return the function of one tensor that a binding computes; None where it is none.

    Parameters
    ----------
    graph : Dataflow
        Of the binding.
    var : relax.Var
        Its variable.
    is_source : callable
        Says of a tensor that it is taken as it is, however it is computed.
    """
    search = _Search(graph, is_source)
    value = search.value(var, first=True)
    if value is None or len(search.sources) != 1 or not search.inner:
        return None
    source = search.sources[0]
    if shape_of(source) != shape_of(var):
        return None
    position = {binding.var: index for index, binding in enumerate(graph.bindings)}
    inner = tuple(sorted(search.inner, key=lambda each: position[each]))
    return LevelFunction(source=source, inner=inner, apply=value)


class _Search:
    """Follows a value back to tensors that are taken as they are."""

    def __init__(self, graph: Dataflow, is_source: Callable[[relax.Expr], bool]) -> None:
        self._graph = graph
        self._is_source = is_source
        self._known: dict[relax.Var, Callable[[Values], Values]] = {}
        self.sources: list[relax.Expr] = []
        self.inner: list[relax.Var] = []

    def value(self, expr: relax.Expr, *, first: bool = False) -> Callable[[Values], Values] | None:
        """Return an expression as a function of the source's values; None for another one."""
        if isinstance(expr, GenericConst):
            number = np.asarray(expr.value.numpy())
            if number.size != 1 or number.dtype.kind not in "fiu":
                return None
            constant = number.astype(np.float64).reshape(())
            return lambda _x: constant
        if not isinstance(expr, relax.Var):
            return None
        if expr in self._known:
            return self._known[expr]
        found = self._computed(expr) if first or not self._is_source(expr) else None
        if found is None:
            if first or str(expr.ty.dtype) != "float32":
                return None
            if not any(expr.same_as(source) for source in self.sources):
                self.sources.append(expr)
            found = _same
        self._known[expr] = found
        return found

    def _computed(self, var: relax.Var) -> Callable[[Values], Values] | None:
        call = self._graph.call(var)
        if call is None or call.op not in _OPERATORS or str(call.ty.dtype) != "float32":
            return None
        before = list(self.sources), list(self.inner), dict(self._known)
        tensors = [x for x in call.args if isinstance(x, relax.Var | GenericConst)]
        arguments = [self.value(x) for x in tensors]
        if any(x is None for x in arguments) or len(self.sources) > 1:
            # Taken as it is then, for whoever reads it.
            self.sources, self.inner, self._known = before
            return None
        self.inner.append(var)
        operator = _OPERATORS[call.op]
        given = [x for x in arguments if x is not None]
        return lambda x: operator(call, *(argument(x) for argument in given))


def _same(values: Values) -> Values:
    return values


def _erf(x: Values) -> Values:
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x))


def _sigmoid(x: Values) -> Values:
    return np.asarray(1 / (1 + np.exp(-x)))


def _gelu_tanh(x: Values) -> Values:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _clip(call: relax.Call, x: Values) -> Values:
    return np.asarray(np.clip(x, float(call.args[1].value), float(call.args[2].value)))


_UNARY: dict[str, Callable[[Values], Values]] = {
    "abs": np.abs,
    "atan": np.arctan,
    "ceil": np.ceil,
    "cos": np.cos,
    "erf": _erf,
    "exp": np.exp,
    "floor": np.floor,
    "log": np.log,
    "negative": np.negative,
    "nn.gelu": lambda x: np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2)))),
    "nn.gelu_tanh": _gelu_tanh,
    "nn.relu": lambda x: np.maximum(x, 0),
    "nn.silu": lambda x: x * _sigmoid(x),
    "round": np.rint,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": _sigmoid,
    "sign": np.sign,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
}
_BINARY: dict[str, Callable[[Values, Values], Values]] = {
    "add": np.add,
    "divide": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "multiply": np.multiply,
    "power": np.power,
    "subtract": np.subtract,
}


def _unary(function: Callable[[Values], Values]) -> Callable[..., Values]:
    return lambda _call, x: function(x)


def _binary(function: Callable[[Values, Values], Values]) -> Callable[..., Values]:
    return lambda _call, x, y: function(x, y)


def _leaky_relu(call: relax.Call, x: Values) -> Values:
    return np.asarray(np.where(x >= 0, x, x * float(call.attrs.alpha)))


def _softplus(call: relax.Call, x: Values) -> Values:
    beta = float(call.attrs.beta)
    soft = np.logaddexp(0, x * beta) / beta
    return np.asarray(np.where(x * beta > float(call.attrs.threshold), x, soft))


_OPERATORS: dict[Op, Callable[..., Values]] = {
    **{Op.get(f"relax.{name}"): _unary(function) for name, function in _UNARY.items()},
    **{Op.get(f"relax.{name}"): _binary(function) for name, function in _BINARY.items()},
    Op.get("relax.clip"): _clip,
    Op.get("relax.nn.leakyrelu"): _leaky_relu,
    Op.get("relax.nn.softplus"): _softplus,
}
"""Operators that a table can hold."""
