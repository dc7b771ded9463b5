"""Which ONNX operators hone imports, and which of their variants it refuses.

Needs no TVM, so that ``hone check`` answers at once. ``tests/conformance`` runs onnx's own node
tests through the importer: what gave wrong values there is either converted by hone itself
(`hone.importing.converters`) or refused here, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

# fmt: off
SUPPORTED: Final = frozenset(
    (
        "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh",
        "Attention", "AveragePool", "BatchNormalization", "BitShift", "BitwiseAnd", "BitwiseNot",
        "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Constant",
        "ConstantOfShape", "Conv", "ConvInteger", "ConvTranspose", "Cos", "Cosh", "CumSum",
        "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu", "Equal", "Erf",
        "Exp", "Expand", "EyeLike", "Flatten", "Floor",
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

NARROW: Final[Mapping[str, tuple[str, int]]] = {
    "int2": ("int8", 2),
    "int4": ("int8", 4),
    "uint2": ("uint8", 2),
    "uint4": ("uint8", 4),
}
"""Element types of constant levels: the type that holds them in memory, and their bits."""

WEIGHTED: Final = frozenset(
    ("Conv", "ConvInteger", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger")
)
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
    values : sequence of ndarray or None
        The inputs' values where they are known at compile time.
    outputs : sequence of str
        Names; empty for an output that is left out.
    output_shape : tuple of int
        Of the first output.
    opset : int
        Of the default domain.
    """

    op_type: str
    attributes: Mapping[str, Any]
    inputs: Sequence[tuple[str, tuple[int, ...]] | None]
    values: Sequence[np.ndarray | None]
    outputs: Sequence[str]
    output_shape: tuple[int, ...]
    opset: int


_REDUCTIONS: Final = tuple(
    f"Reduce{kind}"
    for kind in (
        *("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"),
    )
)

CONSTANT_INPUTS: Final[Mapping[str, tuple[int, ...]]] = {
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
    **dict.fromkeys(_REDUCTIONS, (1,)),
}
"""Inputs that decide shapes or the kernel's form: they must be known at compile time."""


def refusal(node: NodeView) -> str | None:
    """Return why a node of a supported operator is not imported, or None."""
    for index in CONSTANT_INPUTS.get(node.op_type, ()):
        if index < len(node.inputs) and node.inputs[index] and node.values[index] is None:
            return f"input {index} is known at run time only; it must be a constant"
    rule = _RULES.get(node.op_type)
    return rule(node) if rule else None


def _dtype(node: NodeView, index: int = 0) -> str:
    given = node.inputs[index]
    return given[0] if given else ""


def _shape(node: NodeView, index: int = 0) -> tuple[int, ...]:
    given = node.inputs[index] if index < len(node.inputs) else None
    return given[1] if given else ()


def _more_outputs(node: NodeView) -> str | None:
    extra = [o for o in node.outputs[1:] if o]
    return f"only its first output is supported, {extra[0]!r} is another" if extra else None


def _scale(node: NodeView) -> str | None:
    """Refuse scales that no level has: every result would be NaN."""
    scale = node.values[1]
    if scale is None:
        return None
    given = np.asarray(scale, np.float64)
    bad = given[~np.isfinite(given)]
    if node.op_type == "QuantizeLinear":
        bad = given[~np.isfinite(given) | (given == 0)]
    if not bad.size:
        return None
    return f"its scale is {bad.flat[0]:g}, but must be finite and not 0: export the model again"


def _quantize_linear(node: NodeView) -> str | None:
    return _scale(node) or _blocked(node)


def _batch_normalization(node: NodeView) -> str | None:
    if node.attributes.get("training_mode", 0):
        return "training_mode is 1, only inference is supported"
    return _more_outputs(node)


def _attention(node: NodeView) -> str | None:
    """Refuse heads and inputs that do not fit: onnx's shape inference does not look at them."""
    if _dtype(node, 2) != _dtype(node):
        return f"values are {_dtype(node, 2)}, but queries {_dtype(node)}; they must be alike"
    cached = [_given(node, i) for i in (4, 5, 6)]
    if cached[0] != cached[1] or (cached[0] and cached[2]):
        return "past_key and past_value come together, and without nonpad_kv_seqlen"
    heads = [_shape(node, index)[1] for index in range(2)]
    if len(_shape(node)) == 3:
        heads = [node.attributes[f"{name}_num_heads"] for name in ("q", "kv")]
        widths = [(_shape(node, index)[2], heads[min(index, 1)]) for index in range(3)]
        for width, count in widths:
            if width % count:
                return f"{width} channels are not {count} heads of one size"
    if heads[0] % heads[1]:
        return f"{heads[0]} heads of queries cannot share {heads[1]} of keys"
    query, key, value = (_shape_of_heads(node, i, heads[min(i, 1)]) for i in range(3))
    if key != [query[0], heads[1], key[2], query[3]] or value[:3] != key[:3]:
        return (
            f"queries {query}, keys {key} and values {value} ([batch, heads, rows, depth]) do not "
            "fit: the batch of all three, heads and rows of keys and values, and depths of queries "
            "and keys must be alike"
        )
    keys = key[2]
    if cached[0]:
        past, others = list(_shape(node, 4)), list(_shape(node, 5))
        if len(past) != 4 or [*past[:2], past[3]] != [*key[:2], key[3]]:
            return f"past_key must be [{key[0]}, {key[1]}, any, {key[3]}], not {past}"
        if others != [*past[:3], value[3]]:
            return f"past_value must be {[*past[:3], value[3]]}, not {others}"
        keys += past[2]
    return _attention_mask(node, [*query[:3], keys]) or _attention_output(node)


def _shape_of_heads(node: NodeView, index: int, heads: int) -> list[int]:
    """Return ``[batch, heads, rows, depth]`` of an operand of three or four axes."""
    shape = list(_shape(node, index))
    if len(shape) == 4:
        return shape
    return [shape[0], heads, shape[1], shape[2] // heads]


def _attention_mask(node: NodeView, scores: list[int]) -> str | None:
    if not _given(node, 3):
        return None
    mask = list(_shape(node, 3))
    padded = [1] * (4 - len(mask)) + mask
    fits = len(padded) == 4 and mask and mask[-1] <= scores[-1]
    pairs = zip(padded[:3], scores, strict=False)
    if not fits or any(own not in (1, whole) for own, whole in pairs):
        return (
            f"a mask {mask} does not fit scores {scores}: its last axis is at most the keys, the "
            "others broadcast"
        )
    return None


def _given(node: NodeView, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _attention_output(node: NodeView) -> str | None:
    if node.attributes.get("qk_matmul_output_mode", 0) not in (0, 1, 2, 3):
        return "qk_matmul_output_mode must be 0, 1, 2 or 3"
    return None


def _conv(node: NodeView) -> str | None:
    """Refuse channels that do not fit: onnx's shape inference does not look at them."""
    data, weight = _shape(node), _shape(node, 1)
    group = node.attributes.get("group", 1)
    if data[1] != weight[1] * group or weight[0] % group:
        return (
            f"{data[1]} input and {weight[0]} output channels do not fit a weight of "
            f"{list(weight)} in {group} groups"
        )
    bias = _shape(node, 2)
    if bias and bias != weight[:1]:
        return f"a bias of {list(bias)} does not fit {weight[0]} output channels"
    return None


def _pool(node: NodeView) -> str | None:
    """Refuse windows that lie in the padding: ONNX's shape inference and runtimes differ there."""
    given, result = _shape(node)[2:], node.output_shape[2:]
    strides = node.attributes.get("strides", [1] * len(given))
    begins = [0] * len(given)
    if node.attributes.get("auto_pad", "NOTSET") == "NOTSET":
        begins = list(node.attributes.get("pads", begins))[: len(given)]
    for size, count, stride, begin in zip(given, result, strides, begins, strict=True):
        if (count - 1) * stride - begin >= size:
            return "a window that begins in the padding at the end is unsupported, see ceil_mode"
    return _more_outputs(node)


def _dropout(node: NodeView) -> str | None:
    if len(node.inputs) > 2 and node.inputs[2]:
        value = node.values[2]
        if value is None:
            return "training_mode is known at run time only; it must be a constant"
        if value.any():
            return "training_mode is true, only inference is supported"
    return None


def _signed(node: NodeView) -> str | None:
    if _dtype(node).startswith("int"):
        return "shifts of signed integers give other values in TVM where they exceed the width"
    return None


def _mod(node: NodeView) -> str | None:
    if "float" in _dtype(node) and not node.attributes.get("fmod", 0):
        return "floats with fmod = 0 give NaN in TVM where ONNX gives a remainder"
    return None


def _pow(node: NodeView) -> str | None:
    if "float" in _dtype(node):
        return None
    exponent = node.values[1]
    if exponent is not None and exponent.size == 1 and exponent.reshape(-1)[0] in (1, 2):
        return None
    return f"powers of {_dtype(node)} are supported for the exponents 1 and 2 only"


def _not_bool(node: NodeView) -> str | None:
    return "booleans are unsupported" if _dtype(node) == "bool" else None


def _rms_normalization(node: NodeView) -> str | None:
    rank = len(_shape(node))
    if rank and node.attributes.get("axis", -1) % rank == 0:
        return "a normalization over all axes is unsupported"
    return None


def _space_to_depth(node: NodeView) -> str | None:
    mode = node.attributes.get("mode", "DCR")
    return None if mode == "DCR" else f"mode {mode} is unsupported"


def _top_k(node: NodeView) -> str | None:
    kind = _dtype(node)
    return f"{kind} is unsupported" if kind.startswith("uint") or kind == "bool" else None


def _resize(node: NodeView) -> str | None:
    mode = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    given, result = _shape(node), node.output_shape
    if len(given) not in (3, 4, 5) or given[:2] != result[:2]:
        return "only the spatial axes of NCW, NCHW and NCDHW can be resized"
    if node.attributes.get("antialias", 0):
        return "antialias = 1 is unsupported"
    if mode == "half_pixel_symmetric":
        return "coordinate_transformation_mode half_pixel_symmetric is unsupported"
    if node.attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "keep_aspect_ratio_policy is unsupported unless it is stretch"
    if mode == "align_corners" and 1 in result[2:]:
        return "align_corners to size 1 is unsupported"
    scales = node.values[1 if node.op_type == "Upsample" or node.opset < 11 else 2 :][:1]
    if not scales or scales[0] is None or not scales[0].size:
        return None
    axes = node.attributes.get("axes") or range(len(given))
    for axis, scale in zip(axes, scales[0], strict=True):
        if abs(given[axis] * float(scale) - result[axis]) > 1e-3 * result[axis]:
            return (
                f"scale {float(scale):g} of axis {axis} gives no whole size from {given[axis]}; "
                "TVM computes with the ratio of the sizes instead"
            )
    return None


def _blocked(node: NodeView) -> str | None:
    if node.attributes.get("block_size", 0):
        return "blocked quantization is unsupported"
    return None


_RULES: Final[Mapping[str, Callable[[NodeView], str | None]]] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "BatchNormalization": _batch_normalization,
    "BitShift": _signed,
    "Conv": _conv,
    "DequantizeLinear": _scale,
    "Dropout": _dropout,
    "LayerNormalization": _more_outputs,
    "LpPool": _pool,
    "MaxPool": _pool,
    "Mod": _mod,
    "Pow": _pow,
    "QuantizeLinear": _quantize_linear,
    "RMSNormalization": _rms_normalization,
    "ReduceMax": _not_bool,
    "ReduceMin": _not_bool,
    "Resize": _resize,
    "SpaceToDepth": _space_to_depth,
    "TopK": _top_k,
    "Upsample": _resize,
}
"""By operator: what is refused, since TVM gives wrong values or fails after import."""
