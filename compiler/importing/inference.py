"""What one ONNX node returns: its types by onnx's shape inference, its value where all is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hone.signature import TensorSpec

from .graph import attributes, dtype_name, elem_type, type_proto
from .onnx_file import OnnxFile
from .operators import DTYPES, WEIGHTED

_DATA_ELEMENTS: Final = 4096
"""Shape inference needs the values of shapes, axes, pads and scales, never those of weights."""

_LIKE_FIRST_INPUT: Final = frozenset(("GroupNormalization",))
"""Functions of other operators, for which onnx infers nothing."""


_PER_AXIS_OPSET: Final = 13
"""QuantizeLinear and DequantizeLinear have an axis from here on, and are otherwise what they were
in opset 10. QLinearConv had scales for each channel from the start: its rewriting needs them."""


_BLOCKED_OPSET: Final = 21
"""Both have blocks from here on; in onnxruntime's own domain they have them in any opset."""


def schema_opset(proto: onnx.NodeProto, opset: int) -> int:
    """Return the opset whose definition of a node's operator is used for a model's opset."""
    if proto.op_type not in ("DequantizeLinear", "QuantizeLinear"):
        return opset
    blocked = any(a.name == "block_size" and a.i for a in proto.attribute)
    return max(opset, _BLOCKED_OPSET if blocked else _PER_AXIS_OPSET)


def opset_imports(proto: onnx.NodeProto, file: OnnxFile) -> list[onnx.OperatorSetIdProto]:
    """Return a model's opsets, as they hold for one of its nodes."""
    opset = schema_opset(proto, file.opset)
    others = [o for o in file.proto.opset_import if o.domain not in ("", "ai.onnx")]
    return [helper.make_opsetid("", opset), *others]


class InferenceError(Exception):
    """The node's types do not fit together, or its result's shape is not static."""


def infer(
    proto: onnx.NodeProto,
    spec: Callable[[str], TensorSpec],
    constants: Mapping[str, np.ndarray],
    file: OnnxFile,
) -> list[TensorSpec]:
    """Return the types of a node's outputs, without those that are left out.

    Parameters
    ----------
    proto : onnx.NodeProto
        Of the default domain.
    spec : callable
        Returns the type of an input by its name.
    constants : mapping of str to ndarray
        Inputs whose values are known.
    file : OnnxFile
        For its opsets.

    Raises
    ------
    InferenceError
        Says what does not fit.
    """
    schema = onnx.defs.get_schema(proto.op_type, schema_opset(proto, file.opset), "")
    names = [i for i in proto.input if i]
    _check_types(schema, proto, spec, file.opset)
    small = [i for i in names if i in constants and constants[i].size <= _DATA_ELEMENTS]
    shown = ", ".join(str(spec(i)) for i in names)
    try:
        types = onnx.shape_inference.infer_node_outputs(
            schema,
            proto,
            {i: type_proto(spec(i)) for i in names},
            {i: numpy_helper.from_array(constants[i], i) for i in small},
            opset_imports=opset_imports(proto, file),
            ir_version=file.proto.ir_version,
        )
    except onnx.shape_inference.InferenceError as error:
        raise InferenceError(f"{first_line(error)}; inputs are {shown}") from error
    if proto.op_type in _LIKE_FIRST_INPUT:
        types = {proto.output[0]: type_proto(spec(proto.input[0]))}
    outputs = [_output(name, types.get(name, onnx.TypeProto())) for name in proto.output if name]
    at_run_time = [i for i in names[1:] if i not in constants]
    for name, output in zip((o for o in proto.output if o), outputs, strict=True):
        if output is None:
            because = f"inputs are {shown}"
            if at_run_time:
                because = f"it depends on {at_run_time[0]!r}, which is known at run time only"
            raise InferenceError(f"the shape of {name!r} cannot be determined; {because}")
        if output.dtype not in DTYPES:
            raise InferenceError(f"element type {output.dtype} is unsupported")
    return [o for o in outputs if o is not None]


def _output(name: str, value: onnx.TypeProto) -> TensorSpec | None:
    """Return an inferred type, None where its shape is not static."""
    tensor = value.tensor_type
    sizes = tuple(d.dim_value for d in tensor.shape.dim)
    if not tensor.HasField("shape") or any(size < 1 for size in sizes):
        return None
    return TensorSpec(name=name, dtype=dtype_name(tensor.elem_type), shape=sizes)


def _check_types(
    schema: Any, proto: onnx.NodeProto, spec: Callable[[str], TensorSpec], opset: int
) -> None:
    """Check dtypes against the operator's constraints; onnx's inference does not."""
    bound: dict[str, TensorSpec] = {}
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    for index, name in enumerate(proto.input):
        if not name:
            continue
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        given = spec(name)
        kind = helper.tensor_dtype_to_string(elem_type(given.dtype)).removeprefix("TensorProto.")
        if f"tensor({kind.lower()})" not in allowed.get(formal.type_str, [formal.type_str]):
            raise InferenceError(
                f"input {name!r} is {given.dtype}, which opset {opset} does not allow"
            )
        if not formal.is_homogeneous:
            continue
        first = bound.setdefault(formal.type_str, given)
        if first.dtype != given.dtype:
            raise InferenceError(
                f"input {name!r} is {given.dtype}, but {first.name!r} is {first.dtype}"
            )


def evaluate(
    proto: onnx.NodeProto, feeds: Mapping[str, np.ndarray], file: OnnxFile
) -> list[np.ndarray] | None:
    """Compute a node with onnx's reference evaluator.

    Parameters
    ----------
    proto : onnx.NodeProto
        Of the default domain.
    feeds : mapping of str to ndarray
        Its inputs.
    file : OnnxFile
        For its opsets.

    Returns
    -------
    list of ndarray or None
        One for each output, empty where it is left out. None where the evaluator cannot: the node
        is left to run time, or is a problem there.
    """
    from onnx.reference import ReferenceEvaluator

    outputs = [o for o in proto.output if o]
    types = {
        name: helper.make_tensor_type_proto(elem_type(str(array.dtype)), array.shape)
        for name, array in feeds.items()
    }
    graph = helper.make_graph(
        [proto],
        "fold",
        [helper.make_value_info(name, value) for name, value in types.items()],
        [helper.make_value_info(name, onnx.TypeProto()) for name in outputs],
    )
    model = helper.make_model(
        graph,
        opset_imports=opset_imports(proto, file),
        ir_version=file.proto.ir_version,
    )
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(model).run(None, dict(feeds))
    except Exception:  # noqa: BLE001 - it raises anything
        return None
    computed = dict(zip(outputs, map(np.asarray, results), strict=True))
    if any(str(array.dtype) not in DTYPES for array in computed.values()):
        return None
    return [computed[name] if name else np.empty(0) for name in proto.output]


def macs(proto: onnx.NodeProto, inputs: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Return the multiply-accumulates of a node: output elements times the terms of each sum."""
    if proto.op_type not in WEIGHTED:
        return 0
    if proto.op_type in ("Conv", "ConvInteger"):
        return math.prod(output) * math.prod(inputs[1][1:])
    if proto.op_type == "ConvTranspose":
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    transposed = proto.op_type == "Gemm" and attributes(proto).get("transA", 0)
    return math.prod(output) * inputs[0][0 if transposed else -1]


def first_line(error: Exception) -> str:
    """Return the first line of what onnx says."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text.removeprefix("[ShapeInferenceError] ").removesuffix(".")
