"""The operator ``hone.decode_weights``: packed levels of few bits as a float32 weight.

It stands in a module where a constant weight stood, in front of the convolution or matrix product
that reads it. `hone.passes.lower.weight_only` makes one kernel of the two, in which no float32 copy
of the weights exists. Importing this module registers the operator. It has no lowering of its own
registered, so that constant folding leaves it alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from hone.errors import ModelError
from hone.passes import ffi_errors as ffi_errors  # type inference must be able to raise

from .bit_packing import pack, unpack
from .weight_schemes import WeightLevels

NAME = "hone.decode_weights"
STORED_BITS = (1, 2, 4, 8)
TABLE_MODES = ("fast", "clip", "wrap")
"""What ``relax.take`` may do with an index beyond a table: nothing, the nearest row, modulo."""


def decode_weights(
    packed: relax.Expr,
    scale: relax.Expr,
    zero_point: relax.Expr | None = None,
    *,
    bits: int,
    group: int,
    shape: Sequence[int],
    axis: int,
) -> relax.Call:
    """Real weights of packed levels: ``scale × (level - zero_point)``.

    Parameters
    ----------
    packed : relax.Expr
        uint8 ``[K, ceil(D × bits / 8)]``, as `bit_packing.pack` lays levels out.
    scale : relax.Expr
        ``[K, ceil(D / group)]`` or ``[1, 1]``: float32, or int8 exponents of two.
    zero_point : relax.Expr, optional
        int8, the shape of ``scale``.
    bits : {8, 4, 2, 1}
        Of a level; 1 means -1 or 1.
    group : int
        Neighbours along D that share a scale.
    shape : sequence of int
        Of the weight. K is ``shape[axis]``, and D runs over all other axes in their order.
    axis : int
        Of the output channels.

    Returns
    -------
    relax.Call
        float32 of ``shape``.

    Raises
    ------
    ModelError
        A shape, a dtype or an attribute does not fit.
    """
    arguments = [packed, scale] if zero_point is None else [packed, scale, zero_point]
    attrs = tvm.ir.make_node(
        "ir.DictAttrs",
        bits=int(bits),
        group=int(group),
        shape=[int(extent) for extent in shape],
        axis=int(axis),
    )
    call = relax.Call(Op.get(NAME), arguments, attrs)
    _infer(call)
    return call


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """A weight that an operator decodes.

    Parameters
    ----------
    levels : WeightLevels
        What is stored.
    shape : tuple of int
        Of the weight.
    axis : int
        Of the output channels.
    """

    levels: WeightLevels
    shape: tuple[int, ...]
    axis: int

    @classmethod
    def of(cls, call: relax.Call) -> Decoded:
        """Return what a call of the operator with constant arguments decodes."""
        if not all(isinstance(argument, tvm.ir.GenericConst) for argument in call.args):
            raise ModelError("packed weights must be constant", where=NAME)
        packed, scale, *others = (argument.value.numpy() for argument in call.args)
        shape, axis = tuple(int(extent) for extent in call.attrs["shape"]), int(call.attrs["axis"])
        bits = int(call.attrs["bits"])
        is_exponent = scale.dtype == np.int8
        return cls(
            levels=WeightLevels(
                levels=unpack(packed, bits, math.prod(shape) // shape[axis]),
                scale=np.exp2(scale.astype(np.float32)) if is_exponent else scale,
                zero_point=others[0] if others else None,
                bits=bits,
                group=int(call.attrs["group"]),
                power_of_two=is_exponent,
            ),
            shape=shape,
            axis=axis,
        )

    def call(self) -> relax.Call:
        """Return the operator's call on constants."""
        levels = self.levels
        scale = levels.scale
        if levels.power_of_two:
            scale = np.log2(scale).astype(np.int8)
        zero_point = levels.zero_point
        return decode_weights(
            relax.const(pack(levels.levels, levels.bits), "uint8"),
            relax.const(scale, str(scale.dtype)),
            None if zero_point is None else relax.const(zero_point, "int8"),
            bits=levels.bits,
            group=levels.group,
            shape=self.shape,
            axis=self.axis,
        )

    def real(self) -> np.ndarray:
        """Return the float32 weight."""
        first = (self.shape[self.axis], *np.delete(self.shape, self.axis))
        weight = self.levels.real().reshape(first)
        return np.ascontiguousarray(np.moveaxis(weight, 0, self.axis))


def decode_call(expression: relax.Expr) -> relax.Call | None:
    """Return an expression that is a call of the operator, else None."""
    if isinstance(expression, relax.Call) and expression.op == Op.get(NAME):
        return expression
    return None


def _infer(call: relax.Call) -> relax.TensorType:
    bits, group = int(call.attrs["bits"]), int(call.attrs["group"])
    shape, axis = tuple(int(extent) for extent in call.attrs["shape"]), int(call.attrs["axis"])
    if bits not in STORED_BITS:
        raise ModelError(f"bits must be 1, 2, 4 or 8, not {bits}", where=NAME)
    if group < 1:
        raise ModelError(f"group must be at least 1, not {group}", where=NAME)
    if not 0 <= axis < len(shape) or min(shape) < 1:
        raise ModelError(f"axis {axis} of a weight {list(shape)} does not exist", where=NAME)
    channels, depth = shape[axis], math.prod(shape) // shape[axis]
    _argument(call, 0, "packed", ("uint8",), [(channels, -(-depth * bits // 8))])
    allowed = [(channels, -(-depth // group))]
    if group >= depth:
        allowed.append((1, 1))
    _argument(call, 1, "scale", ("float32", "int8"), allowed)
    if len(call.args) > 2:
        if bits == 1:
            raise ModelError("levels of 1 bit have no zero point", where=NAME)
        given = tuple(int(extent) for extent in call.args[1].ty.shape)
        _argument(call, 2, "zero_point", ("int8",), [given])
    return relax.TensorType(shape, "float32")


def _argument(
    call: relax.Call,
    index: int,
    name: str,
    dtypes: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
) -> None:
    type_ = call.args[index].ty
    if not isinstance(type_, relax.TensorType) or type_.shape is None:
        raise ModelError(f"{name} must be a tensor of known shape, not {type_}", where=NAME)
    if str(type_.dtype) not in dtypes:
        raise ModelError(f"{name} must be {' or '.join(dtypes)}, not {type_.dtype}", where=NAME)
    if tuple(int(extent) for extent in type_.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ModelError(
            f"{name} must have shape {wanted}, not {[int(x) for x in type_.shape]}", where=NAME
        )


def _register() -> None:
    tvm.ir._ffi_api.RegisterOp(NAME, "See hone.passes.quantize.decode_operator.")
    tvm.ir.register_op_attr(NAME, "FInferType", lambda call, _context: _infer(call))
    tvm.ir.register_op_attr(NAME, "FPurity", True)


_register()
