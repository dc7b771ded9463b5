"""Where a network changes between float and integers, or between types of float."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import tvm
from tvm import relax
from tvm.ir import Op

import hone.passes.quantize.operators  # noqa: F401  registers the operators
from hone.passes.graph.dataflow import Dataflow, layer_of


class Direction(StrEnum):
    """What a conversion makes."""

    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"
    CAST = "cast"


_DIRECTIONS: Final = {
    Op.get("hone.quantize"): Direction.QUANTIZE,
    Op.get("hone.dequantize"): Direction.DEQUANTIZE,
    Op.get("relax.astype"): Direction.CAST,
}
_FLOATS: Final = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One conversion of a tensor.

    Parameters
    ----------
    binding : str
        Name of the variable that carries the result.
    direction : Direction
        What it makes.
    layer : str
        Binding name of the layer whose result is converted, or name of an input.
    """

    binding: str
    direction: Direction
    layer: str


def conversions(module: tvm.IRModule) -> dict[str, Conversion]:
    """Return the conversions of a network by the name of their binding, in graph order.

    Parameters
    ----------
    module : IRModule
        Quantized and not lowered.
    """
    graph = Dataflow(module["main"])
    found: dict[str, Conversion] = {}
    for binding in graph.bindings:
        call = graph.call(binding.var)
        direction = None if call is None else _DIRECTIONS.get(call.op)
        if call is None or direction is None or not isinstance(call.args[0], relax.Var):
            continue
        if direction is Direction.CAST and not _between_floats(call):
            continue
        name = str(binding.var.name)
        found[name] = Conversion(binding=name, direction=direction, layer=_source(graph, call))
    return found


def _between_floats(call: relax.Call) -> bool:
    types = [str(call.args[0].ty.dtype), str(call.ty.dtype)]
    return all(dtype in _FLOATS for dtype in types) and types[0] != types[1]


def _source(graph: Dataflow, call: relax.Call) -> str:
    """Return the layer whose result is converted, seen through changes of layout and shape."""
    var = call.args[0]
    while (before := graph.call(var)) is not None and before.op in _MOVES:
        if not isinstance(before.args[0], relax.Var):
            break
        var = before.args[0]
    return layer_of(var)


_MOVES: Final = tuple(Op.get(f"relax.{name}") for name in ("permute_dims", "layout_transform"))
