"""Conversions of Div and Mod that no value can crash.

A processor traps on an integer divided by zero, and on the least integer divided by -1: one such
value in a user's data would end the whole process. ONNX leaves the first undefined; here it gives
what a division by 1 gives. The second wraps around, as in numpy. TVM refuses floats divided by a
constant 0: they are multiplied with an infinity of its sign, which gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from tvm.relax import op

from .call import Call, Converter, const

Divide = Callable[[Any, Any], Any]


def _div(call: Call) -> Any:
    """Return ``a / b``, of integers rounded towards zero."""
    value = call.value(1)
    if _is_float(call.dtype()) and value is not None and value.size == 1 and (value == 0).all():
        infinite = np.copysign(np.inf, value.astype(np.float64))
        return op.multiply(call.inputs[0], const(infinite, call.dtype()))
    return _guarded(call, op.divide, lambda a: op.subtract(const(0, call.dtype()), a))


def _mod(call: Call) -> Any:
    """Return ``a - b floor(a / b)``, with fmod = 1 ``a - b trunc(a / b)``."""
    remainder = op.mod if call.attributes.get("fmod", 0) else op.floor_mod
    return _guarded(call, remainder, lambda a: op.multiply(const(0, call.dtype()), a))


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def _guarded(call: Call, divide: Divide, by_minus_one: Callable[[Any], Any]) -> Any:
    dtype = call.dtype()
    if _is_float(dtype):
        return None
    a, b = call.inputs
    value = call.value(1)
    if value is not None and (value == 0).any():
        raise ValueError("the constant divisor holds a 0")
    if value is not None and not (value == -1).any():
        return divide(a, b)
    one = const(1, dtype)
    safe = op.where(op.equal(b, const(0, dtype)), one, b)
    if dtype.startswith("u"):
        return divide(a, safe)
    negative = op.equal(b, const(-1, dtype))
    return op.where(negative, by_minus_one(a), divide(a, op.where(negative, one, safe)))


DIVISIONS: Final[Mapping[str, Converter]] = {"Div": _div, "Mod": _mod}
