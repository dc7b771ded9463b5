"""Layer ids, and the names of the Relax bindings that carry them.

A layer's id is its ONNX node's name, else ``<OpType>_<first output name>``, made unique. The
binding variable of the layer's *result* is named after it. One ONNX node may become several Relax
bindings: those before the result are named ``<binding>@<operator>``, such as ``conv1@conv2d`` for
the convolution below the bias add ``conv1``. Passes that add bindings keep to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

PART: Final = "@"
"""Separates a layer's binding name from the part of the layer that a binding computes."""


def unique(names: Iterable[str]) -> list[str]:
    """Make names unique: the second ``a`` becomes ``a_1``, unless that is taken."""
    names = list(names)
    given = set(names)
    used: set[str] = set()
    result = []
    for name in names:
        candidate, count = name, 0
        while candidate in used or (count and candidate in given):
            count += 1
            candidate = f"{name}_{count}"
        used.add(candidate)
        result.append(candidate)
    return result


def node_ids(nodes: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return the layer ids of ``(name, op_type, first output)`` triples, in their order."""
    return unique(name or f"{op_type}_{output}" for name, op_type, output in nodes)


def binding_names(ids: Iterable[str], reserved: Iterable[str] = ()) -> list[str]:
    """Return one binding name for each layer id.

    TVM's block builder writes ``_`` for ``.`` and appends numbers to names that it has seen. What
    it would change is changed here first, so that a name lives through every pass that rebuilds
    the function.

    Parameters
    ----------
    ids : iterable of str
        Unique layer ids.
    reserved : iterable of str
        Names that are taken, such as those of the function's parameters.
    """
    taken = list(reserved)
    wanted = [i.replace(".", "_").replace(PART, "_") for i in ids]
    return unique(taken + wanted)[len(taken) :]


def part(binding: str, operator: str) -> str:
    """Return the name of a binding that computes a part of a layer."""
    return f"{binding}{PART}{operator}"


def layer_binding(name: str) -> str:
    """Return the binding name of the layer that a binding, or a part of one, belongs to."""
    return name.partition(PART)[0]
