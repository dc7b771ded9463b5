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
from .arithmetic import FIXED_LIMIT, GUARD_BITS
from .integer_layer import INT32_MAX, IntegerLayer, rescaling
from .integer_writer import rescale
from .level_layouts import Layout, LevelLayouts, LevelTensor, change_layout
from .level_moves import LevelMoves
from .level_tables import LevelFunction, level_function, table_of
from .levels import Levels
from .qdq_layers import QdqSite, add_bias, bounds_of, constants, start
from .qdq_reader import levels_of_dequantize, levels_of_quantize
from .quantize_int8 import QuantizedLayer
from .site import Kind, Skipped
from .weighted_writer import WeightedWriter

_NHWC_AXIS = (0, 3, 1, 2)
"""Where an axis of NCHW is in NHWC."""


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
        self._weighted = WeightedWriter(self._rebuilder.emit)
        self._same = _same_quantizations(self._graph)
        self._tensors: dict[relax.Var, LevelTensor] = {}
        self._stored: set[relax.Var] = set()
        self._sites: dict[relax.Var, QdqSite] = {}
        self._layers: dict[relax.Var, tuple[IntegerLayer, ...]] = {}
        self.quantized: list[QuantizedLayer] = []
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
                return self._requantized(self._levels(real), output, low, high, layer_of(real))
            bounds = bounds_of(inner)
            if bounds is None:
                break
            # An earlier bound is mapped by the later ones.
            low, high = (min(max(x, low), high) for x in bounds[1:])
            real = bounds[0]
        if inner is not None:
            found = self._combined(real, inner, output, low, high)
            if found is not None:
                return found
        self._store(variables(call))
        levels = operators.quantize(self._rebuilder.use(call.args[0]), *_scalars(output))
        new = self._rebuilder.emit(levels, layer_of(var))
        return LevelTensor(var=new, layout=Layout.MODEL, levels=output)

    def _requantized(
        self, given: LevelTensor, output: Levels, low: float, high: float, name: str
    ) -> LevelTensor:
        """Return levels of another scale: the mean over an axis of extent 1, requantized."""
        if given.levels == output:
            return self._moves.clipped(given, low, high, name)
        constants = rescaling(given.levels, output, (low, high))
        new = rescale(self._rebuilder.emit, given.var, constants, f"{name}{PART}rescale")
        return LevelTensor(var=new, layout=given.layout, levels=output)

    def _combined(
        self, var: relax.Var, call: relax.Call, output: Levels, low: float, high: float
    ) -> LevelTensor | None:
        """Return an addition, mean, average pooling or concatenation of levels; else None."""
        if call.op == _CONCAT:
            return self._concatenated(var, call, output, low, high)
        function = level_function(self._graph, var, self._moves.is_moved)
        if function is not None and self._moves.has_levels(function.source):
            return self._looked_up(var, function, output, low, high)
        if call.op == _ADD and shape_of(call.args[0]) == shape_of(call.args[1]):
            return self._sum(var, call, output, low, high)
        if call.op == _MULTIPLY:
            return self._product(var, call, output, low, high)
        if call.op not in (_MEAN, _AVG_POOL2D) or not self._moves.has_levels(call.args[0]):
            return None
        given = self._levels(call.args[0])
        if call.op == _MEAN:
            new, layout, kind = *self._mean(call, given, output, low, high), Kind.MEAN
        elif not _averages_whole_windows(call):
            return None
        else:
            new, layout, kind = *self._average(call, given, output, low, high), Kind.AVG_POOL2D
        if new is None:
            return None
        result = self._rebuilder.emit(new, layer_of(var))
        self._note(var, kind)
        return LevelTensor(var=result, layout=layout, levels=output)

    def _sum(
        self, var: relax.Var, call: relax.Call, output: Levels, low: float, high: float
    ) -> LevelTensor | None:
        if not all(self._moves.has_levels(x) for x in call.args):
            return None
        left, right = (self._levels(x) for x in call.args)
        scales = np.array([left.levels.scale, right.levels.scale])
        fixed = scales / output.scale * (1 << GUARD_BITS)
        if fixed.max() * 255 >= FIXED_LIMIT:
            return None
        layout = Layout.NHWC if Layout.NHWC in (left.layout, right.layout) else Layout.MODEL
        points = [left.levels.zero_point, right.levels.zero_point]
        new = self._rebuilder.emit(
            operators.add_int8(
                self._layouts.as_layout(left, layout),
                self._layouts.as_layout(right, layout),
                relax.const(fixed.astype(np.float32)),
                relax.const(np.array([*points, *output.bounds(low, high)], np.int32)),
            ),
            layer_of(var),
        )
        self._note(var, Kind.ADD)
        return LevelTensor(var=new, layout=layout, levels=output)

    def _looked_up(
        self, var: relax.Var, function: LevelFunction, output: Levels, low: float, high: float
    ) -> LevelTensor:
        given = self._levels(function.source)
        table = table_of(function.apply, given.levels, output, (low, high))
        new = self._rebuilder.emit(
            operators.table_int8(given.var, relax.const(table)), layer_of(var)
        )
        layers = tuple(dict.fromkeys(layer_of(each) for each in function.inner))
        self._note(var, Kind.TABLE, layers)
        return LevelTensor(var=new, layout=given.layout, levels=output)

    def _product(
        self, var: relax.Var, call: relax.Call, output: Levels, low: float, high: float
    ) -> LevelTensor | None:
        if not all(self._moves.has_levels(x) for x in call.args):
            return None
        if len({len(shape_of(x)) for x in call.args}) > 1:
            return None
        left, right = (self._levels(x) for x in call.args)
        layout = Layout.NHWC if Layout.NHWC in (left.layout, right.layout) else Layout.MODEL
        points = [left.levels.zero_point, right.levels.zero_point]
        new = self._rebuilder.emit(
            operators.multiply_int8(
                self._layouts.as_layout(left, layout),
                self._layouts.as_layout(right, layout),
                _multiplier(left.levels.scale * right.levels.scale / output.scale),
                relax.const(np.array([*points, *output.bounds(low, high)], np.int32)),
            ),
            layer_of(var),
        )
        self._note(var, Kind.MULTIPLY)
        return LevelTensor(var=new, layout=layout, levels=output)

    def _concatenated(
        self, var: relax.Var, call: relax.Call, output: Levels, low: float, high: float
    ) -> LevelTensor | None:
        fields = self._graph.resolve(call.args[0])
        if not isinstance(fields, relax.Tuple):
            return None
        if not all(self._moves.has_levels(x) for x in fields.fields):
            return None
        name = layer_of(var)
        parts = [
            self._requantized(self._levels(x), output, -math.inf, math.inf, name)
            for x in fields.fields
        ]
        rank = len(shape_of(call))
        axis = int(call.attrs.axis) % rank
        layout = Layout.NHWC if all(p.layout is Layout.NHWC for p in parts) else Layout.MODEL
        tensors = [self._layouts.as_layout(p, layout) for p in parts]
        where = _NHWC_AXIS[axis] if layout is Layout.NHWC else axis
        new = self._rebuilder.emit(relax.op.concat(tensors, where), name)
        joined = LevelTensor(var=new, layout=layout, levels=output)
        return self._moves.clipped(joined, low, high, name)

    def _mean(
        self, call: relax.Call, given: LevelTensor, output: Levels, low: float, high: float
    ) -> tuple[relax.Call | None, Layout]:
        shape = shape_of(call.args[0])
        axes = [int(a) % len(shape) for a in call.attrs.axis or range(len(shape))]
        count = math.prod(shape[a] for a in axes)
        if count * 255 > INT32_MAX:
            return None, Layout.MODEL
        layout = Layout.MODEL
        if given.layout is Layout.NHWC and (call.attrs.keepdims or sorted(axes) == [2, 3]):
            # Without the averaged axes nothing is left that the layouts order differently.
            layout = Layout.NHWC if call.attrs.keepdims else Layout.MODEL
            data, axes = given.var, [_NHWC_AXIS[a] for a in axes]
        else:
            data = self._layouts.as_layout(given, Layout.MODEL)
        operator = operators.mean_int8(
            data,
            _multiplier(given.levels.scale / (output.scale * count)),
            _levels_constant(given.levels, output, low, high),
            axis=axes,
            keepdims=call.attrs.keepdims,
        )
        return operator, layout

    def _average(
        self, call: relax.Call, given: LevelTensor, output: Levels, low: float, high: float
    ) -> tuple[relax.Call, Layout]:
        attrs = call.attrs
        count = math.prod(int(x) for x in attrs.pool_size)
        operator = operators.avg_pool2d_int8(
            self._layouts.as_layout(given, Layout.NHWC),
            _multiplier(given.levels.scale / (output.scale * count)),
            _levels_constant(given.levels, output, low, high),
            pool_size=attrs.pool_size,
            strides=attrs.strides,
            padding=attrs.padding,
            dilation=attrs.dilation,
        )
        return operator, Layout.NHWC

    # ------------------------------------------------------------ convolutions and products

    def _find_sites(self) -> None:
        """Find every convolution and product that integers can compute, by its result."""
        for binding in self._graph.bindings:
            var, call = binding.var, binding.value
            if not isinstance(call, relax.Call):
                continue
            found = start(self._graph, var, call)
            if isinstance(found, QdqSite) and not self._moves.has_levels(found.data):
                found = "its input is not quantized by one constant scale"
            if isinstance(found, QdqSite):
                found = self._fitted(self._extended(found))
            if isinstance(found, str):
                self.skipped.append(Skipped(layer=layer_of(var), reason=found))

    def _extended(self, site: QdqSite) -> QdqSite:
        """Absorb what follows a site up to its quantization."""
        while (following := self._only_reader(site.chain[-1])) is not None:
            var, call = following
            if levels_of_quantize(call) is not None:
                return replace(site, output=var)
            extended = add_bias(self._graph, site, var, call) if site.high == math.inf else None
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
        clipped = (site.low, site.high) != (-math.inf, math.inf)
        if call.op != _ADD or site.residual is not None or clipped:
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
        data = self._layouts.as_layout(self._levels(site.data), layout)
        residual = None
        if site.residual is not None:
            residual = self._layouts.as_layout(self._levels(site.residual), layout)
        dtype = "float32" if site.output is None else "uint8"
        call = self._operator(site, self._layers[result], data, residual, dtype)
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

    def _operator(
        self,
        site: QdqSite,
        layers: tuple[IntegerLayer, ...],
        data: relax.Var,
        residual: relax.Var | None,
        dtype: str,
    ) -> relax.Expr:
        name = layer_of(site.chain[0])
        if site.form is None:
            return self._weighted.dense(layers[0], data, residual, layer=name, out_dtype=dtype)
        return self._weighted.convolution(
            site.form, layers, data, residual, layer=name, out_dtype=dtype
        )

    def _note(self, var: relax.Var, kind: Kind, layers: tuple[str, ...] = ()) -> None:
        name = layer_of(var)
        self.quantized.append(
            QuantizedLayer(layer=name, kind=kind, layers=layers or (name,), output="uint8")
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


def _averages_whole_windows(call: relax.Call) -> bool:
    attrs = call.attrs
    uniform = bool(attrs.count_include_pad) or not any(int(p) for p in attrs.padding)
    count = math.prod(int(x) for x in attrs.pool_size)
    return (
        str(attrs.layout) == "NCHW" and uniform and not attrs.ceil_mode and count * 255 <= INT32_MAX
    )


def _multiplier(value: float) -> relax.Expr:
    return relax.const(np.array([value], np.float32))


def _levels_constant(given: Levels, output: Levels, low: float, high: float) -> relax.Expr:
    return relax.const(np.array([given.zero_point, *output.bounds(low, high)], np.int32))


def _scalars(levels: Levels) -> tuple[relax.Expr, relax.Expr]:
    return relax.const(np.float32(levels.scale), "float32"), relax.const(levels.zero_point, "int32")


_ADD = Op.get("relax.add")
_CONCAT = Op.get("relax.concat")
_MULTIPLY = Op.get("relax.multiply")
_MEAN = Op.get("relax.mean")
_AVG_POOL2D = Op.get("relax.nn.avg_pool2d")
