"""A static ONNX graph: what `reader` makes of a file, and what can be said about it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from hone.errors import ModelError
from hone.signature import Signature, TensorSpec


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
