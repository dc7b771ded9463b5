"""What no package can hold, whatever its operators: checked on the graph that the reader made."""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

import numpy as np

from hone.signature import Signature, TensorSpec

from .graph import Graph, Problem

LARGEST_BYTES: Final = 64 << 30
"""Of one tensor. The widest activation of a common network (SAM's image encoder, 1024 by 1024
pixels) has less than 1 GiB; what exceeds this is a slip in a shape, and would end in an
out-of-memory error after minutes."""


def problems(graph: Graph) -> list[Problem]:
    """Return what is wrong with the names of inputs and outputs, and with sizes.

    Names must be unique among the inputs and among the outputs, since callers feed and read them by
    name.

    Parameters
    ----------
    graph : Graph
        As `reader.read_graph` made it.
    """
    found = []
    for kind, specs in (("input", graph.inputs), ("output", graph.outputs)):
        for name, count in Counter(spec.name for spec in specs).items():
            if count > 1:
                found.append(_problem(name, kind, f"{count} {kind}s have this name"))
    layers = {spec.name: node for node in graph.nodes for spec in node.outputs}
    for spec in graph.values.values():
        size = nbytes(spec)
        if size <= LARGEST_BYTES:
            continue
        node = layers.get(spec.name)
        found.append(
            _problem(
                spec.name if node is None else node.id,
                "input" if node is None else node.proto.op_type,
                f"{spec} has {size / 2**30:.4g} GiB, the most is {LARGEST_BYTES >> 30}",
            )
        )
    return found


def unpackable(signature: Signature) -> list[Problem]:
    """Return the inputs and outputs that a package cannot hold: they are given as numpy arrays.

    Parameters
    ----------
    signature : Signature
        Of the model.
    """
    return [
        _problem(
            spec.name,
            kind,
            "element type bfloat16 is unsupported here: numpy has no such arrays",
            "cast it to or from float32 inside the model",
        )
        for kind, specs in (("input", signature.inputs), ("output", signature.outputs))
        for spec in specs
        if spec.dtype == "bfloat16"
    ]


def nbytes(spec: TensorSpec) -> int:
    """Return the bytes of a tensor."""
    item = 2 if spec.dtype == "bfloat16" else np.dtype(spec.dtype).itemsize
    return math.prod(spec.shape) * item


def _problem(node: str, op: str, message: str, fix: str = "") -> Problem:
    return Problem(node=node, op=op, message=message, fix=fix)
