"""What the legalizations of hone's own kernels share."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import Op

# kOutEWiseFusable of relax's OpPatternKind: elementwise stages are fused behind the kernel.
# AnnotateTIROpPattern keeps an attribute that it finds.
ANCHOR = {"op_pattern": 4}

# What a convolution is, for passes that join kernels: a 1x1 of float32 data that needs no stage in
# front of its sum (no padding, no step) and none behind it (register tiles divide its result), or
# a depthwise one.
ROLE = "hone.role"
POINTWISE = "pointwise"
DEPTHWISE = "depthwise"

NCHW_TO_NHWC = [0, 2, 3, 1]


def default_legalization(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize a call the way TVM does."""
    return call.op.get_attr("FLegalize")(bb, call)


def through_layout_change(bb: relax.BlockBuilder, data: relax.Expr) -> tuple[relax.Expr, bool]:
    """Look through a change from NCHW to NHWC.

    Returns
    -------
    tuple
        The NCHW tensor and True, where ``data`` is a permutation of it; else ``data`` and False.
    """
    if isinstance(data, relax.Var):
        value = bb.lookup_binding(data)
        if (
            isinstance(value, relax.Call)
            and value.op == Op.get("relax.permute_dims")
            and value.attrs.axes is not None
            and [int(axis) for axis in value.attrs.axes] == NCHW_TO_NHWC
        ):
            return value.args[0], True
    return data, False


def is_constant(expression: relax.Expr) -> bool:
    """Say whether an expression is a constant tensor."""
    return isinstance(expression, tvm.ir.GenericConst)
