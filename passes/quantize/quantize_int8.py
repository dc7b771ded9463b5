"""Turns convolutions, matrix products and what stands between them into integer operators.

Rewrites every site that `survey` finds: weights become int8 constants, activations uint8 levels;
float is left at the borders and around operators that have no integer form. Runs on NHWC with
folded batch norm, after `hone.calibrate`; `hone.passes.quantize.legalize` lowers the result.
Numerics: each quantized tensor is off by at most half a step of its scale, as derived in
`integer_layer`; the integer arithmetic is exact.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir import Op

from hone.errors import ModelError, UsageError
from hone.passes.graph.dataflow import PART, Dataflow, Rebuilder, layer_of

from . import operators
from .integer_layer import IntegerLayer, quantize_layer
from .observer import Range
from .qparams import UINT8, QParams, choose_qparams
from .survey import Kind, Site, Skipped, Survey, survey


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """What became one integer operator.

    Parameters
    ----------
    layer : str
        Binding name of the layer that the operator is named after.
    kind : Kind
        What it computes.
    layers : tuple of str
        Binding names of all layers that it computes: with it a residual addition, an activation.
    output : str
        ``uint8``, or ``float32`` where only float operators read it.
    """

    layer: str
    kind: Kind
    layers: tuple[str, ...]
    output: str


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A module in integers, and what was and was not quantized.

    Parameters
    ----------
    module : IRModule
        The result.
    quantized : tuple of QuantizedLayer
        In graph order.
    skipped : tuple of Skipped
        Convolutions and matrix products that stay in float.
    conversions : tuple of str
        Names of the conversions between float and levels, which cost time of their own.
    """

    module: tvm.IRModule
    quantized: tuple[QuantizedLayer, ...]
    skipped: tuple[Skipped, ...]
    conversions: tuple[str, ...]


def observed_tensors(module: tvm.IRModule, *, keep_float: Collection[str] = ()) -> tuple[str, ...]:
    """Return the names of the tensors whose ranges `quantize_int8` needs, in graph order.

    Parameters
    ----------
    module : IRModule
        ``main`` in NHWC with folded batch norm.
    keep_float : collection of str
        As for `quantize_int8`.

    Raises
    ------
    ModelError
        Two of the tensors have one name.
    UsageError
        A name of ``keep_float`` is no layer.
    """
    _check_layers(module["main"], keep_float)
    names = [str(var.name) for var in survey(module["main"], keep_float=keep_float).wanted]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ModelError(f"tensor names must be unique, but these are not: {', '.join(double)}")
    return tuple(names)


def quantize_int8(
    module: tvm.IRModule, ranges: Mapping[str, Range], *, keep_float: Collection[str] = ()
) -> Quantization:
    """Quantize a module and report what was done.

    Parameters
    ----------
    module : IRModule
        ``main`` in NHWC with folded batch norm; stays as it is.
    ranges : mapping of str to Range
        Tensor name → range, for every name of `observed_tensors`.
    keep_float : collection of str
        Binding names of layers that must stay in float.

    Raises
    ------
    ModelError
        Ranges are missing (all of them are listed), or one is not finite.
    UsageError
        A name of ``keep_float`` is no layer.
    """
    missing = [n for n in observed_tensors(module, keep_float=keep_float) if n not in ranges]
    if missing:
        raise ModelError(
            "calibration gave no range for some tensors",
            problems=missing,
            hint="calibrate the very module that is quantized",
        )
    function = module["main"]
    refused: dict[str, str] = {}
    while True:
        found = survey(function, keep_float={*keep_float, *refused})
        qparams = _choose_levels(function, found, ranges)
        layers: dict[relax.Var, IntegerLayer] = {}
        reasons: dict[str, str] = {}
        for site in found.sites:
            inputs = tuple(qparams[x] for x in site.inputs)
            layer = quantize_layer(site, inputs, qparams[site.output] if site.levels else None)
            if isinstance(layer, str):
                reasons[site.layer] = layer
            else:
                layers[site.output] = layer
        if not reasons:
            break
        # What a refused layer leaves behind may fit differently: look again without it.
        refused |= reasons
    writer = _Writer(function, found, layers, qparams)
    rewritten = module.clone()
    rewritten.update_func(module.get_global_var("main"), writer.write())
    return Quantization(
        module=rewritten,
        quantized=tuple(
            QuantizedLayer(
                layer=site.layer,
                kind=site.kind,
                layers=site.layers,
                output=UINT8.dtype if site.levels else "float32",
            )
            for site in found.sites
        ),
        skipped=tuple(
            Skipped(layer=s.layer, reason=refused.get(s.layer, s.reason)) for s in found.skipped
        ),
        conversions=tuple(writer.conversions),
    )


@tvm.transform.module_pass(opt_level=0)
class QuantizeInt8:
    """`quantize_int8` as a pass.

    Parameters
    ----------
    ranges : mapping of str to Range
        Tensor name → range.
    keep_float : collection of str
        Binding names of layers that must stay in float.
    """

    def __init__(self, *, ranges: Mapping[str, Range], keep_float: Collection[str] = ()) -> None:
        self._ranges = ranges
        self._keep_float = keep_float

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module in integers."""
        return quantize_int8(module, self._ranges, keep_float=self._keep_float).module


def _check_layers(function: relax.Function, names: Collection[str]) -> None:
    known = {layer_of(binding.var) for binding in Dataflow(function).bindings}
    problems = []
    for name in sorted(set(names) - known):
        near = difflib.get_close_matches(name, known, n=1)
        problems.append(f"{name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    if problems:
        raise UsageError("no such layer to keep in float: " + "; ".join(problems))


def _choose_levels(
    function: relax.Function, found: Survey, ranges: Mapping[str, Range]
) -> dict[relax.Var, QParams]:
    """Return the levels of every tensor that is read as integers.

    What passes levels on has those of its input. A tensor that an activation bounds has the
    observed range: it already is inside the bounds.
    """
    passed = {
        binding.var: binding.value.args[0]
        for binding in Dataflow(function).bindings
        if binding.var in found.passing
    }
    levels: dict[relax.Var, QParams] = {}
    for var in found.wanted:
        if var in passed:
            levels[var] = levels[passed[var]]
            continue
        seen = ranges[str(var.name)]
        levels[var] = choose_qparams(
            seen.minimum, seen.maximum, type=UINT8, symmetric=False, layer=str(var.name)
        )
    return levels


class _Writer:
    """Writes the integer function, with one conversion for each tensor that needs one."""

    def __init__(
        self,
        function: relax.Function,
        found: Survey,
        layers: Mapping[relax.Var, IntegerLayer],
        qparams: Mapping[relax.Var, QParams],
    ) -> None:
        self._function = function
        self._graph = Dataflow(function)
        self._found = found
        self._sites = {site.output: site for site in found.sites}
        self._layers = layers
        self._qparams = qparams
        self._rebuilder = Rebuilder(function)
        self._levels: dict[relax.Var, relax.Var] = {}
        self._float = self._read_as_float()
        self.conversions: list[str] = []

    def _read_as_float(self) -> set[relax.Var]:
        """Return the variables that something reads as real numbers."""
        inside = {var for site in self._found.sites for var in site.chain} | self._found.passing
        return {
            var
            for var, users in self._graph.users.items()
            if any(user is None or user not in inside for user in users)
        }

    def write(self) -> relax.Function:
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
        call = _operator(site, self._layers[site.output], inputs)
        if site.levels:
            self._set_levels(site.output, call, site.layer)
        else:
            self._rebuilder.bind(site.output, call)

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


def _scalars(qparams: QParams) -> tuple[relax.Expr, relax.Expr]:
    return relax.const(qparams.scale), relax.const(qparams.zero_point)


def _operator(site: Site, layer: IntegerLayer, inputs: list[relax.Var]) -> relax.Call:
    attrs = site.call.attrs
    dtype = UINT8.dtype if site.levels else "float32"
    constants = [relax.const(layer.multiplier), relax.const(layer.levels)]
    if site.kind is Kind.ADD:
        return operators.add_int8(*inputs, *constants, out_dtype=dtype)
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
    arguments = [inputs[0], relax.const(layer.weight), relax.const(layer.bias), *constants]
    if site.residual:
        arguments += [inputs[1], relax.const(layer.residual_multiplier)]
    if site.kind is Kind.DENSE:
        return operators.dense_int8(*arguments, out_dtype=dtype)
    return operators.conv2d_int8(
        *arguments,
        strides=attrs.strides,
        padding=attrs.padding,
        dilation=attrs.dilation,
        groups=attrs.groups,
        out_dtype=dtype,
    )


_RELU = Op.get("relax.nn.relu")
