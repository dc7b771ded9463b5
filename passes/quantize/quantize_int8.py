"""Turns convolutions, matrix products and what stands between them into integer operators.

Rewrites every site that `survey` finds: weights become int8 constants, activations uint8 levels;
float is left at the borders and around operators that have no integer form. Runs on NHWC with
folded batch norm, after `hone.calibrate`; `hone.passes.quantize.legalize` lowers the result.
Numerics: each quantized tensor is off by at most half a step of its scale, as derived in
`integer_layer`; the integer arithmetic is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax

from hone.errors import ModelError
from hone.passes.graph.dataflow import Dataflow

from .bias_correction import InputMeans, correct_bias
from .integer_layer import IntegerLayer, quantize_layer
from .integer_writer import IntegerWriter
from .keep_float import check_layers
from .observer import Range
from .qparams import UINT8, QParams, choose_qparams, with_scale
from .site import WEIGHTED, Int8Scheme, Kind, Site, Skipped, Survey
from .survey import survey
from .weight_schemes import power_of_two_scales


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
    tensor : str or None
        Name of the variable that carries the result in the float module; None where the model came
        in integers.
    result : str or None
        Name of the variable that carries it in the integer module; None as well.
    qparams : QParams or None
        What the levels of the result mean; None where it is float.
    """

    layer: str
    kind: Kind
    layers: tuple[str, ...]
    output: str
    tensor: str | None = None
    result: str | None = None
    qparams: QParams | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedRead:
    """A tensor that an integer operator will read as levels.

    Parameters
    ----------
    reader : str
        Name of the binding that reads it in the float module.
    tensor : str
        Name of the tensor.
    qparams : QParams
        What its levels mean.
    """

    reader: str
    tensor: str
    qparams: QParams


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

    @property
    def merged(self) -> dict[str, str]:
        """Binding name of each layer that is computed → that of the operator which does."""
        return {layer: each.layer for each in self.quantized for layer in each.layers}


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
    check_layers(module["main"], keep_float)
    names = [str(var.name) for var in survey(module["main"], keep_float=keep_float).wanted]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ModelError(f"tensor names must be unique, but these are not: {', '.join(double)}")
    return tuple(names)


def weighted_inputs(
    module: tvm.IRModule,
    ranges: Mapping[str, Range],
    *,
    keep_float: Collection[str] = (),
    scheme: Int8Scheme | None = None,
) -> dict[str, QParams]:
    """Return how the inputs of convolutions and matrix products will be quantized, by name.

    Parameters
    ----------
    module, ranges, keep_float, scheme
        As for `quantize_int8`.
    """
    sites = weighted_sites(module, ranges, keep_float=keep_float, scheme=scheme)
    return {str(site.inputs[0].name): data for site, data in sites}


def weighted_sites(
    module: tvm.IRModule,
    ranges: Mapping[str, Range],
    *,
    keep_float: Collection[str] = (),
    scheme: Int8Scheme | None = None,
) -> tuple[tuple[Site, QParams], ...]:
    """Return every convolution and matrix product with the levels of its input.

    Parameters
    ----------
    module, ranges, keep_float, scheme
        As for `quantize_int8`.
    """
    found = survey(module["main"], keep_float=keep_float, scheme=scheme)
    levels = _choose_levels(module["main"], found, ranges, scheme)
    return tuple((site, levels[site.inputs[0]]) for site in found.sites if site.kind in WEIGHTED)


def quantized_reads(
    module: tvm.IRModule,
    ranges: Mapping[str, Range],
    *,
    keep_float: Collection[str] = (),
    scheme: Int8Scheme | None = None,
) -> tuple[QuantizedRead, ...]:
    """Return which float operator will read which tensor as levels.

    Parameters
    ----------
    module, ranges, keep_float, scheme
        As for `quantize_int8`.
    """
    graph = Dataflow(module["main"])
    found = survey(module["main"], keep_float=keep_float, scheme=scheme)
    levels = _choose_levels(module["main"], found, ranges, scheme)
    return tuple(
        QuantizedRead(reader=str(var.name), tensor=str(x.name), qparams=levels[x])
        for site in found.sites
        for x in site.inputs
        for var in site.chain
        if any(x.same_as(argument) for argument in graph.definition[var].args)
    )


def quantize_int8(
    module: tvm.IRModule,
    ranges: Mapping[str, Range],
    *,
    keep_float: Collection[str] = (),
    means: Mapping[str, InputMeans] | None = None,
    rounded: Mapping[str, np.ndarray] | None = None,
    scheme: Int8Scheme | None = None,
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
    means : mapping of str to InputMeans, optional
        For every name of `weighted_inputs`: corrects biases, see `bias_correction`.
    rounded : mapping of str to ndarray, optional
        Layer of a `Site` → int8 levels of its weights, see `adaptive_rounding`; the other layers'
        weights are rounded to nearest.
    scheme : Int8Scheme, optional
        How levels are chosen; symmetric weights and any scales when absent.

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
        found = survey(function, keep_float={*keep_float, *refused}, scheme=scheme)
        qparams = _choose_levels(function, found, ranges, scheme)
        layers: dict[relax.Var, tuple[IntegerLayer, ...]] = {}
        reasons: dict[str, str] = {}
        for site in found.sites:
            inputs = tuple(qparams[x] for x in site.inputs)
            if rounded is not None and site.kind in WEIGHTED:
                site = replace(site, rounded=rounded.get(site.layer))
            if means is not None and site.kind in WEIGHTED:
                site = correct_bias(site, inputs[0], means[str(site.inputs[0].name)])
            layer = quantize_layer(site, inputs, qparams[site.output] if site.levels else None)
            if isinstance(layer, str):
                reasons[site.layer] = layer
            else:
                layers[site.output] = layer
        if not reasons:
            break
        # What a refused layer leaves behind may fit differently: look again without it.
        refused |= reasons
    writer = IntegerWriter(function, found, layers, qparams)
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
                tensor=str(site.output.name),
                result=writer.results[site.output],
                qparams=qparams[site.output] if site.levels else None,
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


def _choose_levels(
    function: relax.Function,
    found: Survey,
    ranges: Mapping[str, Range],
    scheme: Int8Scheme | None,
) -> dict[relax.Var, QParams]:
    """Return the levels of every tensor that is read as integers.

    What passes levels on has those of its input. A tensor that an activation bounds has the
    observed range: it already is inside the bounds. What only a concatenation reads has the levels
    of its result, which need no other ones.
    """
    graph = Dataflow(function)
    passed = {
        binding.var: binding.value.args[0]
        for binding in graph.bindings
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
        if scheme is not None and scheme.power_of_two:
            _, above = power_of_two_scales(levels[var].scale)
            levels[var] = with_scale(levels[var], above, seen.minimum)
    made = {site.output for site in found.sites if site.levels}
    for site in reversed(found.sites):
        if site.kind is Kind.CONCAT:
            alone = [x for x in site.inputs if x in made and graph.used_once(x)]
            levels.update((x, levels[site.output]) for x in alone)
    return levels
