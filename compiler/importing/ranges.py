"""Facts about a model's values that can be read off its graph: index bounds, float types."""

from __future__ import annotations

from typing import Final

import onnx

from .graph import Graph, attributes

_THROUGH: Final = frozenset(
    (
        *("Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape"),
        *("Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    )
)
"""Operators that hand their first input's values on; Concat those of all inputs."""


def index_bounds(graph: Graph) -> dict[str, int]:
    """Return, for each integer input that indexes a table, how many rows the smallest one has.

    Parameters
    ----------
    graph : Graph
        With static shapes.

    Returns
    -------
    dict of str to int
        By input name; inputs that index nothing are left out.
    """
    sources = _sources(graph)
    bounds: dict[str, int] = {}
    for node in graph.nodes:
        proto = node.proto
        size = _rows(graph, proto)
        if size is not None:
            index = 0 if proto.op_type == "OneHot" else 1
            for source in sources.get(proto.input[index], frozenset()):
                bounds[source] = min(size, bounds.get(source, size))
    return bounds


def divisors(graph: Graph) -> frozenset[str]:
    """Return the inputs that something is divided by: as integers they must not be zero.

    Parameters
    ----------
    graph : Graph
        With static shapes.
    """
    sources = _sources(graph)
    divided = (node.proto.input[1] for node in graph.nodes if node.proto.op_type in ("Div", "Mod"))
    return frozenset().union(*(sources.get(name, frozenset()) for name in divided))


def _sources(graph: Graph) -> dict[str, frozenset[str]]:
    """Return the inputs whose values each tensor holds."""
    sources = {s.name: frozenset((s.name,)) for s in graph.inputs}
    for node in graph.nodes:
        proto = node.proto
        if proto.op_type in _THROUGH:
            read = proto.input if proto.op_type == "Concat" else proto.input[:1]
            found = frozenset[str]().union(*(sources.get(i, frozenset()) for i in read))
            sources.update(dict.fromkeys(proto.output, found))
    return sources


def _rows(graph: Graph, proto: onnx.NodeProto) -> int | None:
    if proto.op_type == "OneHot":
        depth = graph.constants.get(proto.input[1])
        return None if depth is None else int(depth.reshape(-1)[0])
    if proto.op_type not in ("Gather", "GatherElements", "GatherND", "ScatterElements"):
        return None
    name = proto.input[0]
    shape = graph.values[name].shape if name in graph.values else graph.constants[name].shape
    if proto.op_type == "GatherND":
        indices = graph.values.get(proto.input[1])
        batch = attributes(proto).get("batch_dims", 0)
        return min(shape[batch : batch + indices.shape[-1]]) if indices else None
    axis: int = attributes(proto).get("axis", 0)
    return shape[axis]


def float_types(graph: Graph) -> frozenset[str]:
    """Return the float types that a graph computes in."""
    found = {s.dtype for s in graph.values.values()}
    return frozenset(d for d in found if d.startswith(("float", "bfloat")))
