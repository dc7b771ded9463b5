"""Which ONNX operators hone imports, and which of their variants it refuses.

Needs no TVM, so that ``hone check`` answers at once. ``tests/conformance`` runs onnx's own node
tests through the importer: what gave wrong values there is either converted by hone itself
(`hone.onnx_converters`) or refused here, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

# fmt: off
SUPPORTED: Final = frozenset(
    (
        "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh",
        "AveragePool", "BatchNormalization", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
        "BitwiseXor", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape",
        "Conv", "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div",
        "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor",
        "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalLpPool",
        "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample", "GroupNormalization",
        "HardSigmoid", "HardSwish", "Hardmax", "Identity", "InstanceNormalization", "IsInf",
        "IsNaN", "LRN", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log",
        "LogSoftmax", "LpPool", "MatMul", "MatMulInteger", "Max", "MaxPool", "Mean",
        "MeanVarianceNormalization", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "OneHot", "Or",
        "PRelu", "Pad", "Pow", "QuantizeLinear", "RMSNormalization", "Range", "Reciprocal",
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
        "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize",
        "Round", "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign",
        "Sin", "Sinh", "Size", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split",
        "Sqrt", "Squeeze", "Sub", "Sum", "Tan", "Tanh", "ThresholdedRelu", "Tile", "TopK",
        "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where", "Xor",
    )
)
"""Operators of the default ONNX domain."""
# fmt: on

DTYPES: Final = frozenset(
    (
        *("float64", "float32", "float16", "bfloat16", "bool"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
)
"""Element types of tensors."""

WEIGHTED: Final = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
"""Operators that do multiply-accumulate work; they bear weights when an input is constant."""


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """What a refusal may look at.

    Parameters
    ----------
    op_type : str
        Operator of the default domain.
    attributes : mapping
        By name; strings are decoded.
    inputs : sequence
        ``(dtype, shape)``, or None for an input that is left out.
    constant : sequence of bool
        Whether an input's value is known at compile time.
    outputs : sequence of str
        Names; empty for an output that is left out.
    opset : int
        Of the default domain.
    """

    op_type: str
    attributes: Mapping[str, Any]
    inputs: Sequence[tuple[str, tuple[int, ...]] | None]
    constant: Sequence[bool]
    outputs: Sequence[str]
    opset: int


def refusal(node: NodeView) -> str | None:
    """Return why a node of a supported operator is not imported, or None."""
    return None
