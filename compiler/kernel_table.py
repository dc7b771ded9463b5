"""Which kernel computes which layer: every layer of a model, absorbed ones included.

A layer may vanish on the way to machine code: batch norm becomes part of weights, an activation
part of an integer operator. It then belongs to the kernel that computes its result all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import tvm
from tvm import relax

from hone.passes.graph.dataflow import Dataflow, is_dataflow, layer_of, variables
from hone.passes.lower.fuse_operators import kernel_layers

from .importing.layer_names import layer_binding
from .model import Model
from .profiling.conversions import conversions


def kernel_table(
    model: Model, computed: tvm.IRModule, lowered: tvm.IRModule, merged: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Return kernel → ids of the layers that it computes, in the order of execution.

    Parameters
    ----------
    model : Model
        As it was before anything was absorbed.
    computed : IRModule
        What was lowered: the model's own module, or that in integers.
    lowered : IRModule
        From `hone.pipeline.lower`.
    merged : mapping of str to str
        Binding name of a layer → binding name of the layer that computes it now, where known.
    """
    listed = kernel_layers(lowered)
    computing = _computing({n for names in listed.values() for n in names}, computed, merged)
    kernels = {
        kernel: list(dict.fromkeys(layer_binding(name) for name in names if name in computing))
        for kernel, names in listed.items()
    }
    present = {name for names in kernels.values() for name in names}
    ids: dict[str, list[str]] = {}
    for layer, binding in zip(model.layers, carriers(model, present, merged), strict=True):
        ids.setdefault(binding, []).append(layer.id)
    return {
        kernel: tuple(dict.fromkeys(i for name in names for i in ids.get(name, ())))
        for kernel, names in kernels.items()
    }


def converting_kernels(
    model: Model, computed: tvm.IRModule, lowered: tvm.IRModule
) -> dict[str, tuple[str, ...]]:
    """Return kernel → the conversions that it does, such as ``quantize image``.

    Parameters
    ----------
    model, computed, lowered
        As for `kernel_table`.
    """
    found = conversions(computed) if is_dataflow(computed["main"]) else {}
    ids = tensor_ids(model)
    table = {
        kernel: tuple(
            f"{found[name].direction} {ids.get(found[name].layer, found[name].layer)}"
            for name in names
            if name in found
        )
        for kernel, names in kernel_layers(lowered).items()
    }
    return {kernel: texts for kernel, texts in table.items() if texts}


def tensor_ids(model: Model) -> dict[str, str]:
    """Return what people call the tensors of a model: binding → layer, parameter → input."""
    names = {layer.binding: layer.id for layer in model.layers}
    for param, spec in zip(model.module["main"].params, model.signature.inputs, strict=True):
        names[str(param.name)] = spec.name
    return names


def rebound(before: Model, after: Model, merged: Mapping[str, str]) -> Model:
    """Return a changed model whose layers name the bindings that carry their results now.

    Parameters
    ----------
    before : Model
        As it was.
    after : Model
        The same layers, some of which its module has no binding for.
    merged : mapping of str to str
        As for `kernel_table`.
    """
    if not is_dataflow(after.module["main"]):
        return after
    names = {str(binding.var.name) for binding in Dataflow(after.module["main"]).bindings}
    present = {layer_binding(name) for name in _computing(names, after.module, merged)}
    layers = zip(after.layers, carriers(before, present, merged), strict=True)
    return replace(after, layers=tuple(replace(layer, binding=name) for layer, name in layers))


def carriers(model: Model, present: Collection[str], merged: Mapping[str, str]) -> list[str]:
    """Return for each layer of a model the binding name that carries its result.

    Its own name where that is present; the layer it was merged with; else the nearest present
    layer before it in the graph, else the nearest one behind it; its own name where there is none.

    Parameters
    ----------
    model : Model
        Its module still has the layers.
    present : collection of str
        Binding names of layers that exist.
    merged : mapping of str to str
        As for `kernel_table`.
    """
    names = [layer.binding for layer in model.layers]
    missing = [name for name in names if name not in present and merged.get(name) not in present]
    found: dict[str, str] = {}
    if missing and is_dataflow(model.module["main"]):
        graph = Dataflow(model.module["main"])
        by_name = {str(binding.var.name): binding.var for binding in graph.bindings}
        found = {
            name: carrier
            for name in missing
            if name in by_name and (carrier := _nearest(graph, by_name[name], present, merged))
        }
    return [name if name in present else found.get(name, merged.get(name, name)) for name in names]


def _computing(names: set[str], module: tvm.IRModule, merged: Mapping[str, str]) -> set[str]:
    """Return the bindings that compute a layer: all but conversions of a layer's result.

    A conversion that is a layer itself, a node of a quantized model, stays.
    """
    converting = conversions(module) if is_dataflow(module["main"]) else {}
    computing = names.difference(converting)
    layers = {layer_binding(name) for name in computing}
    return computing | {
        name
        for name in names.intersection(converting)
        if layer_binding(name) not in layers and merged.get(name, name) == name
    }


def _nearest(
    graph: Dataflow, var: relax.Var, present: Collection[str], merged: Mapping[str, str]
) -> str | None:
    """Return the nearest present layer before a binding, else behind it."""

    def before(of: relax.Var) -> Iterable[relax.Var]:
        return variables(graph.definition[of]) if of in graph.definition else ()

    def behind(of: relax.Var) -> Iterable[relax.Var]:
        return (user for user in graph.users.get(of, ()) if user is not None)

    for neighbours in (before, behind):
        queue, seen = deque([var]), {var}
        while queue:
            current = queue.popleft()
            name = layer_of(current)
            name = name if name in present else merged.get(name, name)
            if name in present:
                return name
            fresh = [v for v in neighbours(current) if v not in seen]
            seen.update(fresh)
            queue.extend(fresh)
    return None
