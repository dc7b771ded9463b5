"""Reads an ONNX graph into static form: shapes resolved, constants folded, every problem listed.

One walk in graph order does it all. A node whose inputs are all known is computed here, with
onnx's reference evaluator (a weight may come from ConstantOfShape, Identity, Transpose, …, and a
shape from Shape, Gather and Concat); for every other node onnx's own shape inference says what it
returns. No TVM is needed, so that ``hone check`` answers at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .errors import ModelError
from .layer_names import node_ids
from .onnx_file import OnnxFile
from .onnx_ops import DTYPES, SUPPORTED, WEIGHTED, NodeView, refusal
from .signature import Signature, TensorSpec

FOLD_LIMIT_BYTES: Final = 256 << 20
"""A constant that would be larger is computed at run time. The largest weight of a common network,
a 50000 by 1024 embedding in fp32, has 195 MiB."""

_INFERENCE_DATA_ELEMENTS: Final = 4096
"""Shape inference needs the values of shapes, axes, pads and scales, never those of weights."""

_LIKE_FIRST_INPUT: Final = frozenset(("GroupNormalization",))
"""Functions of other operators, for which onnx infers nothing."""

_SHAPE_ONLY: Final = frozenset(("EyeLike", "Shape", "Size"))
"""Operators that read the shape of their input, not its values."""

_RANDOM: Final = frozenset(
    (
        *("Bernoulli", "Multinomial"),
        *(f"Random{kind}{like}" for kind in ("Normal", "Uniform") for like in ("", "Like")),
    )
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a model cannot be imported.

    Parameters
    ----------
    node : str
        The layer's id, or the name of the input or output that it is about.
    op : str
        ONNX operator; ``input`` or ``output`` for those, ``--shape`` for a shape argument.
    message : str
        What was required and what was given.
    fix : str
        What to do about it; may be empty.
    """

    node: str
    op: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        what = f"{self.op} {self.node!r}: {self.message}"
        return f"{what} ({self.fix})" if self.fix else what


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that runs at run time.

    Parameters
    ----------
    id : str
        The layer's id.
    proto : onnx.NodeProto
        The node.
    outputs : tuple of TensorSpec
        Those that are not left out. Empty if they could not be inferred.
    macs : int
        Multiply-accumulates.
    supported : bool
        False where the problems name it.
    """

    id: str
    proto: onnx.NodeProto
    outputs: tuple[TensorSpec, ...]
    macs: int
    supported: bool


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph with static shapes.

    Parameters
    ----------
    inputs, outputs : tuple of TensorSpec
        Without initializers; outputs whose shape is unknown because of a problem are left out.
    nodes : tuple of Node
        In graph order; without those that were folded or that no output needs.
    values : mapping of str to TensorSpec
        Every run-time tensor.
    constants : mapping of str to ndarray
        Initializers and what was folded, as far as a node or output needs it.
    weights_bytes : int
        Of the initializers and Constant nodes, as the file stores them.
    opset : int
        Of the default domain.
    problems : tuple of Problem
        All that were found.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: tuple[Node, ...]
    values: Mapping[str, TensorSpec]
    constants: Mapping[str, np.ndarray]
    weights_bytes: int
    opset: int
    problems: tuple[Problem, ...]

    @property
    def signature(self) -> Signature:
        """The names, dtypes and shapes of inputs and outputs."""
        return Signature(inputs=self.inputs, outputs=self.outputs)


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


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name, strings decoded."""
    values: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        values[attribute.name] = value
    return values


def dtype_name(elem_type: int) -> str:
    """Return the numpy name of an ONNX element type; ``string``, ``undefined`` or its number."""
    if elem_type == onnx.TensorProto.STRING:
        return "string"
    if elem_type == onnx.TensorProto.UNDEFINED:
        return "undefined"
    if elem_type not in onnx.TensorProto.DataType.values():
        return f"number {elem_type}"
    return str(np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)))


def elem_type(dtype: str) -> int:
    """Return the ONNX element type of a numpy dtype name."""
    if dtype == "bfloat16":
        return int(onnx.TensorProto.BFLOAT16)
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def type_proto(spec: TensorSpec) -> onnx.TypeProto:
    """Return a tensor's ONNX type."""
    return helper.make_tensor_type_proto(elem_type(spec.dtype), spec.shape)


def nearest(name: str, names: Sequence[str]) -> str:
    """Return ``did you mean 'x'?``, or the list of names where nothing is near."""
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return "there are " + ", ".join(map(repr, names[:8])) if names else "there are none"


class _Reader:
    """The state of the walk."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.proto = file.proto.graph
        self.opset_imports = list(file.proto.opset_import)
        self.problems: list[Problem] = []
        self.inputs: list[TensorSpec] = []
        self.values: dict[str, TensorSpec] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.unknown: set[str] = set()
        self.nodes: list[Node] = []
        self.weights_bytes = 0
        self.context = onnx.checker.C.CheckerContext()
        self.context.ir_version = file.proto.ir_version
        self.context.opset_imports = {o.domain: o.version for o in self.opset_imports}

    # ------------------------------------------------------------ initializers and inputs

    def read_initializers(self) -> None:
        for tensor in self.proto.initializer:
            self._store(tensor, tensor.name, "initializer")
        for sparse in self.proto.sparse_initializer:
            self._problem(sparse.values.name, "initializer", "sparse initializers are unsupported")
            self.unknown.add(sparse.values.name)

    def _store(self, tensor: onnx.TensorProto, name: str, op: str) -> None:
        dtype = dtype_name(tensor.data_type)
        if dtype not in DTYPES:
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
        self.constants[name] = array
        self.weights_bytes += array.nbytes

    def read_inputs(self, shapes: Mapping[str, Sequence[int]]) -> None:
        stored = {t.name for t in self.proto.initializer}
        stored |= {t.values.name for t in self.proto.sparse_initializer}
        inputs = [i for i in self.proto.input if i.name not in stored]
        names = [i.name for i in inputs]
        for name in shapes:
            if name not in names:
                fix = nearest(name, names)
                if name in stored:
                    fix = "it is a weight, its shape is stored"
                self._problem(name, "--shape", "the model has no such input", fix)
        symbols = self._symbols(inputs, shapes)
        for value in inputs:
            self._read_input(value, shapes.get(value.name), symbols)

    def _symbols(
        self, inputs: Sequence[onnx.ValueInfoProto], shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, int]:
        """Values of named dimensions: one that is given for an input holds for the others."""
        symbols: dict[str, int] = {}
        for value in inputs:
            dims = value.type.tensor_type.shape.dim
            given = shapes.get(value.name, ())
            if len(dims) != len(given):
                continue
            for dim, size in zip(dims, given, strict=True):
                if not dim.dim_param:
                    continue
                if symbols.setdefault(dim.dim_param, size) != size:
                    self._problem(
                        value.name,
                        "--shape",
                        f"dimension {dim.dim_param!r} is {size} here and "
                        f"{symbols[dim.dim_param]} in another input",
                    )
        return symbols

    def _read_input(
        self,
        value: onnx.ValueInfoProto,
        given: Sequence[int] | None,
        symbols: Mapping[str, int],
    ) -> None:
        name = value.name
        if value.type.WhichOneof("value") != "tensor_type":
            kind = value.type.WhichOneof("value") or "unknown type"
            self._problem(name, "input", f"it is a {kind.removesuffix('_type')}, not a tensor")
            self.unknown.add(name)
            return
        tensor = value.type.tensor_type
        dtype = dtype_name(tensor.elem_type)
        if dtype not in DTYPES:
            self._problem(name, "input", f"element type {dtype} is unsupported")
        declared: list[int | str] | None = None
        if tensor.HasField("shape"):
            declared = [
                d.dim_value if d.HasField("dim_value") else d.dim_param or "?"
                for d in tensor.shape.dim
            ]
        shape = self._resolve(name, declared, given, symbols)
        if shape is None or dtype not in DTYPES:
            self.unknown.add(name)
            return
        spec = TensorSpec(name=name, dtype=dtype, shape=shape)
        self.inputs.append(spec)
        self.values[name] = spec

    def _resolve(
        self,
        name: str,
        declared: Sequence[int | str] | None,
        given: Sequence[int] | None,
        symbols: Mapping[str, int],
    ) -> tuple[int, ...] | None:
        shown = "of unknown rank" if declared is None else f"[{', '.join(map(str, declared))}]"
        if given is None:
            if declared is None:
                self._problem(
                    name, "input", "its rank is unknown", f"give --shape '{name}:[1,...]'"
                )
                return None
            sizes = [d if isinstance(d, int) else symbols.get(d) for d in declared]
            if any(s is None for s in sizes):
                example = ",".join(str(s) if s else "1" for s in sizes)
                self._problem(
                    name,
                    "input",
                    f"shape {shown} has a dynamic dimension without a value",
                    f"give --shape '{name}:[{example}]'",
                )
                return None
            given = [s for s in sizes if s is not None]
        elif declared is not None:
            fits = len(given) == len(declared) and all(
                isinstance(d, str) or d == g for d, g in zip(declared, given, strict=True)
            )
            if not fits:
                self._problem(
                    name,
                    "--shape",
                    f"[{', '.join(map(str, given))}] does not fit the model's {shown}",
                )
                return None
        if any(size < 1 for size in given):
            self._problem(
                name,
                "input",
                f"shape [{', '.join(map(str, given))}] has no elements; 1 is the least",
            )
            return None
        return tuple(int(size) for size in given)

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
                needed.append((_trimmed(proto, wanted), prefix + layer))
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
        known = len(self.problems)
        missing = [
            i
            for i in proto.input
            if i and i not in self.values and i not in self.constants and i not in self.unknown
        ]
        for name in missing:
            self._problem(
                layer,
                proto.op_type,
                f"input {name!r} is no input, weight or result of a node before",
            )
        for name in proto.output:
            if name and (name in self.values or name in self.constants):
                self._problem(layer, proto.op_type, f"output {name!r} is computed twice")
        if proto.domain not in ("", "ai.onnx"):
            self._problem(
                layer,
                proto.op_type,
                f"operator {proto.domain}.{proto.op_type} is unsupported",
                "export the model for the standard ONNX domain only",
            )
        elif proto.op_type != "Constant" and proto.op_type not in SUPPORTED:
            known_op = onnx.defs.has(proto.op_type, self.file.opset)
            kind = "unsupported" if known_op else f"unknown to ONNX opset {self.file.opset}"
            if not known_op or not self._foldable(proto):
                self._problem(layer, proto.op_type, f"operator {proto.op_type} is {kind}")
        stop = len(self.problems) > known
        if not stop:
            try:
                onnx.checker.check_node(proto, self.context)
            except (onnx.checker.ValidationError, UnicodeError) as error:
                self._problem(layer, proto.op_type, f"invalid node: {_first_line(error)}")
                stop = True
        if stop or self.unknown.intersection(proto.input):
            self.unknown.update(o for o in proto.output if o)
            self.nodes.append(Node(id=layer, proto=proto, outputs=(), macs=0, supported=not stop))
            return
        if self._foldable(proto) and self._fold(proto, layer):
            return
        specs = self._infer(proto, layer)
        if specs is None:
            self.unknown.update(o for o in proto.output if o)
            self.nodes.append(Node(id=layer, proto=proto, outputs=(), macs=0, supported=False))
            return
        reason = refusal(self._view(proto, specs[0]))
        if reason:
            self._problem(layer, proto.op_type, reason)
        for spec in specs:
            self.values[spec.name] = spec
        self.nodes.append(
            Node(
                id=layer,
                proto=proto,
                outputs=tuple(specs),
                macs=self._macs(proto, specs),
                supported=reason is None,
            )
        )

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
        if proto.op_type in _SHAPE_ONLY:
            return proto.input[0] in self.values or proto.input[0] in self.constants
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
        known = len(self.problems)
        specs = self._infer(proto, layer)
        if specs is None:
            # A shape that depends on data (NonZero, Unique) is known once it is computed.
            del self.problems[known:]
        elif sum(_nbytes(s) for s in specs) > FOLD_LIMIT_BYTES:
            return False
        arrays = self._evaluate(proto)
        if arrays is None:
            return False
        for name, array in zip(proto.output, arrays, strict=False):
            if name:
                self.constants[name] = array
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

    def _evaluate(self, proto: onnx.NodeProto) -> list[np.ndarray] | None:
        """Compute a node whose inputs are known; None where onnx's evaluator cannot."""
        from onnx.reference import ReferenceEvaluator

        feeds = {i: self.constants[i] for i in proto.input if i in self.constants}
        if proto.op_type == "EyeLike":
            spec = self._spec(proto.input[0])
            feeds = {spec.name: np.zeros(spec.shape, spec.dtype)}
        outputs = [o for o in proto.output if o]
        graph = helper.make_graph(
            [proto],
            "fold",
            [helper.make_value_info(i, type_proto(self._spec(i))) for i in feeds],
            [helper.make_value_info(o, onnx.TypeProto()) for o in outputs],
        )
        model = helper.make_model(
            graph, opset_imports=self.opset_imports, ir_version=self.file.proto.ir_version
        )
        try:
            results = ReferenceEvaluator(model).run(None, feeds)
        except Exception:  # noqa: BLE001 - any failure means: leave the node to run time
            return None
        computed = dict(zip(outputs, results, strict=True))
        arrays = [np.asarray(computed[o]) if o else np.empty(0) for o in proto.output]
        return arrays if all(str(a.dtype) in DTYPES for a in arrays) else None

    # ------------------------------------------------------------ inference

    def _infer(self, proto: onnx.NodeProto, layer: str) -> list[TensorSpec] | None:
        schema = onnx.defs.get_schema(proto.op_type, self.file.opset, "")
        names = [i for i in proto.input if i]
        data = {
            i: numpy_helper.from_array(self.constants[i], i)
            for i in names
            if i in self.constants and self.constants[i].size <= _INFERENCE_DATA_ELEMENTS
        }
        mismatch = self._type_mismatch(schema, proto)
        if mismatch:
            self._problem(layer, proto.op_type, mismatch)
            return None
        shown = ", ".join(str(self._spec(i)) for i in names)
        try:
            types = onnx.shape_inference.infer_node_outputs(
                schema,
                proto,
                {i: type_proto(self._spec(i)) for i in names},
                data,
                opset_imports=self.opset_imports,
                ir_version=self.file.proto.ir_version,
            )
        except onnx.shape_inference.InferenceError as error:
            self._problem(layer, proto.op_type, f"{_first_line(error)}; inputs are {shown}")
            return None
        specs = []
        for name in proto.output:
            if not name:
                continue
            if proto.op_type in _LIKE_FIRST_INPUT:
                types[name] = type_proto(self._spec(proto.input[0]))
            tensor = types[name].tensor_type if name in types else onnx.TypeProto().tensor_type
            dims = [d.dim_value for d in tensor.shape.dim]
            if not tensor.HasField("shape") or any(d < 1 for d in dims):
                at_run_time = [i for i in names[1:] if i not in self.constants]
                because = (
                    f"it depends on {at_run_time[0]!r}, which is known at run time only"
                    if at_run_time
                    else f"inputs are {shown}"
                )
                self._problem(
                    layer, proto.op_type, f"the shape of {name!r} cannot be determined; {because}"
                )
                return None
            specs.append(
                TensorSpec(name=name, dtype=dtype_name(tensor.elem_type), shape=tuple(dims))
            )
        for spec in specs:
            if spec.dtype not in DTYPES:
                self._problem(layer, proto.op_type, f"element type {spec.dtype} is unsupported")
                return None
        return specs

    def _type_mismatch(self, schema: Any, proto: onnx.NodeProto) -> str | None:
        """Check dtypes against the operator's constraints; onnx's inference does not."""
        bound: dict[str, tuple[str, str]] = {}
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        for index, name in enumerate(proto.input):
            if not name:
                continue
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            spec = self._spec(name)
            shown = helper.tensor_dtype_to_string(elem_type(spec.dtype))
            shown = f"tensor({shown.removeprefix('TensorProto.').lower()})"
            kinds = allowed.get(formal.type_str, [formal.type_str])
            if shown not in kinds:
                return (
                    f"input {name!r} is {spec.dtype}, which opset {self.file.opset} does not allow"
                )
            if not formal.is_homogeneous:
                continue
            first = bound.setdefault(formal.type_str, (name, spec.dtype))
            if first[1] != spec.dtype:
                return f"input {name!r} is {spec.dtype}, but {first[0]!r} is {first[1]}"
        return None

    def _macs(self, proto: onnx.NodeProto, specs: Sequence[TensorSpec]) -> int:
        if proto.op_type not in WEIGHTED:
            return 0
        shapes = [self._spec(i).shape for i in proto.input[:2]]
        size = math.prod(specs[0].shape)
        if proto.op_type == "Conv":
            return size * math.prod(shapes[1][1:])
        if proto.op_type == "ConvTranspose":
            return math.prod(shapes[0]) * math.prod(shapes[1][1:])
        trans_a = proto.op_type == "Gemm" and attributes(proto).get("transA", 0)
        return size * shapes[0][0 if trans_a else -1]

    # ------------------------------------------------------------ result

    def graph(self) -> Graph:
        outputs = []
        for value in self.proto.output:
            name = value.name
            if name in self.values or name in self.constants:
                outputs.append(self._spec(name))
            elif name not in self.unknown:
                self._problem(name, "output", "no node computes it")
        if not self.proto.output:
            self._problem(self.proto.name, "output", "the graph has no outputs")
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


def fix_shapes(proto: onnx.ModelProto, graph: Graph) -> onnx.ModelProto:
    """Return a copy of the model whose inputs and outputs have the graph's static shapes."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    del fixed.graph.value_info[:]
    specs = {s.name: s for s in (*graph.inputs, *graph.outputs)}
    kept = [i for i in fixed.graph.input if i.name in {s.name for s in graph.inputs}]
    del fixed.graph.input[:]
    fixed.graph.input.extend(kept)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.CopyFrom(type_proto(specs[value.name]))
    return fixed


def raise_problems(problems: Sequence[Problem], where: str | None) -> None:
    """Raise a `ModelError` that lists every problem, if there is one."""
    if problems:
        count = len(problems)
        raise ModelError(
            f"the model has {count} problem{'s' if count > 1 else ''}",
            problems=[str(p) for p in problems],
            where=where,
        )


def _trimmed(proto: onnx.NodeProto, wanted: set[str]) -> onnx.NodeProto:
    """Leave out the outputs that nothing reads, such as a dropout's mask."""
    if len(proto.output) == 1 or wanted.issuperset(proto.output):
        return proto
    if attributes(proto).get("training_mode", 0):
        return proto  # it is refused for its mode, not for the outputs that this needs
    kept = [name if name in wanted else "" for name in proto.output]
    while not kept[-1]:
        kept.pop()
    trimmed = onnx.NodeProto()
    trimmed.CopyFrom(proto)
    del trimmed.output[:]
    trimmed.output.extend(kept)
    return trimmed


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


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text.removeprefix("[ShapeInferenceError] ").removesuffix(".")
