"""16-bit floats inside tensor expressions: widening, rounding, bits and pairs.

Only a function's arguments have a 16-bit float type: TVM computes every inner stage of bfloat16 in
float32 and would convert at each copy. Inner stages therefore hold bits (uint16), or two neighbours
in one int32 word. Numerics: widening is exact, rounding is to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import relax, te, tirx
from tvm.ir import Op
from tvm.te.tensor import TensorSlice

from hone.targets.half_dot import BFLOAT16, DTYPES, HalfDot
from hone.targets.half_dot import PAIR as PAIR
from hone.targets.half_intrinsics import pair_product, pair_sum, round_bits
from hone.targets.schedule.machine import Machine

from .anchors import default_legalization

_ASTYPE = Op.get("relax.astype")


def is_half(expression: relax.Expr | te.Tensor) -> bool:
    """Say whether a tensor or value is of a 16-bit float type."""
    return _dtype(expression) in DTYPES


def _dtype(expression: relax.Expr | te.Tensor) -> str:
    in_te = isinstance(expression, te.Tensor | TensorSlice)
    return str(expression.dtype if in_te else expression.ty.dtype)


def widen(value: tirx.Expr) -> tirx.Expr:
    """Return a value in float32; one that is not a 16-bit float is returned as it is."""
    return value.astype("float32") if is_half(value) else value


def bits(machine: Machine, value: tirx.Expr, dtype: str) -> tirx.Expr:
    """Return the bits (uint16) of a 16-bit float, or of a float32 rounded to ``dtype``."""
    if is_half(value):
        return tirx.reinterpret("uint16", value)
    if dtype != BFLOAT16:
        return tirx.reinterpret("uint16", tirx.Cast(dtype, value))
    return _round_bits(value) if machine.half_dot is None else round_bits(value)


def _round_bits(value: tirx.Expr) -> tirx.Expr:
    """Return the bits of a float32 rounded to bfloat16, without an instruction for it.

    Half a unit, less one where the result would be even already, carries into the upper half. The
    bits of a NaN are no magnitude: it becomes the quiet one.
    """

    def const(number: int) -> tirx.Expr:
        return tirx.const(number, "uint32")

    whole = tirx.reinterpret("uint32", value)
    upper = (whole + const(0x7FFF) + ((whole >> const(16)) & const(1))) >> const(16)
    is_nan = (whole & const(0x7FFFFFFF)) > const(0x7F800000)
    return tirx.Cast("uint16", tirx.Select(is_nan, const(0x7FC0), upper))


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """How a machine sums pairs of 16-bit floats.

    Parameters
    ----------
    machine : Machine
        Says how to round.
    dot : HalfDot
        The instruction on vectors.
    dtype : str
        The 16-bit float.
    """

    machine: Machine
    dot: HalfDot
    dtype: str

    @classmethod
    def of(cls, machine: Machine, dtype: str) -> Pairs | None:
        """Return the pairs of a type, None where the machine has no instruction for them."""
        if dtype != BFLOAT16 or machine.half_dot is None:
            return None
        return cls(machine=machine, dot=HalfDot(machine.half_dot).vector, dtype=dtype)

    def bits(self, value: tirx.Expr) -> tirx.Expr:
        """Return the bits (uint16) of a 16-bit float, a float32 that is rounded, or of bits."""
        return value if _dtype(value) == "uint16" else bits(self.machine, value, self.dtype)

    def word(self, read: Callable[[int], tirx.Expr]) -> tirx.Expr:
        """Return the two neighbours that ``read`` gives for 0 and 1 as an int32 word.

        LLVM makes one load of it where they lie side by side.
        """
        low, high = (tirx.Cast("uint32", self.bits(read(half))) for half in range(PAIR))
        return tirx.reinterpret("int32", low | (high << tirx.const(16, "uint32")))

    def sum(
        self, read: Callable[[int], tirx.Expr], weight: tirx.Expr, *, axis: list[tirx.IterVar]
    ) -> tirx.Expr:
        """Return the float32 sum of ``read(0) × weight[0] + read(1) × weight[1]`` over axes.

        Parameters
        ----------
        read : callable
            0 or 1 → value of a pair.
        weight : Expr
            int32 word.
        axis : list of IterVar
            What is summed over.
        """
        return pair_sum(self.dot)(pair_product(self.dot, self.word(read), weight), axis=axis)


def words(values: np.ndarray) -> np.ndarray:
    """Return ``[..., 2]`` 16-bit floats as ``[...]`` int32 words, the first one low."""
    return np.ascontiguousarray(values).view("<u4").astype("<u4").view("int32")[..., 0]


def widened_source(bb: relax.BlockBuilder, data: relax.Expr) -> relax.Expr:
    """Return the 16-bit float tensor that ``data`` is a widening of, else ``data``."""
    source = _cast_source(bb, data)
    return source if source is not None and is_half(source) else data


def rounded_source(bb: relax.BlockBuilder, data: relax.Expr) -> relax.Expr:
    """Return the network's input that ``data`` rounds, else ``data``.

    No kernel before it could round it, so the one that reads it does.
    """
    source = _cast_source(bb, data)
    is_input = isinstance(source, relax.Var) and bb.lookup_binding(source) is None
    return source if is_input else data


def _cast_source(bb: relax.BlockBuilder, data: relax.Expr) -> relax.Expr | None:
    if not isinstance(data, relax.Var):
        return None
    value = bb.lookup_binding(data)
    if isinstance(value, relax.Call) and value.op.same_as(_ASTYPE):
        return value.args[0]
    return None


def legalize_astype(machine: Machine, bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize ``relax.astype`` to a 16-bit float by the processor's own rounding."""
    dtype, data = str(call.ty.dtype), call.args[0]
    if dtype not in DTYPES or str(data.ty.dtype) != "float32":
        return default_legalization(bb, call)

    def narrow(x: te.Tensor) -> te.Tensor:
        return te.compute(
            x.shape,
            lambda *i: tirx.reinterpret(dtype, bits(machine, x[i], dtype)),
            name="narrow",
        )

    return bb.call_te(narrow, data, primfunc_name_hint="narrow")
