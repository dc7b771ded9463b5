"""The tensors between layers, where a change of precision costs a conversion."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import tvm
from tvm import relax

from hone.passes.graph.dataflow import Dataflow, layer_of, shape_of, variables
from hone.passes.quantize.site import WEIGHTED, Kind
from hone.passes.quantize.survey import survey

INPUT = "@input"
OUTPUT = "@output"


@dataclass(frozen=True, kw_only=True)
class Edge:
    """A tensor that one node computes and another one reads.

    Parameters
    ----------
    left, right : str
        The nodes.
    elements : float
        Of the tensor; shared out among the edges of all its readers.
    """

    left: str
    right: str
    elements: float


@dataclass(frozen=True, kw_only=True)
class TensorGraph:
    """Nodes and edges.

    Parameters
    ----------
    layers : tuple of str
        Convolutions and matrix products with constant weights, by binding name, in graph order.
    free : tuple of str
        Additions, products and concatenations of tensors, which compute in the precision of what
        they read.
    fixed : tuple of str
        What computes in float whatever is around it, the network's inputs and outputs included.
    edges : tuple of Edge
        Between any of them.
    """

    layers: tuple[str, ...]
    free: tuple[str, ...]
    fixed: tuple[str, ...]
    edges: tuple[Edge, ...]


def tensor_graph(module: tvm.IRModule, layers: Collection[str]) -> TensorGraph:
    """Return who hands tensors to whom.

    What an integer operator would absorb (a bias, an activation), and what has an integer form of
    its own with one operand (functions, pooling, reshapes, averages, transposed convolutions),
    belongs to the node before it.

    Parameters
    ----------
    module : IRModule
        Float, in NHWC with folded batch norm.
    layers : collection of str
        Binding names of the layers.
    """
    function = module["main"]
    graph = Dataflow(function)
    found = survey(function)
    joining = {site.chain[0] for site in found.sites if site.kind in _JOINING}
    # A convolution takes a residual addition over, with which the survey ends its chain.
    merged = {site.chain[site.linear - 1] for site in found.sites if site.residual}
    absorbed = {var for site in found.sites for var in site.chain[1:]} | found.passing
    absorbed |= {
        site.chain[0]
        for site in found.sites
        if site.kind not in WEIGHTED and site.kind not in _JOINING
    }
    node_of: dict[relax.Var, str] = dict.fromkeys(function.params, INPUT)
    free: list[str] = []
    fixed = [INPUT]
    readings: dict[relax.Var, list[str]] = {}
    for binding in graph.bindings:
        var = binding.var
        reads = [x for x in variables(binding.value) if x in node_of]
        layer = layer_of(var)
        if not reads:
            continue
        if layer in layers and var not in absorbed:
            node_of[var] = layer
        elif var in joining or var in merged:
            node_of[var] = f"{layer}@sum"
            free.append(node_of[var])
        elif var in absorbed or layer in layers or isinstance(binding.value, relax.Var):
            node_of[var] = node_of[reads[0]]
        else:
            node_of[var] = f"{var.name}@float"
            fixed.append(node_of[var])
        for x in reads:
            if node_of[x] != node_of[var]:
                readings.setdefault(x, []).append(node_of[var])
    for output in graph.outputs:
        if isinstance(output, relax.Var) and output in node_of:
            readings.setdefault(output, []).append(OUTPUT)
    fixed.append(OUTPUT)
    edges = tuple(
        Edge(left=node_of[var], right=node, elements=math.prod(shape_of(var)) / len(nodes))
        for var, nodes in readings.items()
        if isinstance(var.ty, relax.TensorType)
        for node in nodes
    )
    return TensorGraph(
        layers=tuple(dict.fromkeys(name for name in node_of.values() if name in layers)),
        free=tuple(dict.fromkeys(free)),
        fixed=tuple(dict.fromkeys([*fixed, OUTPUT])),
        edges=edges,
    )


_JOINING = (Kind.ADD, Kind.MULTIPLY, Kind.CONCAT)
"""Kinds of sites that read tensors of several nodes."""
