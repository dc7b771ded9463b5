"""Rewrites ONNX's quantized operators as QDQ: dequantize → float operator → quantize.

Covers QLinearConv, QLinearMatMul, ConvInteger and MatMulInteger of the standard, and what
onnxruntime's quantizer writes in its own domain (QGemm, QLinearAdd, QLinearConcat, MatMulNBits, …).
The float operator keeps the layer's id; what is added around it is named ``<id>/QuantizeLinear``
and so on.
The tensors of the model keep their names. `hone.passes.quantize.match_qdq` makes integer operators
of the result. Numerics: exact, as QDQ is how the standard defines these operators; an integer
operator is rewritten only where float32 holds all of its sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import n_bits
from .graph import attributes, elem_type
from .layer_names import node_ids

MICROSOFT: Final = "com.microsoft"

# float32 holds every integer up to here, so sums that stay below it are exact in any order.
_EXACT: Final = 1 << 24


def rewrite(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose quantized operators are QDQ, the very same one where it has none.

    A node that does not have the form that can be rewritten stays, and is reported as unsupported
    with the model's other problems.

    Parameters
    ----------
    proto : onnx.ModelProto
        With local functions inlined.
    """
    graph = proto.graph
    if not any(_rule(node) for node in graph.node):
        return proto
    ids = node_ids((n.name, n.op_type, next(iter(n.output), "")) for n in graph.node)
    known = _Known.of(graph)
    nodes: list[onnx.NodeProto] = []
    added: list[onnx.TensorProto] = []
    replaced: set[str] = set()
    for node, layer in zip(graph.node, ids, strict=True):
        rule = _rule(node)
        expansion = _Expansion(node=node, layer=layer, known=known)
        if rule is not None and rule(expansion):
            nodes += expansion.nodes
            added += expansion.initializers
            replaced.update(expansion.replaced)
        else:
            kept = onnx.NodeProto()
            kept.CopyFrom(node)
            kept.name = layer  # nodes that are added must not change how others are numbered
            nodes.append(kept)
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(proto)
    del rewritten.graph.node[:]
    rewritten.graph.node.extend(nodes)
    if replaced:
        kept_tensors = [
            t for t in graph.initializer if t.name not in replaced - _read(nodes, graph)
        ]
        del rewritten.graph.initializer[:]
        rewritten.graph.initializer.extend(kept_tensors)
    rewritten.graph.initializer.extend(added)
    return rewritten


def _read(nodes: Iterable[onnx.NodeProto], graph: onnx.GraphProto) -> set[str]:
    """Return names that nodes, their branches and the outputs read."""
    names = {output.name for output in graph.output}
    for node in nodes:
        names.update(node.input)
        for attribute in node.attribute:
            for branch in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                names |= _read(branch.node, branch)
    return names


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What the graph says about its tensors without any inference."""

    constants: Mapping[str, onnx.TensorProto]
    types: Mapping[str, onnx.TypeProto.Tensor]
    names: set[str]

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> _Known:
        constants = {t.name: t for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and not node.domain:
                constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
        values = (*graph.input, *graph.value_info, *graph.output)
        names = {name for node in graph.node for name in (*node.input, *node.output)}
        return cls(
            constants=constants,
            types={v.name: v.type.tensor_type for v in values if v.type.HasField("tensor_type")},
            names=names | set(constants) | {v.name for v in values},
        )

    def value(self, name: str) -> np.ndarray | None:
        """Return a constant's value."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a tensor's shape where the graph states it; -1 for an unknown size."""
        if name in self.constants:
            return tuple(self.constants[name].dims)
        if name not in self.types or not self.types[name].HasField("shape"):
            return None
        return tuple(d.dim_value or -1 for d in self.types[name].shape.dim)

    def elem_type(self, name: str) -> int:
        """Return a tensor's ONNX element type, ``UNDEFINED`` where the graph does not state it."""
        if name in self.constants:
            return int(self.constants[name].data_type)
        return int(self.types[name].elem_type) if name in self.types else TensorProto.UNDEFINED

    def is_single(self, name: str) -> bool:
        """Tell whether a scale or zero point is one number; one that is left out is."""
        return not name or self.shape(name) in ((), (1,))


@dataclass(kw_only=True)
class _Expansion:
    """The nodes that replace one."""

    node: onnx.NodeProto
    layer: str
    known: _Known
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    replaced: tuple[str, ...] = ()
    """Constants that others took the place of."""

    def input(self, index: int) -> str:
        """Return an input's name, empty where it is left out."""
        return str(self.node.input[index]) if index < len(self.node.input) else ""

    @property
    def attributes(self) -> dict[str, Any]:
        """The node's attributes."""
        return attributes(self.node)

    def emit(
        self, op: str, inputs: Sequence[str], *, name: str = "", output: str = "", **attrs: Any
    ) -> str:
        """Append a node of the standard domain, and return its output's name."""
        output = output or self._fresh(op)
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        name = name or f"{self.layer}/{op}" + (f"_{len(self.nodes)}" if self.nodes else "")
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attrs))
        return output

    def constant(self, what: str, value: np.ndarray) -> str:
        """Append an initializer, and return its name."""
        name = self._fresh(what)
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def scale(self, name: str) -> str:
        """Return a float32 scale: sums in float16 would not be those of integers."""
        if self.known.elem_type(name) in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            return self.emit("Cast", [name], to=TensorProto.FLOAT)
        return name

    def real(self, x: int, *, axis: int | None = None) -> str:
        """Return the real values of input ``x``, followed by its scale and zero point."""
        attrs: dict[str, Any] = {} if axis is None else {"axis": axis}
        return self.emit(
            "DequantizeLinear",
            [self.input(x), self.scale(self.input(x + 1)), self.input(x + 2)],
            **attrs,
        )

    def main(self, op: str, inputs: Sequence[str], **attrs: Any) -> str:
        """Append the float operator, which is the layer."""
        return self.emit(op, inputs, name=self.layer, **attrs)

    def levels(self, real: str, scale: int) -> None:
        """Quantize the result by input ``scale`` and the zero point after it."""
        self.emit(
            "QuantizeLinear",
            [real, self.scale(self.input(scale)), self.input(scale + 1)],
            name=f"{self.layer}/QuantizeLinear",
            output=self.node.output[0],
        )

    def single(self, *indices: int) -> bool:
        """Tell whether scales, and the zero points after them, are single numbers."""
        names = [self.input(j) for i in indices for j in (i, i + 1)]
        return all(self.known.is_single(name) for name in names)

    def product(self, left: str, right: str, *, alpha: float = 1.0) -> str:
        """Return the product of two scales, computed here where both are known."""
        values = [self.known.value(name) for name in (left, right)]
        if values[0] is None or values[1] is None:
            return self.emit("Mul", [self.scale(left), self.scale(right)])
        product = values[0].astype(np.float32) * values[1].astype(np.float32) * np.float32(alpha)
        return self.constant("scale", product if product.size > 1 else product.reshape(()))

    def _fresh(self, what: str) -> str:
        stem = f"{next(iter(self.node.output), '')}/{what}"
        name, number = stem, 0
        while name in self.known.names:
            number += 1
            name = f"{stem}_{number}"
        self.known.names.add(name)
        return name


Rule = Callable[[_Expansion], bool]
"""Appends what replaces a node; False where the node must stay."""


def _qlinear_conv(e: _Expansion) -> bool:
    if not e.single(1, 6) or not e.input(7):
        return False
    shape = e.known.shape(e.input(4))
    if shape is None or len(shape) > 1:
        return False
    axis = None if e.known.is_single(e.input(4)) else 0
    inputs = [e.real(0), e.real(3, axis=axis)]
    if e.input(8):
        inputs.append(_bias(e, 8, e.product(e.input(1), e.input(4)), axis))
    e.levels(e.main("Conv", inputs, **e.attributes), 6)
    return True


def _bias(e: _Expansion, index: int, scale: str, axis: int | None) -> str:
    attrs: dict[str, Any] = {} if axis is None else {"axis": 0}
    return e.emit("DequantizeLinear", [e.input(index), scale], **attrs)


def _qlinear_matmul(e: _Expansion) -> bool:
    shape = e.known.shape(e.input(4))
    if not e.single(1, 6) or not e.input(7) or shape is None or len(shape) > 1:
        return False
    axis = None if e.known.is_single(e.input(4)) else -1
    e.levels(e.main("MatMul", [e.real(0), e.real(3, axis=axis)]), 6)
    return True


def _q_gemm(e: _Expansion) -> bool:
    attrs = e.attributes
    shape = e.known.shape(e.input(4))
    if not e.single(1, 7) or shape is None or len(shape) > 1:
        return False
    axis = None if e.known.is_single(e.input(4)) else (0 if attrs.get("transB", 0) else 1)
    inputs = [e.real(0), e.real(3, axis=axis)]
    if e.input(6):
        alpha = float(attrs.get("alpha", 1.0))
        if alpha != 1 and any(e.known.value(e.input(i)) is None for i in (1, 4)):
            return False
        scale = e.product(e.input(1), e.input(4), alpha=alpha)
        inputs.append(_bias(e, 6, scale, axis))
    if not e.input(7):
        e.main("Gemm", inputs, output=e.node.output[0], **attrs)
        return True
    if not e.input(8):
        return False
    e.levels(e.main("Gemm", inputs, **attrs), 7)
    return True


def _binary(op: str) -> Rule:
    def rule(e: _Expansion) -> bool:
        if not e.single(1, 4, 6) or not e.input(7):
            return False
        e.levels(e.main(op, [e.real(0), e.real(3)]), 6)
        return True

    return rule


def _unary(op: str) -> Rule:
    def rule(e: _Expansion) -> bool:
        attrs = e.attributes
        if attrs.pop("channels_last", 0) or not e.single(1, 3) or not e.input(4):
            return False
        e.levels(e.main(op, [e.real(0)], **attrs), 3)
        return True

    return rule


def _concat(e: _Expansion) -> bool:
    starts = range(2, len(e.node.input), 3)
    if not e.single(0, *(i + 1 for i in starts)) or not e.input(1):
        return False
    e.levels(e.main("Concat", [e.real(i) for i in starts], **e.attributes), 0)
    return True


def _standard(op: str) -> Rule:
    """Return the rule for onnxruntime's own form of an operator that the standard has as well."""

    def rule(e: _Expansion) -> bool:
        e.main(op, list(e.node.input), output=e.node.output[0], **e.attributes)
        return True

    return rule


def _integer(op: str) -> Rule:
    """Integer sums, in float32 where it holds them: the weights say how large they can become."""

    def rule(e: _Expansion) -> bool:
        weight, zero_point = e.known.value(e.input(1)), e.known.value(e.input(3))
        if weight is None or (e.input(3) and zero_point is None):
            return False
        if not e.known.is_single(e.input(2)) or (op == "MatMul" and weight.ndim != 2):
            return False
        channel = 0 if op == "Conv" else 1
        points = np.zeros((), np.int64) if zero_point is None else zero_point.astype(np.int64)
        per_channel = points.size > 1
        if per_channel and points.shape != (weight.shape[channel],):
            return False
        rows = np.moveaxis(weight.astype(np.int64), channel, 0).reshape(weight.shape[channel], -1)
        sums = np.abs(rows - points.reshape(-1, 1)).sum(1)
        if sums.max(initial=0) * 255 >= _EXACT:
            return False
        one = e.constant("one", np.ones((), np.float32))
        ones = e.constant("ones", np.ones(points.shape, np.float32)) if per_channel else one
        attrs: dict[str, Any] = {"axis": channel} if per_channel else {}
        data = e.emit("DequantizeLinear", [e.input(0), one, e.input(2)])
        filters = e.emit("DequantizeLinear", [e.input(1), ones, e.input(3)], **attrs)
        sums_name = e.main(op, [data, filters], **e.attributes)
        e.emit("Cast", [sums_name], output=e.node.output[0], to=elem_type("int32"))
        return True

    return rule


def _n_bits(e: _Expansion) -> bool:
    """MatMulNBits: its weight in blocks, dequantized for a MatMul; exact, and a float addition."""
    names = tuple(name for name in e.node.input[1:4] if name in e.known.constants)
    constants = {name: numpy_helper.to_array(e.known.constants[name]) for name in names}
    if n_bits.obstacle(e.node, constants) is not None:
        return False
    blocks = n_bits.read_blocks(e.node, constants)
    if blocks.zero_point.dtype == blocks.levels.dtype:
        weight = e.emit(
            "DequantizeLinear",
            [
                e.constant("levels", blocks.levels),
                e.constant("scale", blocks.scale),
                e.constant("zero_point", blocks.zero_point),
            ],
            axis=0,
            block_size=blocks.size,
        )
    else:
        weight = e.constant("weight", blocks.real)
    if e.input(5):
        product = e.main("MatMul", [e.input(0), weight])
        e.emit("Add", [product, e.input(5)], output=e.node.output[0])
    else:
        e.main("MatMul", [e.input(0), weight], output=e.node.output[0])
    e.replaced = names
    return True


_RULES: Final[Mapping[tuple[str, str], Rule]] = {
    ("", "ConvInteger"): _integer("Conv"),
    ("", "MatMulInteger"): _integer("MatMul"),
    ("", "QLinearConv"): _qlinear_conv,
    ("", "QLinearMatMul"): _qlinear_matmul,
    (MICROSOFT, "DequantizeLinear"): _standard("DequantizeLinear"),
    (MICROSOFT, n_bits.OPERATOR): _n_bits,
    (MICROSOFT, "QGemm"): _q_gemm,
    (MICROSOFT, "QLinearAdd"): _binary("Add"),
    (MICROSOFT, "QLinearAveragePool"): _unary("AveragePool"),
    (MICROSOFT, "QLinearConcat"): _concat,
    (MICROSOFT, "QLinearGlobalAveragePool"): _unary("GlobalAveragePool"),
    (MICROSOFT, "QLinearLeakyRelu"): _unary("LeakyRelu"),
    (MICROSOFT, "QLinearMul"): _binary("Mul"),
    (MICROSOFT, "QLinearSigmoid"): _unary("Sigmoid"),
    (MICROSOFT, "QuantizeLinear"): _standard("QuantizeLinear"),
}
"""By domain and operator."""

REWRITTEN: Final[Iterable[str]] = tuple(sorted({name for _, name in _RULES}))
"""Names of the operators that can be rewritten."""


def _rule(node: onnx.NodeProto) -> Rule | None:
    return _RULES.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
