"""Turns trainable constants of ``main`` into parameters, and back.

Rewrites constant operands of convolutions and matmuls, and the biases added to their results.
Runs on high-level operators after `FoldBatchNorm` (a batch norm has no gradient in inference);
the training set-up follows. Numerics: exact, and a round trip gives the same module.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, Op

from hone.errors import UsageError
from hone.passes.graph.dataflow import Dataflow, Rebuilder, layer_of, with_args

_ADD = Op.get("relax.add")
_LINEAR = frozenset(
    Op.get(f"relax.{name}")
    for name in (
        "matmul",
        *(f"nn.conv{n}d" for n in (1, 2, 3)),
        *(f"nn.conv{n}d_transpose" for n in (1, 2, 3)),
    )
)


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A constant that training may change.

    Parameters
    ----------
    name : str
        Layer id and ``.weight`` or ``.bias``; unique within the module.
    value : ndarray of float32
        Its present value.
    var : relax.Var
        The binding whose call takes it.
    argument : int
        Position among the call's arguments.
    """

    name: str
    value: np.ndarray
    var: relax.Var
    argument: int


def trainable_constants(module: tvm.IRModule) -> tuple[Trainable, ...]:
    """Return the float32 weights and biases of ``main``, in graph order.

    Scalars, bounds, tables, shapes and whatever does not belong to a convolution or matmul are
    left out. A constant that two layers share counts once, under its first layer.
    """
    graph = Dataflow(module["main"])
    found: list[Trainable] = []
    for constant, uses in _uses(graph).items():
        var, argument = uses[0]
        kind = "weight" if graph.definition[var].op in _LINEAR else "bias"
        name = _unique(f"{layer_of(var)}.{kind}", {other.name for other in found})
        value = np.array(constant.value.numpy())
        found.append(Trainable(name=name, value=value, var=var, argument=argument))
    return tuple(found)


@tvm.transform.module_pass(opt_level=0)
class LiftConstants:
    """Turn what `trainable_constants` finds into parameters behind the inputs, in its order.

    Parameters
    ----------
    names : collection of str, optional
        Only these.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self._names = None if names is None else frozenset(names)

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with more parameters, or the very same one."""
        graph = Dataflow(module["main"])
        places: dict[tuple[relax.Var, int], relax.Var] = {}
        params = list(graph.function.params)
        for lifted, uses in zip(trainable_constants(module), _uses(graph).values(), strict=True):
            if self._names is not None and lifted.name not in self._names:
                continue
            ty = relax.TensorType(lifted.value.shape, "float32")
            params.append(relax.Var(lifted.name, ty))
            places.update(dict.fromkeys(uses, params[-1]))
        if not places:
            return module
        builder = Rebuilder(graph.function, params)
        for binding in graph.bindings:
            if not any(var.same_as(binding.var) for var, _ in places):
                builder.copy(binding)
                continue
            arguments = [
                places.get((binding.var, index), builder.use(argument))
                for index, argument in enumerate(binding.value.args)
            ]
            builder.bind(binding.var, with_args(binding.value, arguments))
        return _with_main(module, builder.finish())


@tvm.transform.module_pass(opt_level=0)
class BindConstants:
    """Replace parameters of ``main`` by constants.

    Parameters
    ----------
    values : mapping of str to ndarray
        Parameter name → value.

    Raises
    ------
    UsageError
        A name is not a parameter, or a value has another shape or dtype.
    """

    def __init__(self, values: Mapping[str, np.ndarray]) -> None:
        self._values = dict(values)

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with fewer parameters, or the very same one."""
        if not self._values:
            return module
        graph = Dataflow(module["main"])
        bound = {
            param: self._values[str(param.name)]
            for param in graph.function.params
            if str(param.name) in self._values
        }
        unknown = set(self._values) - {str(param.name) for param in bound}
        if unknown:
            raise UsageError(f"main has no parameter {', '.join(map(repr, sorted(unknown)))}")
        kept = [param for param in graph.function.params if param not in bound]
        builder = Rebuilder(graph.function, kept)
        for param, value in bound.items():
            given, wanted = relax.TensorType(value.shape, str(value.dtype)), param.ty
            if str(given) != str(wanted):
                raise UsageError(f"{str(param.name)!r} is {wanted}, the value given is {given}")
            builder.replace(param, relax.const(value))
        for binding in graph.bindings:
            builder.copy(binding)
        return _with_main(module, builder.finish())


def _uses(graph: Dataflow) -> dict[GenericConst, list[tuple[relax.Var, int]]]:
    """Return each trainable constant with the places that take it."""
    uses: dict[GenericConst, list[tuple[relax.Var, int]]] = {}
    for binding in graph.bindings:
        call = binding.value
        if not isinstance(call, relax.Call):
            continue
        for index, argument in enumerate(call.args):
            if isinstance(argument, GenericConst) and _is_trainable(graph, call, argument):
                uses.setdefault(argument, []).append((binding.var, index))
    return uses


def _is_trainable(graph: Dataflow, call: relax.Call, argument: GenericConst) -> bool:
    if argument.ty.dtype != "float32" or argument.value.numpy().size <= 1:
        return False
    if call.op in _LINEAR:
        return True
    if not call.op.same_as(_ADD):
        return False
    sources = [graph.call(other) for other in call.args if not other.same_as(argument)]
    return any(source is not None and source.op in _LINEAR for source in sources)


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _with_main(module: tvm.IRModule, function: relax.Function) -> tvm.IRModule:
    functions = dict(module.functions_items())
    functions[module.get_global_var("main")] = function
    return tvm.IRModule(functions, attrs=module.attrs)
