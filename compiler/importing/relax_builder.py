"""Builds the Relax function of a static ONNX graph, with the layers' ids as binding names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from onnx import NodeProto
from tvm import relax, tirx
from tvm.relax import op
from tvm.relax.frontend.onnx import onnx_frontend

from hone.model import Layer
from hone.passes.quantize.match_qdq import QDQ_ATTRIBUTE
from hone.signature import TensorSpec

from .call import Call
from .converters import CONVERTERS
from .graph import Graph, Node, Problem, attributes
from .layer_names import binding_names, layer_binding, part

_QDQ = ("DequantizeLinear", "QuantizeLinear")


class ConversionError(Exception):
    """Nodes that could not be converted; carries one `Problem` for each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, problems)))


def build(graph: Graph) -> tuple[tvm.IRModule, tuple[Layer, ...]]:
    """Return the module of a graph without problems, and its layers in graph order.

    Raises
    ------
    ConversionError
        A converter failed, or returned another type than ONNX's shape inference.
    """
    return _Builder(graph).build()


class _Builder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.bb = relax.BlockBuilder()
        self.params = [
            relax.Var(s.name, relax.TensorType(list(s.shape), s.dtype)) for s in graph.inputs
        ]
        self.exprs: dict[str, Any] = {p.name: p for p in self.params}
        self.names = binding_names(
            [n.id for n in graph.nodes], reserved=[s.name for s in graph.inputs]
        )
        self.named: dict[Any, str] = {}
        """Bindings that carry a node's outputs, and their names."""
        self.problems: list[Problem] = []

    def build(self) -> tuple[tvm.IRModule, tuple[Layer, ...]]:
        layers = []
        with self.bb.function("main", params=self.params):
            with self.bb.dataflow():
                for node, name in zip(self.graph.nodes, self.names, strict=True):
                    self._node(node, name)
                    first = self.exprs[node.outputs[0].name]
                    binding = self.named.get(first, getattr(first, "name", ""))
                    layers.append(Layer(id=node.id, op_type=node.proto.op_type, binding=binding))
                outputs = [self._expr(s.name) for s in self.graph.outputs]
                result = self.bb.emit_output(outputs[0] if len(outputs) == 1 else outputs)
            self.bb.emit_func_output(result)
        if self.problems:
            raise ConversionError(self.problems)
        module = relax.transform.DeadCodeElimination()(_rename(self.bb.get(), self.named))
        if any(n.proto.op_type in _QDQ for n in self.graph.nodes):
            module.update_func(
                module.get_global_var("main"), module["main"].with_attr(QDQ_ATTRIBUTE, True)
            )
        return module, tuple(layers)

    def _expr(self, name: str) -> Any:
        if name not in self.exprs:
            array = self.graph.constants[name]
            # Without a dtype TVM makes int64 int32, and float64 float32.
            self.exprs[name] = relax.const(np.asarray(array, order="C"), str(array.dtype))
        return self.exprs[name]

    def _node(self, node: Node, name: str) -> None:
        try:
            results = self._convert(node)
            mismatch = _mismatch(node.outputs, results)
        except Exception as error:  # noqa: BLE001 - a converter raises anything: it is reported
            text = str(error).strip().splitlines() or [type(error).__name__]
            mismatch = f"it cannot be converted: {text[-1]}"
        if mismatch:
            self.problems.append(Problem(node=node.id, op=node.proto.op_type, message=mismatch))
            # The nodes after it are still converted, so that all problems are found at once.
            results = [op.zeros(s.shape, s.dtype) for s in node.outputs]
        for index, (spec, expr) in enumerate(zip(node.outputs, results, strict=True)):
            if not isinstance(expr, relax.Var | tvm.ir.GenericConst):
                expr = self.bb.emit(expr)
            if isinstance(expr, relax.Var) and expr not in self.named and expr not in self.params:
                self.named[expr] = part(name, str(index)) if index else name
            self.exprs[spec.name] = expr

    def _convert(self, node: Node) -> list[Any]:
        """Return one expression for each output that is not left out."""
        proto = node.proto
        inputs = [self._expr(i) if i else None for i in proto.input]
        kept = [i for i, o in enumerate(proto.output) if o]
        result = None
        if proto.op_type in CONVERTERS:
            result = CONVERTERS[proto.op_type](
                Call(
                    bb=self.bb,
                    inputs=inputs,
                    values=[self.graph.constants.get(i) if i else None for i in proto.input],
                    attributes=attributes(proto),
                    outputs=node.outputs,
                    opset=self.graph.opset,
                )
            )
        if result is None:
            result = self._upstream(proto, inputs)
        if isinstance(result, list):
            return [self.bb.normalize(result[i]) for i in kept]
        result = self.bb.normalize(result)
        if isinstance(result, relax.Tuple):
            return [self.bb.normalize(result[i]) for i in kept]
        if isinstance(result.ty, relax.TupleType):
            result = self.bb.emit(result)
            return [self.bb.normalize(relax.TupleGetItem(result, i)) for i in kept]
        return [result]

    def _upstream(self, proto: NodeProto, inputs: list[Any]) -> Any:
        """Convert by TVM's importer, node by node: its own loop drops names and prints."""
        importer = onnx_frontend.ONNXGraphImporter({}, "float32")
        values = importer._parse_attr(proto.attribute)
        values["tvm_custom"] = {"name": proto.name, "num_outputs": len(proto.output)}
        converter = onnx_frontend._get_convert_map()[proto.op_type]
        return converter.get_converter(self.graph.opset)(
            self.bb, onnx_frontend.onnx_input(inputs), values, [{}, {}]
        )


def _mismatch(outputs: Sequence[TensorSpec], results: Sequence[Any]) -> str:
    """Compare the converted types with ONNX's: upstream's importer is wrong at times."""
    for spec, expr in zip(outputs, results, strict=True):
        ty = expr.ty
        if not isinstance(ty, relax.TensorType) or not isinstance(ty.shape, relax.ShapeExpr):
            return f"output {spec.name!r} is converted to {ty}, required is {spec}"
        shape = [int(d) if isinstance(d, tirx.IntImm) else d for d in ty.shape]
        if tuple(shape) != spec.shape or str(ty.dtype) != spec.dtype:
            return f"output {spec.name!r} is converted to {ty.dtype}{shape}, required is {spec}"
    return ""


def _rename(module: tvm.IRModule, named: Mapping[Any, str]) -> tvm.IRModule:
    """Name every binding after its layer, and return results without an alias of their own."""
    function = module["main"]
    (block,) = function.body.blocks
    *bindings, last = block.bindings
    single = named.get(last.value)
    names = list(named.values())
    taken: set[str] = {p.name for p in function.params} | set(names)
    # Bindings before a result belong to the result's layer.
    owners, owner = [], layer_binding(names[-1]) if names else "result"
    for binding in reversed(bindings):
        if binding.var in named:
            owner = layer_binding(named[binding.var])
        owners.append(owner)
    owners.reverse()
    others = {v: f for v, f in module.functions.items() if v.name_hint != "main"}
    bb = relax.BlockBuilder(tvm.IRModule(others))
    mapped: dict[Any, Any] = {}
    with bb.function("main", params=list(function.params)):
        with bb.dataflow():
            for binding, owner in zip(bindings, owners, strict=True):
                value = _substitute(binding.value, mapped)
                name = named.get(binding.var)
                if name is None:
                    name = _fresh(part(owner, _short_name(binding.value)), taken)
                emit = bb.emit_output if single and binding.var.same_as(last.value) else bb.emit
                mapped[binding.var] = emit(value, name_hint=name)
            if single:
                result = mapped[last.value]
            else:
                result = bb.emit_output(_substitute(last.value, mapped), name_hint="result")
        bb.emit_func_output(result)
    return bb.get()


def _substitute(expr: Any, mapped: Mapping[Any, Any]) -> Any:
    if isinstance(expr, relax.Var):
        return mapped.get(expr, expr)
    if isinstance(expr, relax.Call):
        args = [_substitute(a, mapped) for a in expr.args]
        return relax.Call(expr.op, args, expr.attrs, expr.ty_args, expr.span)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([_substitute(f, mapped) for f in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(_substitute(expr.tuple_value, mapped), expr.index)
    return expr


def _short_name(expr: Any) -> str:
    if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
        return str(expr.op.name).rpartition(".")[2]
    return "item" if isinstance(expr, relax.TupleGetItem) else "value"


def _fresh(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
