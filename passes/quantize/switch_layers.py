"""Gives every layer a switch that selects, at run time, in which precision it is emulated.

Rewrites convolutions and matrix products with a constant weight on the NHWC module that is
quantized later: beside each the same operator stands once more for every alternative, with the
weight (and the input) rounded as that precision rounds them, computed in float32; one new parameter
says which result goes on. So one compiled network tells what each precision of each layer costs in
accuracy. Numerics: with every switch at 0 exact; else what the precision's kernel computes, up to
float32 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from hone.errors import ModelError
from hone.passes.graph.dataflow import Dataflow, Rebuilder, layer_of, with_args

SWITCH: Final = "hone_switch"
"""Name of the new parameter, the last one: int32 ``[layers]``, in the order of the mapping."""

WEIGHTED: Final = (Op.get("relax.nn.conv2d"), Op.get("relax.matmul"))
"""Operators that can be switched."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Emulation:
    """How a precision changes what a layer reads.

    Parameters
    ----------
    weight : numpy.ndarray
        float32, the real values that the rounded weight stands for, in the operator's own layout.
    data : tuple of callable
        One after the other round the layer's input, such as to levels and back; none leave it.
    """

    weight: np.ndarray
    data: tuple[Callable[[relax.Expr], relax.Expr], ...] = ()


@tvm.transform.module_pass(opt_level=0)
class SwitchLayers:
    """Add the switches, and return the outputs as one tuple however many there are.

    Parameters
    ----------
    alternatives : mapping of str to sequence of Emulation
        Binding name of a layer → its alternatives: switch value 1 is the first, 0 the layer as it
        is.
    """

    def __init__(self, *, alternatives: Mapping[str, Sequence[Emulation]]) -> None:
        self._alternatives = {name: tuple(each) for name, each in alternatives.items()}

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the switching module.

        Raises
        ------
        ModelError
            A name is no convolution or matrix product of the function, or of two of them.
        """
        function = module["main"]
        graph = Dataflow(function)
        operators = _operators(graph, self._alternatives)
        switch = relax.Var(SWITCH, relax.TensorType((len(self._alternatives),), "int32"))
        number = {operators[name]: index for index, name in enumerate(self._alternatives)}
        builder = Rebuilder(function, [*function.params, switch])
        for binding in graph.bindings:
            index = number.get(binding.var)
            if index is None:
                builder.copy(binding)
                continue
            call = builder.use(binding.value)
            name = str(binding.var.name)
            result: relax.Expr = builder.emit(call, f"{name}@float")
            value = builder.emit(
                relax.op.take(switch, relax.const(np.array([index], "int64")), axis=0, mode="clip"),
                f"{name}@switch",
            )
            for position, emulation in enumerate(self._alternatives[layer_of(binding.var)], 1):
                data = call.args[0]
                for step, change in enumerate(emulation.data):
                    data = builder.emit(change(data), f"{name}@data{position}_{step}")
                rounded = with_args(call, [data, relax.const(emulation.weight), *call.args[2:]])
                rounded = builder.emit(rounded, f"{name}@rounded{position}")
                chosen = relax.op.equal(value, relax.const(position, "int32"))
                result = relax.op.where(builder.emit(chosen, f"{name}@on"), rounded, result)
                result = builder.emit(result, f"{name}@choice{position}")
            builder.bind(binding.var, result)
        body = relax.Tuple([builder.use(output) for output in graph.outputs])
        return tvm.IRModule({"main": builder.finish(body)}, attrs=module.attrs)


def _operators(
    graph: Dataflow, alternatives: Mapping[str, Sequence[Emulation]]
) -> dict[str, relax.Var]:
    """Return the binding of each layer's one convolution or matrix product."""
    found: dict[str, relax.Var] = {}
    problems: list[str] = []
    for binding in graph.bindings:
        layer = layer_of(binding.var)
        call = graph.call(binding.var)
        if layer not in alternatives or call is None or call.op not in WEIGHTED:
            continue
        if layer in found:
            problems.append(f"{layer}: has more than one convolution or matrix product")
        found[layer] = binding.var
    problems += [
        f"{layer}: is no convolution or matrix product"
        for layer in alternatives
        if layer not in found
    ]
    if problems:
        raise ModelError("these layers cannot be switched", problems=problems)
    return found
