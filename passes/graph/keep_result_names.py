"""Gives a layer's name back to what computes its result, from the layout change behind it.

Rewrites names of bindings only. ``ConvertLayout`` binds a network's output, which has to be in its
own layout again, under the name of the layer whose result it is; the layer itself is left with a
name that says nothing, and what it takes would be credited to a transposition. The two swap their
names. Runs behind the layout conversion. Numerics: exact.
"""

from __future__ import annotations

from collections.abc import Collection

import tvm
from tvm import relax
from tvm.ir import Op

from .dataflow import Dataflow, Rebuilder, is_dataflow

_PERMUTE = Op.get("relax.permute_dims")


def layer_names(function: tvm.ir.BaseFunc) -> frozenset[str]:
    """Return the names of a function's bindings, but for permutations that are layers."""
    if not is_dataflow(function):
        return frozenset()
    graph = Dataflow(function)
    return frozenset(
        str(binding.var.name)
        for binding in graph.bindings
        if graph.call(binding.var, _PERMUTE) is None
    )


@relax.transform.function_pass(opt_level=0)
class KeepResultNames:
    """Swap the names of a layer's result and of the permutation that took its name.

    Parameters
    ----------
    names : collection of str
        Of the bindings before the conversion, from `layer_names`.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)

    def transform_function(
        self, function: relax.Function, _module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> relax.Function:
        """Return the function with names swapped, or the very same function."""
        if not is_dataflow(function):
            return function
        graph = Dataflow(function)
        swapped: dict[relax.Var, str] = {}
        for binding in graph.bindings:
            moved = graph.call(binding.var, _PERMUTE)
            if moved is None or str(binding.var.name) not in self._names:
                continue
            source = moved.args[0]
            known = source not in graph.definition or str(source.name) in self._names
            if not known and source not in swapped:
                swapped[source] = str(binding.var.name)
                swapped[binding.var] = str(source.name)
        if not swapped:
            return function
        builder = Rebuilder(function)
        for binding in graph.bindings:
            if binding.var in swapped:
                builder.bind(binding.var, builder.use(binding.value), name=swapped[binding.var])
            else:
                builder.copy(binding)
        return builder.finish()
