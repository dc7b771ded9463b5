"""The operator ``hone.attention``: attention with what may lie over its scores.

`fuse_attention` writes it and `attention` makes one kernel of it, both during legalization: no
other pass sees it. Importing this module registers the operator. It has no lowering of its own
registered, so that constant folding leaves it alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir import Op

from hone.errors import ModelError
from hone.passes import ffi_errors as ffi_errors  # type inference must be able to raise

NAME = "hone.attention"


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """Operands and numbers of an attention, ``softmax(scores) V``.

    Parameters
    ----------
    query, key, value : relax.Expr
        float32 ``[B, M, H, D]``, ``[B, S, G, D]`` and ``[B, S, G, C]``; G divides H, and H / G
        heads of queries in a row share one of keys and values.
    scale : float
        ``scores = scale Q K^T``.
    cap : float, optional
        ``scores = cap tanh(scale Q K^T)``.
    bias : relax.Expr, optional
        float32 ``[B or 1, H or 1, M or 1, S]``, is added to the scores.
    cover : relax.Expr, optional
        uint8 of such a shape; where it is 0, ``fill`` takes the place of a score.
    fill : float
        Minus infinity, or a number.
    cover_first : bool
        The bias is added to what the cover leaves, rather than covered as well.
    causal : int, optional
        Row m sees the keys up to ``m + causal`` only; not negative, so that it sees one.
    """

    query: relax.Expr
    key: relax.Expr
    value: relax.Expr
    scale: float
    cap: float | None = None
    bias: relax.Expr | None = None
    cover: relax.Expr | None = None
    fill: float = -math.inf
    cover_first: bool = True
    causal: int | None = None

    @classmethod
    def of(cls, call: relax.Call) -> Attention:
        """Return what a call of the operator computes."""
        query, key, value, *masks = call.args
        causal, cap = int(call.attrs["causal"]), float(call.attrs["cap"])
        return cls(
            query=query,
            key=key,
            value=value,
            scale=float(call.attrs["scale"]),
            cap=cap or None,
            bias=masks.pop(0) if call.attrs["bias"] else None,
            cover=masks.pop(0) if call.attrs["cover"] else None,
            fill=float(call.attrs["fill"]),
            cover_first=bool(call.attrs["cover_first"]),
            causal=None if causal < 0 else causal,
        )

    @property
    def operands(self) -> list[relax.Expr]:
        """Those that are there, in order."""
        masks = [mask for mask in (self.bias, self.cover) if mask is not None]
        return [self.query, self.key, self.value, *masks]

    def call(self) -> relax.Call:
        """Return the operator's call, float32 ``[B, M, H, C]``.

        Raises
        ------
        ModelError
            A shape or a dtype does not fit.
        """
        attrs = tvm.ir.make_node(
            "ir.DictAttrs",
            scale=self.scale,
            cap=self.cap or 0.0,
            bias=int(self.bias is not None),
            cover=int(self.cover is not None),
            fill=self.fill,
            cover_first=int(self.cover_first),
            causal=-1 if self.causal is None else self.causal,
        )
        call = relax.Call(Op.get(NAME), self.operands, attrs)
        _infer(call)
        return call


def _infer(call: relax.Call) -> relax.TensorType:
    types = ["float32"] * (3 + int(call.attrs["bias"])) + ["uint8"] * int(call.attrs["cover"])
    for position, (argument, dtype) in enumerate(zip(call.args, types, strict=True)):
        type_ = argument.ty
        if not isinstance(type_, relax.TensorType) or type_.shape is None or type_.ndim != 4:
            raise ModelError(f"operand {position} must have four axes, not {type_}", where=NAME)
        if str(type_.dtype) != dtype:
            raise ModelError(f"operand {position} must be {dtype}, not {type_.dtype}", where=NAME)
    shapes = [tuple(int(extent) for extent in argument.ty.shape) for argument in call.args]
    (batch, rows, heads, depth), key, value, *masks = shapes
    fits = (
        key[0] == value[0] == batch
        and key[1:3] == value[1:3]
        and heads % key[2] == 0
        and key[3] == depth
    )
    if not fits:
        raise ModelError(
            f"queries {list(shapes[0])}, keys {list(key)} and values {list(value)} do not fit",
            where=NAME,
        )
    for mask in masks:
        if mask[3] != key[1] or any(
            own not in (1, whole) for own, whole in zip(mask, (batch, heads, rows), strict=False)
        ):
            raise ModelError(
                f"a mask {list(mask)} does not fit scores {[batch, heads, rows, key[1]]}",
                where=NAME,
            )
    return relax.TensorType((batch, rows, heads, value[3]), "float32")


def _register() -> None:
    tvm.ir._ffi_api.RegisterOp(NAME, "See hone.passes.lower.attention_operator.")
    tvm.ir.register_op_attr(NAME, "FInferType", lambda call, _context: _infer(call))
    tvm.ir.register_op_attr(NAME, "FPurity", True)


_register()
