"""Replaces calls of functions by their bodies: a model's own, and those of ONNX's operators.

Some ONNX operators (Celu, SwiGLU, RotaryEmbedding, CenterCropPad, …) are defined as functions of
others. One that hone does not import itself is imported as its definition says.
"""

from __future__ import annotations

from typing import Final

import onnx
from onnx import inliner

from hone.errors import ModelError

from .onnx_file import OnnxFile
from .operators import SUPPORTED

_PROTO_LIMIT_BYTES: Final = 1 << 31
_LEFT: Final = frozenset(("Bernoulli", "SequenceMap"))
"""Functions whose bodies hold what cannot be imported either: random values, sequences."""


def inline(file: OnnxFile) -> onnx.ModelProto:
    """Return the model without local functions, and without operators that only a function defines.

    Parameters
    ----------
    file : OnnxFile
        As it was read; its proto is returned where there is nothing to do.

    Raises
    ------
    ModelError
        A function is invalid, or the model is too large for onnx's inliner.
    """
    proto = file.proto
    defined = sorted(
        {n.op_type for n in proto.graph.node if n.domain in ("", "ai.onnx")} - SUPPORTED - _LEFT
    )
    expanded = [("", name) for name in defined if _is_function(name, file.opset)]
    if not proto.functions and not expanded:
        return proto
    if proto.ByteSize() >= _PROTO_LIMIT_BYTES:
        raise ModelError(
            "functions cannot be inlined in a model of 2 GiB or more",
            where=file.path,
            hint="inline them when exporting",
        )
    try:
        if proto.functions:
            proto = inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"the model's functions cannot be inlined: {str(error).strip()}", where=file.path
        ) from error
    try:
        if expanded:
            proto = inliner.inline_selected_functions(proto, expanded, inline_schema_functions=True)
    except (RuntimeError, ValueError):
        # The bodies of some depend on types that onnx does not infer. The operators stay, and are
        # listed as unsupported together with the model's other problems.
        return proto
    return proto


def _is_function(name: str, opset: int) -> bool:
    if not onnx.defs.has(name, opset):
        return False
    schema = onnx.defs.get_schema(name, opset, "")
    return bool(schema.has_function or schema.has_context_dependent_function)
