"""How far correct runs of a quantized model may lie apart, from the model itself.

A quantized model rounds after every layer, and where a real value lies on the border of two levels
two correct runtimes may round to either. One such level moves the sums of the next layer, and so
other roundings: in a deep network the outputs of two correct runtimes differ by several levels.
What bounds it is the rounding of the model itself, which is measured, as the distance between the
model and the same one without rounding (its weights quantized, its activations clipped to the range
of their levels, but not rounded). Both runtimes are about so far from the unrounded model, each in
its own direction, so that they are at most twice as far from one another::

    allowed = max(LEVELS × level, 2 × max|rounded - unrounded|)

Measured with onnxruntime's quantizer and seeded inputs, in levels of the output: a digits network
of 4 layers differs by 0 (2 allowed), ResNet-18 by 2 (4 allowed), MobileNetV2 with random weights by
7 (28 allowed; onnxruntime differs from itself, with and without its integer kernels, by 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .importing.qdq import rewrite
from .reference import Reference

LEVELS: Final = 2
"""Levels of an output that another rounding may move it by: one by the last quantization itself,
one by the sum before it, whose terms came from levels that were rounded otherwise."""

_THROUGH: Final = frozenset(
    (
        *("Concat", "Flatten", "Identity", "MaxPool", "Relu", "Reshape", "Slice", "Squeeze"),
        *("Transpose", "Unsqueeze"),
    )
)
"""Operators whose results are among the values that they read."""


_FLOAT_NOISE: Final = 1e-4
"""Of an allowance, for the float32 arithmetic that turns levels into real values."""


def is_quantized(proto: onnx.ModelProto) -> bool:
    """Tell whether a model quantizes activations."""
    return any(node.op_type == "QuantizeLinear" for node in rewrite(proto).graph.node)


class Allowance:
    """What the tensors of a quantized model may differ by, see the module.

    Parameters
    ----------
    proto : onnx.ModelProto
        With static shapes.
    extra : sequence of str
        Tensors inside the graph that are compared too.
    threads : int
        Of onnxruntime.

    Raises
    ------
    NotCheckedError
        onnxruntime cannot run it.
    """

    def __init__(self, proto: onnx.ModelProto, *, extra: Sequence[str] = (), threads: int) -> None:
        qdq = rewrite(proto)
        self._sizes = level_sizes(qdq)
        self._unrounded = Reference(without_rounding(qdq), extra=extra, threads=threads)

    def of(
        self, inputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
    ) -> dict[str, float]:
        """Return the absolute difference that each tensor of a run may have.

        Parameters
        ----------
        inputs : mapping of str to ndarray
            Of the run.
        expected : mapping of str to ndarray
            What onnxruntime makes of them, with rounding.
        """
        unrounded = self._unrounded.run(inputs)
        allowed = {}
        for name, value in expected.items():
            moved = np.abs(value.astype(np.float64) - unrounded[name].astype(np.float64))
            rounding = float(np.max(moved, where=np.isfinite(moved), initial=0.0))
            size = self._sizes.get(name, 0.0)
            allowed[name] = max(LEVELS * size, 2 * rounding) * (1 + _FLOAT_NOISE)
        return allowed


def level_sizes(proto: onnx.ModelProto) -> dict[str, float]:
    """Return the distance of two neighbouring levels, for each tensor that has levels.

    Parameters
    ----------
    proto : onnx.ModelProto
        In QDQ form, see `hone.importing.qdq`.

    Returns
    -------
    dict of str to float
        By tensor name: 1 for the integers of a quantization, the scale for real values made of
        them, the largest one where several are joined.
    """
    constants = _constants(proto)
    sizes: dict[str, float] = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            sizes[node.output[0]] = 1.0
        elif node.op_type == "DequantizeLinear" and node.input[1] in constants:
            sizes[node.output[0]] = float(np.max(constants[node.input[1]]))
        elif node.op_type in _THROUGH:
            read = node.input if node.op_type == "Concat" else node.input[:1]
            known = [sizes[name] for name in read if name in sizes]
            if known:
                sizes[node.output[0]] = max(known)
    return sizes


def without_rounding(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that clips where another rounds to levels.

    ``dequantize(quantize(x))`` becomes ``clip(x, (least - z) × s, (most - z) × s)``. Levels that
    something else reads are left as they are.

    Parameters
    ----------
    proto : onnx.ModelProto
        In QDQ form.
    """
    constants = _constants(proto)
    unrounded = onnx.ModelProto()
    unrounded.CopyFrom(proto)
    graph = unrounded.graph
    makers = {n.output[0]: n for n in graph.node if n.op_type == "QuantizeLinear"}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        bounds = None if maker is None else _bounds(maker, constants)
        if maker is None or bounds is None:
            nodes.append(node)
            continue
        names = [f"{node.output[0]}/{end}" for end in ("least", "most")]
        graph.initializer.extend(
            numpy_helper.from_array(b, n) for b, n in zip(bounds, names, strict=True)
        )
        nodes.append(helper.make_node("Clip", [maker.input[0], *names], [node.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)
    return unrounded


def _bounds(
    node: onnx.NodeProto, constants: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the ends of a quantization's range, None for one that is not per tensor."""
    if len(node.input) < 2 or node.input[1] not in constants:
        return None
    scale = constants[node.input[1]]
    point = np.zeros((), np.uint8)
    if len(node.input) > 2 and node.input[2]:
        if node.input[2] not in constants:
            return None
        point = constants[node.input[2]]
    if scale.size != 1 or scale.dtype != np.float32 or point.dtype.kind not in "iu":
        return None
    limits = np.iinfo(point.dtype)
    least, most = (
        ((np.float64(end) - point) * scale).astype(np.float32).reshape(())
        for end in (limits.min, limits.max)
    )
    return least, most


def _constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.dims == []}
    constants |= {
        t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if len(t.dims) == 1
    }
    for node in proto.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    constants[node.output[0]] = numpy_helper.to_array(attribute.t)
    return constants
