"""Checks the layers that shall stay as they are."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from tvm import relax

from hone.errors import UsageError
from hone.passes.graph.dataflow import Dataflow, layer_of


def check_layers(function: relax.Function, names: Collection[str]) -> None:
    """Check that names are binding names of layers.

    Raises
    ------
    UsageError
        Some are not; the nearest names are given.
    """
    known = {layer_of(binding.var) for binding in Dataflow(function).bindings}
    problems = []
    for name in sorted(set(names) - known):
        near = difflib.get_close_matches(name, known, n=1)
        problems.append(f"{name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    if problems:
        raise UsageError("no such layer to keep in float: " + "; ".join(problems))
