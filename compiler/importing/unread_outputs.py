"""Leaves out the optional outputs of ONNX nodes that nothing reads."""

from __future__ import annotations

import onnx

from .graph import attributes
from .inference import schema_opset
from .onnx_file import OnnxFile


def trimmed(proto: onnx.NodeProto, wanted: set[str], file: OnnxFile) -> onnx.NodeProto:
    """Leave out the optional outputs that nothing reads, such as a dropout's mask.

    Others stay: how many parts a split has says how large they are.
    """
    if len(proto.output) == 1 or wanted.issuperset(proto.output):
        return proto
    if attributes(proto).get("training_mode", 0):
        return proto  # it is refused for its mode, not for the outputs that this needs
    optional = _optional_outputs(proto, file)
    kept = [
        "" if index in optional and name not in wanted else name
        for index, name in enumerate(proto.output)
    ]
    while not kept[-1]:
        kept.pop()
    copy = onnx.NodeProto()
    copy.CopyFrom(proto)
    del copy.output[:]
    copy.output.extend(kept)
    return copy


def _optional_outputs(proto: onnx.NodeProto, file: OnnxFile) -> set[int]:
    try:
        schema = onnx.defs.get_schema(proto.op_type, schema_opset(proto, file.opset), proto.domain)
    except onnx.defs.SchemaError:
        return set()  # no operator of this opset: it is refused, or converted as a whole
    options = onnx.defs.OpSchema.FormalParameterOption
    return {i for i, o in enumerate(schema.outputs) if o.option == options.Optional}
