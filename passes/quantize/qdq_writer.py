"""Writes a QDQ function in integers: a site at each quantization that has one, else as it was.

Binding by binding, in the order of the model. What the integer operators absorbed has no reader
any more and is left out. Numerics: see `hone.passes.quantize.match_qdq`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import PART, Dataflow, Rebuilder, layer_of, shape_of, variables

from . import operators
from .integer_layer import IntegerLayer
from .level_layouts import Layout, LevelLayouts, LevelTensor, change_layout
from .level_moves import LevelMoves
from .levels import Levels
from .qdq_combinations import LevelCombinations
from .qdq_layers import (
    QdqSite,
    add_bias,
    bounds_of,
    constants,
    dynamic,
    dynamic_constants,
    start,
)
from .qdq_reader import SHIFT, levels_of_dequantize, levels_of_quantize
from .quantize_int8 import QuantizedLayer
from .site import Kind, Skipped
from .weighted_writer import WeightedWriter


class QdqWriter:
    """Writes the integer function of one with QDQ.

    Parameters
    ----------
    function : relax.Function
        NCHW; stays as it is.

    Attributes
    ----------
    quantized : list of QuantizedLayer
        What became integer operators.
    skipped : list of Skipped
        Convolutions and matrix products with integer weights that stay in float.
    """

    def __init__(self, function: relax.Function) -> None:
        self._graph = Dataflow(function)
        self._function = function
        self._rebuilder = Rebuilder(function)
        self._layouts = LevelLayouts(self._rebuilder)
        self._moves = LevelMoves(self._graph, self._rebuilder, self._layouts)
        self._combinations = LevelCombinations(
            self._graph, self._rebuilder, self._layouts, self._moves, self._source
        )
        self._weighted = WeightedWriter(self._rebuilder.emit)
        self._same = _same_quantizations(self._graph)
        self._tensors: dict[relax.Var, LevelTensor] = {}
        self._stored: set[relax.Var] = set()
        self._sites: dict[relax.Var, QdqSite] = {}
        self._layers: dict[relax.Var, tuple[IntegerLayer, ...]] = {}
        self.quantized = self._combinations.quantized
        self.skipped: list[Skipped] = []

    def write(self) -> relax.Function:
        """Return the integer function."""
        self._find_sites()
        for binding in self._graph.bindings:
            var, value = binding.var, binding.value
            levels = levels_of_quantize(value)
            if var in self._sites:
                self._write_site(self._sites[var], var)
            elif levels is not None:
                if self._same[var].same_as(var):
                    self._tensors[var] = self._quantized(var, value, levels)
            elif levels_of_dequantize(value) is not None:
                self._write_real(var, value)
            else:
                self._store(variables(value))
                self._rebuilder.copy(binding)
                continue
            if not isinstance(var, relax.DataflowVar):
                self._store([var])
        return self._rebuilder.finish()

    # ------------------------------------------------------------ level tensors

    def _source(self, var: relax.Var) -> LevelTensor:
        """Return a level tensor of the model by its variable; the levels are the reader's."""
        var = self._same.get(var, var)
        if var in self._tensors:
            return self._tensors[var]
        new = self._layouts.unsigned(self._rebuilder.use(var))
        return LevelTensor(var=new, layout=Layout.MODEL, levels=Levels(scale=1.0, zero_point=0))

    def _levels(self, expr: relax.Expr) -> LevelTensor:
        return self._moves.levels(expr, self._source)

    def _store(self, used: Iterable[relax.Var]) -> None:
        """Write the level tensors that an operator outside of integers reads as they are."""
        for var in used:
            first = self._same.get(var, var)
            if first not in self._tensors or var in self._stored:
                continue
            stored = self._layouts.as_stored(self._tensors[first], str(var.ty.dtype))
            if isinstance(var, relax.DataflowVar):
                self._rebuilder.replace(var, stored)
            else:
                self._rebuilder.bind(var, stored)
            self._stored.add(var)

    def _write_real(self, var: relax.Var, call: relax.Call) -> None:
        """Write a dequantization; where only integer operators read it, nobody keeps it."""
        tensor = self._levels(var)
        data = self._layouts.as_layout(tensor, Layout.MODEL)
        self._rebuilder.bind(var, operators.dequantize(data, *_scalars(tensor.levels)))

    # ------------------------------------------------------------ quantizations

    def _quantized(self, var: relax.Var, call: relax.Call, output: Levels) -> LevelTensor:
        """Return what a quantization gives: by an integer operator, else from the real values."""
        real, low, high = call.args[0], -math.inf, math.inf
        while (inner := self._graph.call(real)) is not None:
            if self._moves.has_levels(real):
                return self._combinations.requantized(
                    self._levels(real), output, low, high, layer_of(real)
                )
            bounds = bounds_of(inner)
            if bounds is None:
                break
            # An earlier bound is mapped by the later ones.
            low, high = (min(max(x, low), high) for x in bounds[1:])
            real = bounds[0]
        if inner is not None:
            found = self._combinations.combined(real, inner, output, low, high)
            if found is not None:
                return found
        self._store(variables(call))
        levels = operators.quantize(self._rebuilder.use(call.args[0]), *_scalars(output))
        new = self._rebuilder.emit(levels, layer_of(var))
        return LevelTensor(var=new, layout=Layout.MODEL, levels=output)

    # ------------------------------------------------------------ convolutions and products

    def _find_sites(self) -> None:
        """Find every convolution and product that integers can compute, by its result."""
        for binding in self._graph.bindings:
            var, call = binding.var, binding.value
            if not isinstance(call, relax.Call):
                continue
            found = start(self._graph, var, call)
            if isinstance(found, QdqSite) and not self._moves.has_levels(found.data):
                found = self._dynamic(found)
            elif isinstance(found, QdqSite):
                found = self._fitted(self._extended(found))
            if isinstance(found, str):
                self.skipped.append(Skipped(layer=layer_of(var), reason=found))

    def _dynamic(self, site: QdqSite) -> str | None:
        """Keep a site whose zero point only the run tells; else say why not."""
        found = dynamic(self._graph, site)
        if found is None:
            return "its input is not quantized by one constant scale"
        layers = dynamic_constants(self._graph, found)
        if isinstance(layers, str):
            return layers
        self._sites[site.chain[0]], self._layers[site.chain[0]] = found, layers
        return None

    def _extended(self, site: QdqSite) -> QdqSite:
        """Absorb what follows a site up to its quantization."""
        while (following := self._only_reader(site.chain[-1])) is not None:
            var, call = following
            if levels_of_quantize(call) is not None:
                return replace(site, output=var)
            extended = None if _clipped(site) else add_bias(self._graph, site, var, call)
            extended = extended or self._add_residual(site, var, call)
            if extended is None:
                bounds = bounds_of(call)
                if bounds is None:
                    break
                low, high = (min(max(x, bounds[1]), bounds[2]) for x in (site.low, site.high))
                extended = replace(site, chain=(*site.chain, var), low=low, high=high)
            site = extended
        return site.as_float()

    def _add_residual(self, site: QdqSite, var: relax.Var, call: relax.Call) -> QdqSite | None:
        if call.op != _ADD or site.residual is not None or _clipped(site):
            return None
        if site.form is not None and site.form.interleaving is not None:
            return None  # the residual would have to be cut into phases
        result = site.chain[-1]
        other = next((x for x in call.args if not x.same_as(result)), None)
        if other is None or shape_of(other) != shape_of(call) or not self._moves.has_levels(other):
            return None
        return replace(site, chain=(*site.chain, var), residual=other)

    def _only_reader(self, var: relax.Var) -> tuple[relax.Var, relax.Call] | None:
        """Return who alone reads a variable; equal quantizations of it count once."""
        readers = {self._same.get(u, u) if u is not None else None for u in self._graph.users[var]}
        several = len(self._graph.users[var]) > 1
        if len(readers) != 1 or None in readers:
            return None
        reader = next(iter(readers))
        call = self._graph.definition[reader]
        if not isinstance(call, relax.Call) or (several and levels_of_quantize(call) is None):
            return None
        return reader, call

    def _fitted(self, site: QdqSite) -> str | None:
        """Keep a site whose integers fit, if need be with a float result; else say why not."""
        data = self._levels_before(site.data)
        for attempt in (site, site.as_float()):
            output = None
            if attempt.output is not None:
                output = levels_of_quantize(self._graph.definition[attempt.output])
            residual = None if attempt.residual is None else self._levels_before(attempt.residual)
            layer = constants(attempt, data, output, residual)
            if isinstance(layer, str):
                continue
            result = attempt.chain[-1] if attempt.output is None else attempt.output
            self._sites[result], self._layers[result] = attempt, layer
            return None
        return str(layer)

    def _levels_before(self, expr: relax.Expr) -> Levels:
        """Return what the levels of an expression mean, without writing anything."""
        while (call := self._graph.call(self._graph.resolve(expr))) is not None:
            levels = levels_of_dequantize(call)
            if levels is not None:
                return levels
            bounds = bounds_of(call)
            expr = call.args[0] if bounds is None else bounds[0]
        raise ValueError(f"{expr} has no levels")

    def _write_site(self, site: QdqSite, result: relax.Var) -> None:
        layout = Layout.MODEL if site.kind is Kind.DENSE else Layout.NHWC
        data, zero_point = self._data(site, layout)
        residual = None
        if site.residual is not None:
            residual = self._layouts.as_layout(self._levels(site.residual), layout)
        dtype = "float32" if site.output is None else "uint8"
        call = self._operator(site, self._layers[result], data, residual, dtype, zero_point)
        name = layer_of(site.chain[0])
        layers = tuple(dict.fromkeys(layer_of(var) for var in site.chain))
        self.quantized.append(
            QuantizedLayer(layer=name, kind=site.kind, layers=layers, output=dtype)
        )
        if site.output is not None:
            levels = levels_of_quantize(self._graph.definition[site.output])
            if levels is None:
                raise ValueError(f"{site.output} is no quantization")
            new = self._rebuilder.emit(call, name)
            self._tensors[result] = LevelTensor(var=new, layout=layout, levels=levels)
        elif site.kind is Kind.DENSE:
            self._rebuilder.bind(result, call)
        else:
            new = self._rebuilder.emit(call, f"{name}{PART}conv2d")
            self._rebuilder.bind(result, change_layout(new, Layout.MODEL))

    def _data(self, site: QdqSite, layout: Layout) -> tuple[relax.Var, relax.Var | None]:
        """Return the levels that a site reads, and their zero point where the run tells it."""
        if site.zero_point is None:
            return self._layouts.as_layout(self._levels(site.data), layout), None
        call = self._graph.definition[self._graph.resolve(site.data)]
        zero_point = self._rebuilder.use(site.zero_point)
        if str(call.args[0].ty.dtype) == "int8":
            name = f"{layer_of(site.chain[0])}{PART}zero_point"
            moved = relax.op.add(zero_point, relax.const(SHIFT, "int32"))
            zero_point = self._rebuilder.emit(moved, name)
        return self._layouts.as_layout(self._source(call.args[0]), layout), zero_point

    def _operator(
        self,
        site: QdqSite,
        layers: tuple[IntegerLayer, ...],
        data: relax.Var,
        residual: relax.Var | None,
        dtype: str,
        zero_point: relax.Var | None,
    ) -> relax.Expr:
        name = layer_of(site.chain[0])
        if site.form is None:
            return self._weighted.dense(
                layers[0], data, residual, layer=name, out_dtype=dtype, zero_point=zero_point
            )
        return self._weighted.convolution(
            site.form,
            layers,
            data,
            residual,
            layer=name,
            out_dtype=dtype,
            zero_point=zero_point,
        )


def _same_quantizations(graph: Dataflow) -> dict[relax.Var, relax.Var]:
    """Return, for each quantization, the first one of the same tensor with the same levels.

    Exporters quantize a tensor once for each of its readers.
    """
    first: dict[tuple[relax.Var, Levels, str], relax.Var] = {}
    same = {}
    for binding in graph.bindings:
        levels = levels_of_quantize(binding.value)
        data = binding.value.args[0] if levels is not None else None
        if levels is not None and isinstance(data, relax.Var):
            key = (data, levels, str(binding.var.ty.dtype))
            same[binding.var] = first.setdefault(key, binding.var)
        elif levels is not None:
            same[binding.var] = binding.var
    return same


def _clipped(site: QdqSite) -> bool:
    """Return whether an activation follows already: what is added comes behind it."""
    return (site.low, site.high) != (-math.inf, math.inf)


def _scalars(levels: Levels) -> tuple[relax.Expr, relax.Expr]:
    return relax.const(np.float32(levels.scale), "float32"), relax.const(levels.zero_point, "int32")


_ADD = Op.get("relax.add")
