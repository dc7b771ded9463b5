"""The precisions that layers of one network can be given side by side.

A precision is one class here and one line in `QUANTIZERS`. In that order they write their layers
into the module: integers first, which look at the float network around a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import numpy as np
import tvm
from tvm import relax

from hone.model import Model
from hone.passes.quantize import operators
from hone.passes.quantize.integer_layer import quantize_weights
from hone.passes.quantize.qparams import UINT8, QParams, dequantize
from hone.passes.quantize.quantize_int8 import Quantization, weighted_sites
from hone.passes.quantize.site import Kind
from hone.passes.quantize.switch_layers import Emulation

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
    skip : frozenset of str
        Those that stay in float by request.
    calibrated : Calibrated or None
        Of the very same network; only where 8-bit integers are among the precisions.
    """

    model: Model
    layers: tuple[str, ...]
    skip: frozenset[str] = frozenset()
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
        fitting = {each.layer for each in self._calibrated.quantize().quantized}
        skipped = {each.layer: each.reason for each in self._calibrated.quantize().skipped}
        self.refused: Mapping[str, str] = {
            layer: skipped.get(layer, "no integer operator computes it")
            for layer in ground.layers
            if layer not in fitting
        }

    def emulations(self) -> dict[str, Emulation]:
        """Return weights and inputs that go to their levels and back."""
        calibrated = self._calibrated
        found: dict[str, Emulation] = {}
        sites = weighted_sites(
            calibrated.model.module, calibrated.ranges, keep_float=calibrated.keep_float
        )
        for site, data in sites:
            if site.layer in self.refused:
                continue
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


QUANTIZERS: Final[Mapping[str, Callable[[Ground], Quantizer]]] = {"int8": Int8Quantizer}
"""By name, as a recipe writes it; `hone.steps.options.mixed.Precision` lists the same names."""
