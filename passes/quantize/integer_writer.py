"""Writes a function in integers, once everything about it is decided.

Every site becomes one operator under its layer's name. Numerics: see `integer_layer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import PART, Dataflow, Rebuilder, shape_of

from . import operators
from .convolution_form import form_of
from .integer_layer import IntegerLayer
from .qparams import UINT8, QParams
from .site import Kind, Site, Survey
from .weight_offsets import Emit
from .weighted_writer import WeightedWriter


class IntegerWriter:
    """Writes the integer function, with one conversion for each tensor that needs one.

    Parameters
    ----------
    function : relax.Function
        The float function; stays as it is.
    found : Survey
        Of that function.
    layers : mapping of Var to tuple of IntegerLayer
        Constants of each site's operators, by its result.
    qparams : mapping of Var to QParams
        Of each tensor that is read as integers.

    Attributes
    ----------
    conversions : list of str
        Names of the conversions written so far.
    results : dict of Var to str
        Result of each site → name of the variable that carries it in the integer function.
    """

    def __init__(
        self,
        function: relax.Function,
        found: Survey,
        layers: Mapping[relax.Var, tuple[IntegerLayer, ...]],
        qparams: Mapping[relax.Var, QParams],
    ) -> None:
        self._function = function
        self._graph = Dataflow(function)
        self._found = found
        self._sites = {site.output: site for site in found.sites}
        self._layers = layers
        self._qparams = qparams
        self._rebuilder = Rebuilder(function)
        self._weighted = WeightedWriter(self._rebuilder.emit)
        self._levels: dict[relax.Var, relax.Var] = {}
        self._float = self._read_as_float()
        self.conversions: list[str] = []
        self.results: dict[relax.Var, str] = {}

    def _read_as_float(self) -> set[relax.Var]:
        """Return the variables that something reads as real numbers."""
        inside = {var for site in self._found.sites for var in site.chain} | self._found.passing
        return {
            var
            for var, users in self._graph.users.items()
            if any(user is None or user not in inside for user in users)
        }

    def write(self) -> relax.Function:
        """Return the integer function."""
        absorbed = {var for site in self._found.sites for var in site.chain[:-1]}
        for binding in self._graph.bindings:
            var = binding.var
            if var in self._sites:
                self._write_site(self._sites[var])
            elif var in self._found.passing:
                self._set_levels(var, self._pass_on(var, binding.value), str(var.name))
            elif var not in absorbed:
                self._rebuilder.copy(binding)
        return self._rebuilder.finish()

    def _write_site(self, site: Site) -> None:
        inputs = [self._read_levels(x) for x in site.inputs]
        call = self._operator(site, self._layers[site.output], inputs)
        if site.levels:
            self._set_levels(site.output, call, site.layer)
            result = self._levels[site.output]
        else:
            result = self._rebuilder.bind(site.output, call)
        self.results[site.output] = str(result.name)

    def _set_levels(self, var: relax.Var, value: relax.Expr, name: str) -> None:
        """Bind levels, and their real values where something reads those."""
        clashes = var in self._float and name == str(var.name)
        levels = self._rebuilder.emit(value, f"{name}{PART}levels" if clashes else name)
        self._levels[var] = levels
        if var in self._float:
            real = operators.dequantize(levels, *_scalars(self._qparams[var]))
            self._rebuilder.bind(var, real)
            self.conversions.append(str(var.name))

    def _read_levels(self, var: relax.Var) -> relax.Var:
        if var not in self._levels:
            real = self._rebuilder.use(var)
            name = f"{var.name}{PART}quantize"
            call = operators.quantize(real, *_scalars(self._qparams[var]), out_dtype=UINT8.dtype)
            self._levels[var] = self._rebuilder.emit(call, name)
            self.conversions.append(name)
        return self._levels[var]

    def _pass_on(self, var: relax.Var, call: relax.Call) -> relax.Expr:
        source = call.args[0]
        levels = self._levels[source]
        if call.op == _RELU:
            zero = relax.const(int(self._qparams[source].zero_point), UINT8.dtype)
            return relax.op.maximum(levels, zero)
        return relax.Call(call.op, [levels, *call.args[1:]], call.attrs, call.ty_args)

    def _operator(
        self, site: Site, layers: tuple[IntegerLayer, ...], inputs: list[relax.Var]
    ) -> relax.Expr:
        attrs = site.call.attrs
        dtype = UINT8.dtype if site.levels else "float32"
        constants = [relax.const(layers[0].multiplier), relax.const(layers[0].levels)]
        if site.kind is Kind.ADD:
            return operators.add_int8(*inputs, *constants, out_dtype=dtype)
        if site.kind is Kind.MULTIPLY:
            return operators.multiply_int8(*inputs, *constants, out_dtype=dtype)
        if site.kind is Kind.TABLE:
            return operators.table_int8(inputs[0], relax.const(layers[0].levels))
        if site.kind is Kind.CONCAT:
            return self._concatenated(site, layers, inputs)
        if site.kind is Kind.MEAN:
            return operators.mean_int8(
                *inputs, *constants, axis=attrs.axis, keepdims=attrs.keepdims, out_dtype=dtype
            )
        if site.kind is Kind.AVG_POOL2D:
            return operators.avg_pool2d_int8(
                *inputs,
                *constants,
                pool_size=attrs.pool_size,
                strides=attrs.strides,
                padding=attrs.padding,
                dilation=attrs.dilation,
                out_dtype=dtype,
            )
        data, residual = inputs[0], inputs[1] if site.residual else None
        if site.kind is Kind.DENSE:
            return self._weighted.dense(
                layers[0], data, residual, layer=site.layer, out_dtype=dtype
            )
        form = form_of(site.call)
        if isinstance(form, str):
            raise ValueError(form)
        return self._weighted.convolution(
            form, layers, data, residual, layer=site.layer, out_dtype=dtype
        )

    def _concatenated(
        self, site: Site, layers: tuple[IntegerLayer, ...], inputs: list[relax.Var]
    ) -> relax.Expr:
        output, clips = self._qparams[site.output], (site.low, site.high) != (-math.inf, math.inf)
        parts = []
        for source, var, layer in zip(site.inputs, inputs, layers, strict=True):
            if clips or not same_levels(self._qparams[source], output):
                name = f"{site.layer}{PART}rescale"
                var = rescale(self._rebuilder.emit, var, layer, name)
            parts.append(var)
        return relax.op.concat(parts, site.call.attrs.axis)


def rescale(emit: Emit, levels: relax.Var, constants: IntegerLayer, name: str) -> relax.Var:
    """Write levels of another scale: the mean over an axis of extent 1, requantized.

    Parameters
    ----------
    emit : callable
        Binds an expression to a variable of a name.
    levels : relax.Var
        Of any shape.
    constants : IntegerLayer
        Of `rescaling`.
    name : str
        Of the bindings.
    """
    data = emit(relax.op.reshape(levels, (1, *shape_of(levels))), name)
    arguments = [relax.const(constants.multiplier), relax.const(constants.levels)]
    return emit(operators.mean_int8(data, *arguments, axis=[0]), name)


def same_levels(left: QParams, right: QParams) -> bool:
    """Tell whether levels of two tensors mean the same, each per tensor."""
    return bool(left.scale == right.scale and left.zero_point == right.zero_point)


def _scalars(qparams: QParams) -> tuple[relax.Expr, relax.Expr]:
    return relax.const(qparams.scale), relax.const(qparams.zero_point)


_RELU = Op.get("relax.nn.relu")
