"""The operator ``hone.binarize``: the signs of activations, as -1.0 and 1.0.

A convolution or matrix product of such signs with binary weights (``hone.decode_weights`` of one
bit) is lowered to exclusive ors and population counts by `hone.passes.lower.weight_signs`.
Importing this module registers the operator.
"""

from __future__ import annotations

import tvm
from tvm import relax, te, tirx
from tvm.ir import Op

from hone.errors import ModelError
from hone.passes import ffi_errors as ffi_errors  # type inference must be able to raise

NAME = "hone.binarize"


def binarize(data: relax.Expr) -> relax.Call:
    """Return 1.0 where the data is at least 0, else -1.0; NaN becomes -1.0.

    Source: Rastegari et al., "XNOR-Net", ECCV 2016, section 3.2, with ``sign(0) = 1``.

    Parameters
    ----------
    data : relax.Expr
        float32, any shape.
    """
    call = relax.Call(Op.get(NAME), [data])
    _infer(call)
    return call


def binarized(expression: relax.Expr) -> relax.Expr | None:
    """Return what an expression binarizes, if it is a call of the operator."""
    if isinstance(expression, relax.Call) and expression.op == Op.get(NAME):
        return expression.args[0]
    return None


def legalize_binarize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize signs whose reader has no kernel for them."""

    def signs(data: te.Tensor) -> te.Tensor:
        one = tirx.const(1, "float32")
        return te.compute(
            data.shape,
            lambda *i: tirx.Select(data[i] >= tirx.const(0, "float32"), one, -one),
            name="signs",
        )

    return bb.call_te(signs, call.args[0], primfunc_name_hint="binarize")


def _infer(call: relax.Call) -> relax.TensorType:
    type_ = call.args[0].ty
    if not isinstance(type_, relax.TensorType) or type_.shape is None:
        raise ModelError(f"data must be a tensor of known shape, not {type_}", where=NAME)
    if str(type_.dtype) != "float32":
        raise ModelError(f"data must be float32, not {type_.dtype}", where=NAME)
    return relax.TensorType(type_.shape, "float32")


def _register() -> None:
    tvm.ir._ffi_api.RegisterOp(NAME, "See hone.passes.quantize.binarize.")
    tvm.ir.register_op_attr(NAME, "FInferType", lambda call, _context: _infer(call))
    tvm.ir.register_op_attr(NAME, "FPurity", True)
    tvm.ir.register_op_attr(NAME, "FLegalize", legalize_binarize)


_register()
