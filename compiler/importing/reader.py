"""Reads an ONNX graph into static form: shapes resolved, constants folded, every problem listed.

One walk in graph order does it all. A node whose inputs are all known is computed here, with
onnx's reference evaluator (a weight may come from ConstantOfShape, Identity, Transpose, …, and a
shape from Shape, Gather and Concat); for every other node onnx's own shape inference says what it
returns. No TVM is needed, so that ``hone check`` answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hone.signature import TensorSpec

from . import n_bits
from .graph import Graph, Node, Problem, attributes, dtype_name
from .inference import InferenceError, evaluate, first_line, infer, macs, opset_imports
from .inputs import resolve_inputs
from .layer_names import node_ids
from .nan_weights import nan_weights
from .onnx_file import OnnxFile
from .operators import DTYPES, NARROW, SUPPORTED, NodeView, refusal
from .unread_outputs import trimmed

FOLD_LIMIT_BYTES: Final = 256 << 20
"""A constant that would be larger is computed at run time. The largest weight of a common network,
a 50000 by 1024 embedding in fp32, has 195 MiB."""

_SHAPE_ONLY: Final = frozenset(("EyeLike", "Shape", "Size"))
"""Operators that read the shape of their input, not its values."""

_MOVES: Final = frozenset(("Identity", "Reshape", "Transpose"))
"""Operators between a dequantized weight and its layer."""

_RANDOM: Final = frozenset(
    (
        *("Bernoulli", "Multinomial"),
        *(f"Random{kind}{like}" for kind in ("Normal", "Uniform") for like in ("", "Like")),
    )
)


def read_graph(file: OnnxFile, shapes: Mapping[str, Sequence[int]]) -> Graph:
    """Resolve shapes, fold constants and find every problem.

    Parameters
    ----------
    file : OnnxFile
        The model; its local functions must have been inlined.
    shapes : mapping of str to sequence of int
        Shapes of inputs, for their dynamic dimensions.
    """
    reader = _Reader(file)
    reader.read_initializers()
    reader.read_inputs(shapes)
    reader.read_nodes()
    return reader.graph()


class _Reader:
    """The state of the walk."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.proto = file.proto.graph
        self.problems: list[Problem] = []
        self.inputs: list[TensorSpec] = []
        self.values: dict[str, TensorSpec] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.narrow: dict[str, str] = {}
        """Constants of less than 8 bits, and their types in the file."""
        self.unknown: set[str] = set()
        self.nodes: list[Node] = []
        self.weights_bytes = 0
        self.weights: set[str] = set()
        """Tensors that an operator with integer kernels reads as its weights."""

    # ------------------------------------------------------------ initializers and inputs

    def read_initializers(self) -> None:
        for tensor in self.proto.initializer:
            self._store(tensor, tensor.name, "initializer")
        for sparse in self.proto.sparse_initializer:
            self._problem(sparse.values.name, "initializer", "sparse initializers are unsupported")
            self.unknown.add(sparse.values.name)

    def _store(self, tensor: onnx.TensorProto, name: str, op: str) -> None:
        dtype = dtype_name(tensor.data_type)
        if dtype not in (*DTYPES, *NARROW):
            self._problem(name, op, f"element type {dtype} is unsupported")
            self.unknown.add(name)
            return
        try:
            array = numpy_helper.to_array(tensor).reshape(tuple(tensor.dims))
        except (ValueError, TypeError) as error:
            self._problem(
                name, op, f"{list(tensor.dims)} of {dtype} do not fit the bytes stored: {error}"
            )
            self.unknown.add(name)
            return
        stored = array.nbytes
        if dtype in NARROW:
            # Their readers take levels of 8 bits as well.
            wide, bits = NARROW[dtype]
            array, stored = array.astype(wide), -(-array.size * bits // 8)
            self.narrow[name] = dtype
        self.constants[name] = array
        self.weights_bytes += stored

    def read_inputs(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.inputs, problems = resolve_inputs(self.proto, shapes)
        self.problems += problems
        self.values.update({s.name: s for s in self.inputs})
        known = self.values.keys() | self.constants.keys()
        self.unknown.update(i.name for i in self.proto.input if i.name not in known)

    # ------------------------------------------------------------ nodes

    def read_nodes(self) -> None:
        self._read_all(self.proto.node, {o.name for o in self.proto.output})

    def _read_all(
        self, nodes: Iterable[onnx.NodeProto], wanted: set[str], prefix: str = ""
    ) -> None:
        protos = list(nodes)
        ids = node_ids((n.name, n.op_type, next(iter(n.output), "")) for n in protos)
        needed: list[tuple[onnx.NodeProto, str]] = []
        for proto, layer in zip(reversed(protos), reversed(ids), strict=True):
            if wanted.intersection(proto.output):
                self.weights.update(_weights(proto, self.weights))
                needed.append((trimmed(proto, wanted, self.file), prefix + layer))
                wanted.update(_reads(proto))
        for proto, layer in reversed(needed):
            branch = self._branch(proto)
            if branch is None:
                self._read_node(proto, layer)
            else:
                self._read_branch(branch, proto, layer)

    def _branch(self, proto: onnx.NodeProto) -> onnx.GraphProto | None:
        """Return the branch that an If takes, when its condition is known."""
        if proto.op_type != "If" or proto.domain or proto.input[0] not in self.constants:
            return None
        taken = "then_branch" if self.constants[proto.input[0]].any() else "else_branch"
        return next((a.g for a in proto.attribute if a.name == taken), None)

    def _read_branch(self, branch: onnx.GraphProto, proto: onnx.NodeProto, layer: str) -> None:
        for tensor in branch.initializer:
            self._store(tensor, tensor.name, "initializer")
        self._read_all(branch.node, {o.name for o in branch.output}, prefix=f"{layer}/")
        for result, name in zip(branch.output, proto.output, strict=False):
            if name:
                alias = helper.make_node("Identity", [result.name], [name])
                self._read_node(alias, f"{layer}/{name}")

    def _read_node(self, proto: onnx.NodeProto, layer: str) -> None:
        problems = self._invalid(proto)
        for message, fix in problems:
            self._problem(layer, proto.op_type, message, fix)
        if problems or self.unknown.intersection(proto.input):
            self._give_up(proto, layer, supported=not problems)
            return
        if self._foldable(proto) and self._fold(proto, layer):
            return
        try:
            if proto.op_type not in SUPPORTED:
                raise InferenceError(f"operator {proto.op_type} is unsupported")
            specs = infer(proto, self._spec, self.constants, self.file)
        except InferenceError as error:
            self._problem(layer, proto.op_type, str(error))
            self._give_up(proto, layer, supported=False)
            return
        reason = refusal(self._view(proto, specs[0]))
        if reason:
            self._problem(layer, proto.op_type, reason)
        self.values.update({spec.name: spec for spec in specs})
        shapes = [self._spec(i).shape for i in proto.input if i]
        self.nodes.append(
            Node(
                id=layer,
                proto=proto,
                outputs=tuple(specs),
                macs=macs(proto, shapes, specs[0].shape),
                supported=reason is None,
            )
        )

    def _give_up(self, proto: onnx.NodeProto, layer: str, *, supported: bool) -> None:
        self.unknown.update(o for o in proto.output if o)
        self.nodes.append(Node(id=layer, proto=proto, outputs=(), macs=0, supported=supported))

    def _invalid(self, proto: onnx.NodeProto) -> list[tuple[str, str]]:
        """Return messages, and what to do, for what is wrong whatever the inputs' types are."""
        found = [
            (f"input {name!r} is no input, weight or result of a node before", "")
            for name in proto.input
            if name and not self._known(name) and name not in self.unknown
        ]
        found += [
            (f"output {name!r} is computed twice", "") for name in proto.output if self._known(name)
        ]
        if proto.op_type != "DequantizeLinear":
            found += [
                (f"input {i!r} is {self.narrow[i]}, which only DequantizeLinear can read", "")
                for i in proto.input
                if i in self.narrow
            ]
        name, opset = proto.op_type, self.file.opset
        obstacle = n_bits.obstacle(proto, self.constants)
        if obstacle is not None:
            found.append(obstacle)
        elif proto.domain not in ("", "ai.onnx"):
            fix = "export the model for the standard ONNX domain only"
            found.append((f"operator {proto.domain}.{name} is unsupported", fix))
        elif not onnx.defs.has(name, opset):
            found.append((f"operator {name} is unknown to ONNX opset {opset}", ""))
        elif name not in SUPPORTED and not self._foldable(proto):
            found.append((f"operator {name} is unsupported", ""))
        if not found:
            try:
                onnx.checker.check_node(proto, self._context(proto))
            except (onnx.checker.ValidationError, UnicodeError) as error:
                found.append((f"invalid node: {first_line(error)}", ""))
        return found

    def _context(self, proto: onnx.NodeProto) -> Any:
        context = onnx.checker.C.CheckerContext()
        context.ir_version = self.file.proto.ir_version
        context.opset_imports = {o.domain: o.version for o in opset_imports(proto, self.file)}
        return context

    def _view(self, proto: onnx.NodeProto, first: TensorSpec) -> NodeView:
        specs = [self._spec(i) if i else None for i in proto.input]
        return NodeView(
            op_type=proto.op_type,
            attributes=attributes(proto),
            inputs=[(s.dtype, s.shape) if s else None for s in specs],
            values=[self.constants.get(i) if i else None for i in proto.input],
            outputs=list(proto.output),
            output_shape=first.shape,
            opset=self.file.opset,
        )

    def _known(self, name: str) -> bool:
        return name in self.values or name in self.constants

    def _spec(self, name: str) -> TensorSpec:
        if name in self.values:
            return self.values[name]
        array = self.constants[name]
        return TensorSpec(name=name, dtype=str(array.dtype), shape=array.shape)

    # ------------------------------------------------------------ folding

    def _foldable(self, proto: onnx.NodeProto) -> bool:
        if proto.op_type in _RANDOM or any(
            a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
            for a in proto.attribute
        ):
            return False
        if proto.op_type == "DequantizeLinear" and proto.output[0] in self.weights:
            return False  # integer kernels need the levels
        if proto.op_type in _SHAPE_ONLY:
            return self._known(proto.input[0])
        return all(i in self.constants for i in proto.input if i)

    def _fold(self, proto: onnx.NodeProto, layer: str) -> bool:
        if proto.op_type == "Constant":
            return self._fold_constant(proto, layer)
        if proto.op_type in ("Shape", "Size"):
            shape = self._spec(proto.input[0]).shape
            values = attributes(proto)
            picked = shape[values.get("start", 0) : values.get("end", len(shape))]
            result = picked if proto.op_type == "Shape" else math.prod(shape)
            self.constants[proto.output[0]] = np.asarray(result, np.int64)
            return True
        try:
            specs = infer(proto, self._spec, self.constants, self.file)
        except InferenceError:
            specs = None  # a shape that depends on data (NonZero) is known once it is computed
        if specs is not None and sum(map(_nbytes, specs)) > FOLD_LIMIT_BYTES:
            return False
        feeds = {i: self.constants[i] for i in proto.input if i in self.constants}
        if proto.op_type == "EyeLike":
            spec = self._spec(proto.input[0])
            feeds = {spec.name: np.zeros(spec.shape, spec.dtype)}
        arrays = evaluate(proto, feeds, self.file)
        if arrays is None:
            return False
        computed = {n: a for n, a in zip(proto.output, arrays, strict=True) if n}
        for spec in specs or ():
            array = computed[spec.name]
            if (str(array.dtype), array.shape) != (spec.dtype, spec.shape):
                return False  # onnx's evaluator and its inference disagree: trust neither
        self.constants.update(computed)
        return True

    def _fold_constant(self, proto: onnx.NodeProto, layer: str) -> bool:
        name = proto.output[0]
        if len(proto.attribute) != 1:
            self._problem(layer, "Constant", f"it has {len(proto.attribute)} values, required is 1")
            self.unknown.add(name)
            return True
        attribute = proto.attribute[0]
        if attribute.name == "value":
            self._store(attribute.t, name, f"Constant {layer!r}")
            return True
        dtype = {"value_float": np.float32, "value_floats": np.float32}.get(
            attribute.name, np.int64
        )
        if attribute.name not in ("value_float", "value_floats", "value_int", "value_ints"):
            self._problem(layer, "Constant", f"attribute {attribute.name} is unsupported")
            self.unknown.add(name)
            return True
        array = np.asarray(helper.get_attribute_value(attribute), dtype)
        self.constants[name] = array
        self.weights_bytes += array.nbytes
        return True

    # ------------------------------------------------------------ result

    def graph(self) -> Graph:
        outputs = []
        for value in self.proto.output:
            name = value.name
            if name in self.narrow:
                self._problem(name, "output", f"element type {self.narrow[name]} is unsupported")
            if self._known(name):
                outputs.append(self._spec(name))
            elif name not in self.unknown:
                self._problem(name, "output", "no node computes it")
        if not self.proto.output:
            self._problem(self.proto.name, "output", "the graph has no outputs")
        self.problems += nan_weights(self.weights, self.constants)
        read = {i for n in self.nodes for i in n.proto.input} | {o.name for o in self.proto.output}
        return Graph(
            inputs=tuple(self.inputs),
            outputs=tuple(outputs),
            nodes=tuple(self.nodes),
            values=self.values,
            constants={k: v for k, v in self.constants.items() if k in read},
            weights_bytes=self.weights_bytes,
            opset=self.file.opset,
            problems=tuple(self.problems),
        )

    def _problem(self, node: str, op: str, message: str, fix: str = "") -> None:
        self.problems.append(Problem(node=node, op=op, message=message, fix=fix))


def _weights(proto: onnx.NodeProto, known: set[str]) -> set[str]:
    """Return what a node reads as weights, or as what becomes weights."""
    if proto.op_type in ("Conv", "Gemm", "MatMul"):
        return set(proto.input[1:2])
    if proto.op_type == "Gather" and not attributes(proto).get("axis", 0):
        return set(proto.input[:1])
    if proto.op_type in _MOVES and proto.output[0] in known:
        return set(proto.input[:1])
    return set()


def _reads(proto: onnx.NodeProto) -> set[str]:
    """Names that a node reads, from within its subgraphs too."""
    names = {i for i in proto.input if i}
    for attribute in proto.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for node in graph.node:
                names |= _reads(node)
            names.update(o.name for o in graph.output)
    return names


def _nbytes(spec: TensorSpec) -> int:
    size = 2 if spec.dtype == "bfloat16" else np.dtype(spec.dtype).itemsize
    return math.prod(spec.shape) * size
