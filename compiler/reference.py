"""onnxruntime as the reference: what the source model computes, layer by layer if wanted."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from .model import Model

_PROTO_LIMIT_BYTES: Final = (1 << 31) - (1 << 20)
"""Protobuf serializes less than 2 GiB; larger models go through a file with external data."""

_ACCURACY: Final = "accuracy_level"

_NOISE: Final = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : "
    r"|Exception during initialization: "
    r"|Non-zero status code returned while |Name:'' Status Message: "
    # a place in the source and the function there, as the compiler writes its signature
    r"|\S+\.(?:cc|cpp|h|cuh):\d+ (?:[\w:<>~ ]+\([^()]*\)(?: const)?(?: \[with [^\]]*\])? |\w+ )?"
    r"|\S+ (?:==|!=|<=?|>=?) \S+ was false\. "
)
"""What onnxruntime's messages say to those who write onnxruntime."""


class NotCheckedError(Exception):
    """onnxruntime cannot run the model; says why."""


class Reference:
    """A model in onnxruntime.

    Its graph optimizations are off but for constant folding, so that it computes what the model
    says, operator by operator.

    Parameters
    ----------
    proto : onnx.ModelProto
        With static shapes.
    extra : sequence of str
        Tensors inside the graph whose values are wanted too.
    threads : int
        Of one operator; at most as many as there are processors.

    Raises
    ------
    NotCheckedError
        It lacks an operator, a data type or the opset.
    """

    def __init__(self, proto: onnx.ModelProto, *, extra: Sequence[str] = (), threads: int) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Threads beyond the processors cost onnxruntime seconds, thousands of them minutes.
        options.intra_op_num_threads = min(threads, len(os.sched_getaffinity(0)))
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # it would write its reasons to stderr as well
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        if extra:
            # Folded and fused nodes have no result to show.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            proto = _with_outputs(proto, extra)
        self._errors = onnxruntime.capi.onnxruntime_pybind11_state
        proto = _in_float(proto)
        try:
            self._session = _open(proto, options)
        except Exception as error:
            raise NotCheckedError(_reason(error)) from error
        self._names = [o.name for o in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs, and the extra tensors, by name."""
        try:
            values = self._session.run(self._names, dict(inputs))
        except Exception as error:
            raise NotCheckedError(_reason(error)) from error
        return dict(zip(self._names, values, strict=True))


def reference(model: Model, *, extra: Sequence[str] = (), threads: int = 2) -> Reference:
    """Return a model's source in onnxruntime.

    Raises
    ------
    NotCheckedError
        The model was imported without its source, or onnxruntime cannot run it.
    """
    if model.source is None:
        raise NotCheckedError("the model's ONNX source was not kept")
    return Reference(model.source, extra=extra, threads=threads)


def _open(proto: onnx.ModelProto, options: Any) -> Any:
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    if proto.ByteSize() < _PROTO_LIMIT_BYTES:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers)
    with tempfile.TemporaryDirectory(prefix="hone-reference-") as folder:
        path = Path(folder, "model.onnx")
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        onnx.save(copy, str(path), save_as_external_data=True, location="weights")
        return onnxruntime.InferenceSession(str(path), options, providers)


def _in_float(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without leave to compute weight-only products in integers.

    ``accuracy_level`` says which precision is enough; from 4 on onnxruntime rounds the inputs of
    MatMulNBits to 8 bits, by scales of its own, which the model does not say.
    """
    if not any(a.name == _ACCURACY for node in proto.graph.node for a in node.attribute):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in copy.graph.node:
        kept = [a for a in node.attribute if a.name != _ACCURACY]
        del node.attribute[:]
        node.attribute.extend(kept)
    return copy


def _with_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    known = {o.name for o in copy.graph.output}
    copy.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in known
    )
    return copy


def _reason(error: Exception) -> str:
    """Return onnxruntime's own words, without its codes and the places in its source."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "onnxruntime cannot run it: " + _NOISE.sub("", text)
