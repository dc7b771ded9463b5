"""Splits a convolution or matrix product into parts, with a concatenation behind them.

Rewrites ``relax.nn.conv2d`` and ``relax.matmul`` of chosen layers along output channels (constant
weights) or along the batch. Runs before the layout changes; what stood behind the layer then
stands behind the concatenation. Numerics: exact, each output element is the same sum.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import tvm
from tvm import relax

from hone.errors import UsageError

from .dataflow import Dataflow, Rebuilder, is_dataflow, layer_of, shape_of, with_args

_CONV2D = tvm.ir.Op.get("relax.nn.conv2d")
_MATMUL = tvm.ir.Op.get("relax.matmul")

Axis = Literal["channels", "batch"]


@relax.transform.function_pass(opt_level=0)
class SplitOperator:
    """Compute chosen layers in ``parts`` parts of nearly equal size.

    Parameters
    ----------
    layers : sequence of str
        Names of the bindings that carry the layers (``Layer.binding``).
    parts : int
        At least 2. The first parts are larger by one where it does not divide the extent.
    axis : {"channels", "batch"}
        What is divided.

    Raises
    ------
    UsageError
        When the pass is applied: a layer does not exist, is no convolution or matrix product, has
        weights that are not constant (for channels), is grouped, or has fewer channels or samples
        than parts.
    """

    def __init__(self, *, layers: Sequence[str], parts: int, axis: Axis = "channels") -> None:
        if parts < 2:
            raise UsageError(f"parts must be at least 2, not {parts}")
        self._layers = tuple(layers)
        self._parts = parts
        self._axis = axis

    def transform_function(
        self, function: relax.Function, _module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> relax.Function:
        """Return the function with its layers split, or the very same function."""
        if not is_dataflow(function) or not self._layers:
            return function
        graph = Dataflow(function)
        chosen = self._find(graph)
        builder = Rebuilder(function)
        for binding in graph.bindings:
            if binding.var in chosen:
                self._split(graph, builder, binding)
            else:
                builder.copy(binding)
        return builder.finish()

    def _find(self, graph: Dataflow) -> set[relax.Var]:
        """Return the variable that computes each chosen layer; all problems at once."""
        candidates: dict[str, relax.Var] = {}
        for binding in graph.bindings:
            call = graph.call(binding.var)
            if call is not None and (call.op.same_as(_CONV2D) or call.op.same_as(_MATMUL)):
                candidates.setdefault(layer_of(binding.var), binding.var)
        problems = []
        for layer in self._layers:
            if layer not in candidates:
                near = difflib.get_close_matches(layer, candidates, n=1)
                meant = f", did you mean {near[0]!r}?" if near else ""
                problems.append(f"{layer!r} is no convolution or matrix product{meant}")
            elif reason := self._obstacle(graph, graph.definition[candidates[layer]]):
                problems.append(f"{layer!r} {reason}")
        if problems:
            raise UsageError("cannot split: " + "; ".join(problems))
        return {candidates[layer] for layer in self._layers}

    def _obstacle(self, graph: Dataflow, call: relax.Call) -> str | None:
        """Return why a call cannot be split, or None."""
        data, weight = call.args
        if self._axis == "batch":
            if len(shape_of(data)) < 2:
                return "has no batch axis"
            samples = shape_of(data)[_batch_axis(call)]
            return f"has a batch of only {samples}" if samples < self._parts else None
        if graph.constant(weight) is None:
            return "has weights that are computed, so its channels cannot be split"
        if call.op.same_as(_CONV2D) and int(call.attrs.groups) != 1:
            return f"is a convolution of {int(call.attrs.groups)} groups"
        if call.op.same_as(_MATMUL) and len(shape_of(weight)) != 2:
            return "multiplies by a batched weight"
        channels = shape_of(weight)[_weight_axis(call)]
        return f"has only {channels} output channels" if channels < self._parts else None

    def _split(self, graph: Dataflow, builder: Rebuilder, binding: relax.VarBinding) -> None:
        call, name = binding.value, binding.var.name
        data = builder.use(call.args[0])
        if self._axis == "batch":
            axis = _batch_axis(call)
            pieces = self._slices(builder, data, axis, name)
            weights = [builder.use(call.args[1])] * self._parts
        else:
            axis = _channel_axis(call)
            pieces = [data] * self._parts
            constant = graph.constant(call.args[1])
            if constant is None:
                raise RuntimeError(f"{name}: checked to be constant, and is not")
            weights = [
                relax.const(np.ascontiguousarray(part))
                for part in np.array_split(constant, self._parts, axis=_weight_axis(call))
            ]
        results = [
            builder.emit(with_args(call, [piece, weight]), f"{name}@part{number}")
            for number, (piece, weight) in enumerate(zip(pieces, weights, strict=True))
        ]
        builder.bind(binding.var, relax.op.concat(results, axis=axis))

    def _slices(
        self, builder: Rebuilder, data: relax.Expr, axis: int, name: str
    ) -> list[relax.Expr]:
        extent = shape_of(data)[axis]
        ends = np.cumsum([len(part) for part in np.array_split(np.arange(extent), self._parts)])
        starts = [0, *ends[:-1]]
        return [
            builder.emit(
                relax.op.strided_slice(data, axes=[axis], begin=[int(start)], end=[int(end)]),
                f"{name}@slice{number}",
            )
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]


def _batch_axis(call: relax.Call) -> int:
    if call.op.same_as(_CONV2D):
        return str(call.attrs.data_layout).index("N")
    return 0


def _channel_axis(call: relax.Call) -> int:
    if call.op.same_as(_CONV2D):
        return (str(call.attrs.out_layout) or str(call.attrs.data_layout)).index("C")
    return len(shape_of(call)) - 1


def _weight_axis(call: relax.Call) -> int:
    if call.op.same_as(_CONV2D):
        return str(call.attrs.kernel_layout).index("O")
    return 1
