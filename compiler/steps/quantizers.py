"""The precisions that layers of one network can be given side by side.

A precision is one class here and one line in `QUANTIZERS`. In that order they write their layers
into the module: integers first, which look at the float network around a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol

import numpy as np
import tvm
from tvm import relax

from hone.mixed.oracle import FLOAT
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.dataflow import Dataflow, layer_of
from hone.passes.graph.to_half import ToHalf, constant
from hone.passes.quantize import operators
from hone.passes.quantize.decode_operator import Decoded, decode_call
from hone.passes.quantize.integer_layer import quantize_weights
from hone.passes.quantize.qparams import UINT8, QParams, dequantize
from hone.passes.quantize.quantize_int8 import Quantization, weighted_sites
from hone.passes.quantize.quantize_weights import quantize_weight_only
from hone.passes.quantize.site import Kind
from hone.passes.quantize.switch_layers import WEIGHTED, Emulation
from hone.passes.quantize.weight_schemes import Granularity, WeightOptions

from .half import DTYPES
from .int8 import Calibrated


@dataclass(frozen=True, kw_only=True)
class Ground:
    """The float network that precisions are given to.

    Parameters
    ----------
    model : Model
        In NHWC, batch norm folded.
    layers : tuple of str
        Binding names of its convolutions and matrix products, in graph order.
    refused : mapping of str to str
        Those that stay in float whatever the precision, with the reason.
    calibrated : Calibrated or None
        Of the very same network; only where 8-bit integers are among the precisions.
    """

    model: Model
    layers: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    calibrated: Calibrated | None = None


@dataclass(frozen=True, kw_only=True)
class Written:
    """A module with some layers in another precision.

    Parameters
    ----------
    module : IRModule
        The result.
    merged : mapping of str to str
        Binding name of a layer that is gone → of the layer that computes it now.
    """

    module: tvm.IRModule
    merged: Mapping[str, str] = field(default_factory=dict)


class Quantizer(Protocol):
    """One precision, for one network."""

    @property
    def activations(self) -> str:
        """Type of the tensors between its layers: between equal types nothing is converted."""

    @property
    def package(self) -> str:
        """Precision of a package whose lowest precision this is."""

    @property
    def refused(self) -> Mapping[str, str]:
        """Layer → why it cannot have this precision."""

    def emulations(self) -> Mapping[str, Emulation]:
        """Return how each layer that can have it is emulated in float."""

    def write(self, module: tvm.IRModule, layers: Collection[str]) -> Written:
        """Return the module with these layers in this precision."""


class Int8Quantizer:
    """Weights and activations in 8-bit integers.

    Parameters
    ----------
    ground : Ground
        Calibrated.
    """

    activations = "levels"
    package = "int8"

    def __init__(self, ground: Ground) -> None:
        if ground.calibrated is None:
            raise ValueError("8-bit integers need calibration")
        self._layers = ground.layers
        self._calibrated = ground.calibrated
        whole = self._calibrated.quantize()
        fitting = {each.layer for each in whole.quantized}
        skipped = {each.layer: each.reason for each in whole.skipped}
        self.refused: Mapping[str, str] = {
            layer: skipped.get(layer, "no integer operator computes it")
            for layer in ground.layers
            if layer not in fitting
        } | dict(ground.refused)

    def emulations(self) -> dict[str, Emulation]:
        """Return weights and inputs that go to their levels and back."""
        calibrated = self._calibrated
        found: dict[str, Emulation] = {}
        sites = weighted_sites(
            calibrated.model.module,
            calibrated.ranges,
            keep_float=calibrated.keep_float,
            scheme=calibrated.scheme,
        )
        for site, data in sites:
            if site.layer in self.refused:
                continue
            if calibrated.rounded is not None:
                site = replace(site, rounded=calibrated.rounded.get(site.layer))
            weight = dequantize(*quantize_weights(site, data)).astype(np.float32)
            found[site.layer] = Emulation(
                weight=weight if site.kind is Kind.CONV2D else np.ascontiguousarray(weight.T),
                data=_levels_and_back(data),
            )
        return found

    def quantization(self, module: tvm.IRModule, layers: Collection[str]) -> Quantization:
        """Return what `write` returns, with everything that is known of it.

        Parameters
        ----------
        module : IRModule
            In float.
        layers : collection of str
            Binding names of the layers that become integers.
        """
        calibrated = self._calibrated
        given = replace(calibrated, model=calibrated.model.with_module(module))
        return given.quantize(keep_float=set(self._layers).difference(layers))

    def write(self, module: tvm.IRModule, layers: Collection[str]) -> Written:
        """Return the module with these layers, and what stands between them, in integers."""
        result = self.quantization(module, layers)
        return Written(module=result.module, merged=result.merged)


def _levels_and_back(data: QParams) -> tuple[Callable[[relax.Expr], relax.Expr], ...]:
    scale, zero_point = relax.const(data.scale), relax.const(data.zero_point)
    return (
        lambda x: operators.quantize(x, scale, zero_point, out_dtype=UINT8.dtype),
        lambda x: operators.dequantize(x, scale, zero_point),
    )


class HalfQuantizer:
    """Products of 16-bit floats, summed in float32.

    Parameters
    ----------
    ground : Ground
        Any.
    name : {"bf16", "fp16"}
        As a recipe writes the type.
    """

    def __init__(self, ground: Ground, name: str) -> None:
        self._module = ground.model.module
        self._layers = ground.layers
        self._dtype = DTYPES[name]
        self.activations = self._dtype
        self.package = name
        skipped = dict(ToHalf(dtype=self._dtype).plan(self._module).skipped)
        computed = dict.fromkeys(set(ground.layers).difference(self._weights()), _NOT_CONSTANT)
        self.refused: Mapping[str, str] = {**computed, **skipped, **ground.refused}

    def _weights(self) -> dict[str, np.ndarray]:
        """Return the constant weights of layers."""
        graph = Dataflow(self._module["main"])
        found: dict[str, np.ndarray] = {}
        for binding in graph.bindings:
            call = graph.call(binding.var)
            if call is not None and call.op in WEIGHTED:
                weight = graph.constant(call.args[1])
                if weight is not None:
                    found[layer_of(binding.var)] = weight
        return found

    def emulations(self) -> dict[str, Emulation]:
        """Return weights and inputs that are rounded to 16 bits."""
        return {
            layer: Emulation(
                weight=np.asarray(constant(weight, self._dtype).value.numpy(), np.float32),
                data=(
                    lambda x: relax.op.astype(x, self._dtype),
                    lambda x: relax.op.astype(x, "float32"),
                ),
            )
            for layer, weight in self._weights().items()
            if layer in self._layers and layer not in self.refused
        }

    def write(self, module: tvm.IRModule, layers: Collection[str]) -> Written:
        """Return the module with these layers computed from 16-bit floats."""
        present = {layer_of(binding.var) for binding in Dataflow(module["main"]).bindings}
        kept = sorted(present.difference(layers))
        return Written(module=apply(module, ToHalf(dtype=self._dtype, keep_float=kept)))


class WeightQuantizer:
    """Weights in a few bits, which kernels decode; activations in float.

    Parameters
    ----------
    ground : Ground
        Any.
    options : WeightOptions
        How weights are quantized.
    """

    activations = FLOAT
    package = FLOAT

    def __init__(self, ground: Ground, options: WeightOptions) -> None:
        self._layers = ground.layers
        self._options = options
        self._result = quantize_weight_only(ground.model.module, options)
        fitting = {each.layer for each in self._result.quantized}
        skipped = {each.layer: each.reason for each in self._result.skipped}
        self.refused: Mapping[str, str] = {
            layer: skipped.get(layer, _NOT_CONSTANT)
            for layer in ground.layers
            if layer not in fitting
        } | dict(ground.refused)

    def emulations(self) -> dict[str, Emulation]:
        """Return weights that go to their levels and back."""
        graph = Dataflow(self._result.module["main"])
        found: dict[str, Emulation] = {}
        for binding in graph.bindings:
            call = decode_call(binding.value)
            layer = layer_of(binding.var)
            if call is not None and layer in self._layers and layer not in self.refused:
                found[layer] = Emulation(weight=Decoded.of(call).real().astype(np.float32))
        return found

    def write(self, module: tvm.IRModule, layers: Collection[str]) -> Written:
        """Return the module with the weights of these layers in a few bits."""
        present = {layer_of(binding.var) for binding in Dataflow(module["main"]).bindings}
        kept = present.difference(layers)
        return Written(module=quantize_weight_only(module, self._options, keep_float=kept).module)


_NOT_CONSTANT = "it has no weights that are constant"

QUANTIZERS: Final[Mapping[str, Callable[[Ground], Quantizer]]] = {
    "int8": Int8Quantizer,
    "bf16": partial(HalfQuantizer, name="bf16"),
    "fp16": partial(HalfQuantizer, name="fp16"),
    "int8-weights": partial(WeightQuantizer, options=WeightOptions(bits=8)),
    "int4-weights": partial(
        WeightQuantizer, options=WeightOptions(bits=4, granularity=Granularity.GROUP)
    ),
}
"""By name, as a recipe writes it; `hone.steps.options.mixed.Precision` lists the same names."""
