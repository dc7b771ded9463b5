"""Stores the weights of layers in a few bits, and leaves everything else in float32.

Rewrites each ``relax.nn.conv2d`` (NHWC, not grouped), ``relax.matmul`` and ``relax.take`` with a
constant float32 weight: ``hone.decode_weights`` of packed levels takes the constant's place; with
the scheme ``xnor`` the layer reads signs, see `binary_layers`.
Needs no calibration. Runs after batch norm is folded and the layout is NHWC;
`hone.passes.lower.weight_only` makes one kernel of a layer and its weight. Numerics: the layer
computes with the weights that its levels stand for, see `weight_schemes`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import Dataflow, Rebuilder, layer_of, shape_of, with_args

from .binary_layers import binary_conv2d, binary_matmul
from .decode_operator import TABLE_MODES, Decoded, decode_call
from .keep_float import check_layers
from .site import Skipped
from .weight_schemes import Scheme, WeightOptions, quantize_weights

_CONV2D, _MATMUL, _TAKE = (Op.get(f"relax.{name}") for name in ("nn.conv2d", "matmul", "take"))


PACKED = "packed already"
"""Ends the reason of a layer whose weights the model has in a few bits."""


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight that is stored in a few bits.

    Parameters
    ----------
    layer : str
        Binding name of the layer that reads it.
    sqnr_db : float or None
        ``10 log10(sum w² / sum (w - quantized w)²)`` over the weight; None where it is exact.
    float_bytes, stored_bytes : int
        Before, and of the packed levels, scales and zero points.
    """

    layer: str
    sqnr_db: float | None
    float_bytes: int
    stored_bytes: int


@dataclass(frozen=True, kw_only=True)
class WeightQuantization:
    """A module with weights of few bits, and what was and was not quantized.

    Parameters
    ----------
    module : IRModule
        The result.
    quantized : tuple of QuantizedWeight
        In graph order.
    skipped : tuple of Skipped
        Layers with weights that stay in float, with the reason.
    """

    module: tvm.IRModule
    quantized: tuple[QuantizedWeight, ...]
    skipped: tuple[Skipped, ...]


def quantize_weight_only(
    module: tvm.IRModule,
    options: WeightOptions,
    *,
    keep_float: Collection[str] = (),
    rounded: Mapping[str, np.ndarray] | None = None,
) -> WeightQuantization:
    """Quantize the weights of a module and report what was done.

    Parameters
    ----------
    module : IRModule
        ``main`` in NHWC with folded batch norm; stays as it is.
    options : WeightOptions
        How, for all layers.
    keep_float : collection of str
        Binding names of layers whose weights must stay.
    rounded : mapping of str to ndarray, optional
        Layer → levels ``[K, D]`` of its weights, see `adaptive_rounding`; the scales are those of
        `options` all the same, and other layers are rounded to nearest.

    Raises
    ------
    ModelError
        Weights hold NaN or infinity.
    UsageError
        A name of ``keep_float`` is no layer.
    """
    function = module["main"]
    check_layers(function, keep_float)
    graph = Dataflow(function)
    builder = Rebuilder(function)
    quantized: list[QuantizedWeight] = []
    skipped: list[Skipped] = []
    for binding in graph.bindings:
        call = graph.call(binding.var)
        layer = layer_of(binding.var)
        position = None if call is None else _weight_position(call)
        if call is None or position is None:
            builder.copy(binding)
            continue
        weight = graph.constant(call.args[position])
        reason = _obstacle(call, weight, options)
        if layer in keep_float:
            reason = "kept in float"
        if reason is not None or weight is None:
            decoded_before = decode_call(graph.definition.get(call.args[position]))
            if decoded_before is not None:
                bits = Decoded.of(decoded_before).levels.bits
                skipped.append(Skipped(layer, f"its weights of {bits} bits are {PACKED}"))
            elif weight is not None:
                # What no weight stands in is no layer to report: a product of two activations.
                skipped.append(Skipped(layer, reason or ""))
            builder.copy(binding)
            continue
        axis = 1 if call.op.same_as(_MATMUL) else 0
        chosen = None if rounded is None else rounded.get(layer)
        decoded, entry = _quantize(weight, axis, options, layer, chosen)
        arguments = [builder.use(argument) for argument in call.args]
        arguments[position] = builder.emit(decoded.call(), f"{layer}@weight")
        if options.scheme is Scheme.XNOR:
            value = _binary_layer(builder, call, arguments, layer)
        else:
            value = with_args(call, arguments)
        builder.bind(binding.var, value)
        quantized.append(entry)
    rewritten = module
    if quantized:
        rewritten = module.clone()
        rewritten.update_func(module.get_global_var("main"), builder.finish())
    return WeightQuantization(module=rewritten, quantized=tuple(quantized), skipped=tuple(skipped))


@tvm.transform.module_pass(opt_level=0)
class QuantizeWeights:
    """`quantize_weight_only` as a pass.

    Parameters
    ----------
    options : WeightOptions
        How, for all layers.
    keep_float : collection of str
        Binding names of layers whose weights must stay.
    """

    def __init__(self, options: WeightOptions, *, keep_float: Collection[str] = ()) -> None:
        self._options = options
        self._keep_float = keep_float

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with weights of few bits."""
        return quantize_weight_only(module, self._options, keep_float=self._keep_float).module


def _weight_position(call: relax.Call) -> int | None:
    """Return which argument of a layer is its weight; None for what is no layer."""
    if call.op.same_as(_CONV2D) or call.op.same_as(_MATMUL):
        return 1
    return 0 if call.op.same_as(_TAKE) else None


def _binary_layer(
    builder: Rebuilder, call: relax.Call, arguments: list[relax.Expr], layer: str
) -> relax.Call:
    def emit(value: relax.Expr, part: str) -> relax.Expr:
        return builder.emit(value, f"{layer}@{part}")

    data, weight = arguments
    if call.op.same_as(_MATMUL):
        return binary_matmul(data, weight, emit)
    return binary_conv2d(call, data, weight, emit)


def _obstacle(call: relax.Call, weight: np.ndarray | None, options: WeightOptions) -> str | None:
    """Return why the weight of a call cannot be read in a few bits, or None."""
    if weight is None:
        return "the weights are computed"
    if call.op.same_as(_TAKE) and options.scheme is Scheme.XNOR:
        return "a table has no activations to take the signs of"
    if weight.dtype != np.float32 or str(call.ty.dtype) != "float32":
        return f"the weights are {weight.dtype}, not float32"
    if call.op.same_as(_CONV2D):
        layouts = str(call.attrs.data_layout), str(call.attrs.kernel_layout)
        if layouts != ("NHWC", "OHWI"):
            return f"the layout is {' and '.join(layouts)}, not NHWC and OHWI"
        groups = int(call.attrs.groups)
        return None if groups == 1 else f"a convolution of {groups} groups has no such kernel"
    if weight.ndim != 2:
        return f"weights of {weight.ndim} axes have no such kernel"
    if call.op.same_as(_MATMUL):
        return None if len(shape_of(call.args[0])) >= 2 else "a vector has no such kernel"
    axis = call.attrs.axis
    if axis is None or int(axis) % 2 != 0 or str(call.attrs.mode) not in TABLE_MODES:
        return "only whole rows are looked up in such a table"
    return None


def _quantize(
    weight: np.ndarray, axis: int, options: WeightOptions, layer: str, chosen: np.ndarray | None
) -> tuple[Decoded, QuantizedWeight]:
    first = np.moveaxis(weight, axis, 0)
    levels = quantize_weights(first.reshape(len(first), -1), options, layer=layer)
    if chosen is not None:
        levels = replace(levels, levels=chosen)
    decoded = Decoded(levels=levels, shape=tuple(weight.shape), axis=axis)
    noise = float(np.square(weight.astype(np.float64) - decoded.real()).sum())
    signal = float(np.square(weight.astype(np.float64)).sum())
    return decoded, QuantizedWeight(
        layer=layer,
        sqnr_db=10 * math.log10(signal / noise) if signal and noise else None,
        float_bytes=weight.nbytes,
        stored_bytes=sum(int(argument.value.numpy().nbytes) for argument in decoded.call().args),
    )
