"""ONNX in: a `Model` with static shapes, or every reason why not, at once.

``load`` goes file → `importing.onnx_file.read` → `importing.reader.read_graph` (shapes, folding,
problems) → `importing.relax_builder.build` → `Model`. ``check`` stops before the last two, and
never imports TVM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from .errors import UsageError
from .importing import boundary
from .importing.graph import Graph, Problem, fix_shapes, raise_problems
from .importing.inlining import inline
from .importing.onnx_file import OnnxFile, read
from .importing.qdq import rewrite
from .importing.reader import read_graph
from .model import Model, Origin
from .signature import TensorSpec

if TYPE_CHECKING:
    from .model import Layer

__all__ = ["CheckReport", "Problem", "check", "load", "parse_shape", "source_graph"]


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What ``hone check`` says about a model.

    Parameters
    ----------
    problems : tuple of Problem
        All of them; empty when the model can be compiled.
    nodes, nodes_supported : int
        Nodes that run at run time (constants are folded), and how many of them can be imported.
    macs, macs_supported : int
        Multiply-accumulates of one run, and those in nodes that can be imported. Nodes whose
        shapes are unknown because of a problem before them count 0.
    inputs, outputs : tuple of TensorSpec
        Those whose shapes are known.
    opset : int
        Of the default ONNX domain.
    operators : mapping of str to int
        How many nodes each operator has.
    weights_bytes : int
        As the file stores them.
    """

    problems: tuple[Problem, ...]
    nodes: int
    nodes_supported: int
    macs: int
    macs_supported: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    operators: Mapping[str, int]
    weights_bytes: int

    @property
    def ok(self) -> bool:
        """Whether the model can be imported."""
        return not self.problems

    @property
    def coverage(self) -> float:
        """Share of the multiply-accumulates in nodes that can be imported, in [0, 1]."""
        return self.macs_supported / self.macs if self.macs else float(self.ok)


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Parse a ``--shape`` argument.

    Parameters
    ----------
    text : str
        ``name:[1,3,224,224]``. The last ``:[`` separates the name, which may itself hold colons
        and brackets; spaces count as commas; ``[]`` is a scalar.

    Returns
    -------
    tuple of str and tuple of int
        The input's name and its shape.

    Raises
    ------
    UsageError
        For anything else.
    """
    name, separator, rest = text.strip().rpartition(":[")
    sizes = rest.removesuffix("]").replace(",", " ").split()
    if not separator or not name.strip() or not rest.endswith("]"):
        raise UsageError(
            f"a shape is given as name:[sizes], this is {text!r}",
            where="--shape",
            hint="for example --shape 'input:[1,3,224,224]'",
        )
    wrong = [s for s in sizes if not (s.isascii() and s.isdigit() and int(s) > 0)]
    if wrong:
        raise UsageError(
            f"sizes are whole numbers from 1, in {text!r} this is not: {', '.join(wrong)}",
            where="--shape",
            hint="give every dynamic dimension one value, such as 'input:[1,3,224,224]'",
        )
    return name.strip(), tuple(int(s) for s in sizes)


def check(
    model: str | Path | onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None
) -> CheckReport:
    """Say whether a model can be imported, and if not, everything that stands against it.

    Nothing is compiled and TVM is not imported.

    Parameters
    ----------
    model : str, Path or onnx.ModelProto
        A file, or a model in memory.
    shapes : mapping of str to sequence of int, optional
        Shapes of inputs with dynamic dimensions.

    Raises
    ------
    ModelError
        The file itself cannot be read: missing, truncated, not ONNX, opset too old or too new.
    """
    _, graph = _read(model, shapes)
    operators: dict[str, int] = {}
    for node in graph.nodes:
        operators[node.proto.op_type] = operators.get(node.proto.op_type, 0) + 1
    return CheckReport(
        problems=(*graph.problems, *boundary.unpackable(graph.signature)),
        nodes=len(graph.nodes),
        nodes_supported=sum(n.supported for n in graph.nodes),
        macs=sum(n.macs for n in graph.nodes),
        macs_supported=sum(n.macs for n in graph.nodes if n.supported),
        inputs=graph.inputs,
        outputs=graph.outputs,
        opset=graph.opset,
        operators=dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        weights_bytes=graph.weights_bytes,
    )


def load(
    model: str | Path | onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None
) -> Model:
    """Import a model and check its types.

    Parameters
    ----------
    model : str, Path or onnx.ModelProto
        A file (external data beside it), or a model in memory. Opset 9 to that of the installed
        onnx.
    shapes : mapping of str to sequence of int, optional
        Shapes of inputs with dynamic dimensions. A named dimension that is given for one input
        holds for the others.

    Returns
    -------
    Model
        Layers in graph order. Nodes that were folded into constants, and those that no output
        needs, have no layer.

    Raises
    ------
    ModelError
        Lists *all* problems, with the names of the nodes.
    """
    file, graph = _read(model, shapes)
    raise_problems(graph.problems, file.path)
    module, layers = _build(graph, file)
    return Model(
        module=module,
        signature=graph.signature,
        origin=Origin(
            path=file.path,
            sha256=file.sha256,
            opset=file.opset,
            weights_bytes=graph.weights_bytes,
        ),
        layers=layers,
        source=fix_shapes(file.proto, graph),
    )


def source_graph(
    source: onnx.ModelProto | OnnxFile, shapes: Mapping[str, Sequence[int]] | None = None
) -> Graph:
    """Return the static graph of a model, functions inlined and QDQ operators rewritten.

    Parameters
    ----------
    source : onnx.ModelProto or OnnxFile
        The model.
    shapes : mapping of str to sequence of int, optional
        Of inputs whose shape the model leaves open.

    Raises
    ------
    ModelError
        The model cannot be read; what it lacks is among the graph's problems.
    """
    file = source if isinstance(source, OnnxFile) else read(source)
    return read_graph(replace(file, proto=rewrite(inline(file))), shapes or {})


def _read(
    model: str | Path | onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None
) -> tuple[OnnxFile, Graph]:
    if not isinstance(model, str | Path | onnx.ModelProto):
        raise UsageError(
            f"a model is a path or an onnx.ModelProto, this is a {type(model).__name__}"
        )
    file = read(model)
    graph = source_graph(file, shapes)
    return file, replace(graph, problems=(*graph.problems, *boundary.problems(graph)))


def _build(graph: Graph, file: OnnxFile) -> tuple[object, tuple[Layer, ...]]:
    from .importing.relax_builder import ConversionError, build

    try:
        return build(graph)
    except ConversionError as error:
        raise_problems(error.problems, file.path)
        raise
