"""Cross-layer equalization: scales channels between two layers so that quantization suits them.

A channel between two layers may be divided by s behind the first and multiplied by s before the
second, because ReLU, pooling and identity pass a positive factor through. Rewrites the weights and
biases of such pairs, in NHWC with folded batch norm, before calibration; the first layer of a pair
may be a depthwise convolution, the second too. Factors are powers of two, so float results stay the
same bit for bit. Numerics: exact, except that behind a clip such as ReLU6 a value which never
reaches the bound in the calibration data may be clipped elsewhere than before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from hone.errors import ModelError
from hone.passes.graph.dataflow import Dataflow, Rebuilder, shape_of, with_args

from .observer import Range
from .site import WEIGHTED, Kind, Site
from .survey import survey

SWEEPS: Final = 20
"""Rounds over all pairs at most; networks settle in a few."""

LARGEST_EXPONENT: Final = 16
"""A channel that is weaker than its neighbours by more is noise, not worth any level."""


DEFAULT_ALPHA: Final = 0.5
"""SmoothQuant's own: halves the difference in the logarithm."""


class By(StrEnum):
    """What shall be equal over the channels."""

    WEIGHTS = "weights"
    """The ranges of both layers' weights (Nagel et al. 2019)."""
    ACTIVATIONS = "activations"
    """The ranges of the tensor between them and of the second's weights (SmoothQuant)."""


@dataclass(frozen=True, kw_only=True)
class Equalization:
    """An equalized module.

    Parameters
    ----------
    module : IRModule
        The very same where there is nothing to scale.
    pairs : tuple of (str, str)
        Binding names of the two layers of each pair that has channels scaled.
    """

    module: tvm.IRModule
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pair:
    first: Site
    second: Site

    @property
    def tensor(self) -> str:
        """The first layer's result before its activation."""
        return str(self.first.chain[self.first.linear - 1].name)


def equalized_tensors(module: tvm.IRModule) -> tuple[str, ...]:
    """Return the names of the tensors whose ranges per channel `equalize` needs.

    Parameters
    ----------
    module : IRModule
        ``main`` in NHWC with folded batch norm.
    """
    return tuple(pair.tensor for pair in _pairs(module["main"]))


def equalize(
    module: tvm.IRModule,
    ranges: Mapping[str, tuple[Range, ...]],
    *,
    by: By = By.WEIGHTS,
    alpha: float = DEFAULT_ALPHA,
) -> Equalization:
    """Scale the channels between layers.

    For channel i, with ``r1`` the range (largest magnitude) of the first layer's weights, or of
    the activation, and ``r2`` that of the second layer's weights which read the channel::

        s_i = sqrt(r1_i / r2_i) / median of it over the channels, to the nearest power of two
        W1[i] / s_i,  b1[i] / s_i,  W2[:, i] × s_i

    With ``by`` activations, the root is ``r1_i^alpha / r2_i^(1 - alpha)``, of which it is the case
    alpha = 0.5. Without the median both ranges would be ``sqrt(r1_i × r2_i)``. A factor that all
    channels share changes nothing, and taking it out keeps channels together that are nearly equal,
    which the rounding could otherwise tear apart. hone quantizes weights per output channel, so the
    factors matter to what has one scale for all channels: the activation, and the inputs of the
    second layer's filters. For a depthwise second layer with ``by`` activations the weights do not
    matter (each channel has its own scale), and ``s_i = r1_i / max r1``, rounded up, so that
    no channel exceeds the largest. Pairs share layers, so rounds are repeated until nothing
    changes. A channel of zeros keeps s = 1. Where a finite bound
    follows (ReLU6), a channel that reaches it keeps s = 1, and no other is scaled up beyond it.

    Worked number: r1 = [8, 0.5, 0.5], r2 = [0.5, 0.5, 0.5]: the roots are [4, 1, 1], their median
    is 1, s = [4, 1, 1]; the ranges become [2, 0.5, 0.5] and [2, 0.5, 0.5].

    Sources: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (ICCV 2019), equations 8 to 12; Xiao et al., "SmoothQuant" (ICML 2023), equation 4.

    Parameters
    ----------
    module : IRModule
        ``main`` in NHWC with folded batch norm; stays as it is.
    ranges : mapping of str to tuple of Range
        For every name of `equalized_tensors`, the range of each channel over calibration data.
    by : By
        What shall be equal.
    alpha : float
        From 0 to 1, with ``by`` activations: how much of the difference between the activation's
        channels the second layer's weights take over.

    Raises
    ------
    ModelError
        Ranges are missing (all of them are listed).
    """
    function = module["main"]
    pairs = _pairs(function)
    missing = [pair.tensor for pair in pairs if pair.tensor not in ranges]
    if missing:
        raise ModelError("calibration gave no range for some tensors", problems=missing)
    weights = {
        site.output: site.weight.astype(np.float64)
        for pair in pairs
        for site in (pair.first, pair.second)
    }
    total = [np.ones(len(weights[pair.first.output])) for pair in pairs]
    for _ in range(SWEEPS):
        changed = False
        for pair, scale in zip(pairs, total, strict=True):
            factor = _factors(pair, weights, ranges[pair.tensor], scale, by, alpha)
            changed |= bool((factor != 1.0).any())
            scale *= factor
            _divide(weights, pair, factor)
        if not changed:
            break
    scaled = [(p, s) for p, s in zip(pairs, total, strict=True) if (s != 1.0).any()]
    if not scaled:
        return Equalization(module=module, pairs=())
    rewritten = module.clone()
    rewritten.update_func(module.get_global_var("main"), _rewrite(function, scaled, weights))
    return Equalization(
        module=rewritten, pairs=tuple((p.first.layer, p.second.layer) for p, _ in scaled)
    )


def _pairs(function: relax.Function) -> list[_Pair]:
    graph = Dataflow(function)
    sites = [site for site in survey(function).sites if site.kind in WEIGHTED]
    reader = {site.chain[0]: site for site in sites}
    pairs = []
    for site in sites:
        if site.residual or not (site.low <= 0.0 <= site.high) or site.low == site.high:
            continue
        var = site.output
        while graph.used_once(var):
            user = graph.users[var][0]
            second = reader.get(user)
            if second is not None:
                if second.inputs[0].same_as(var):
                    pairs.append(_Pair(first=site, second=second))
                break
            if not _passes_factors(graph, var, user):
                break
            var = user
    return pairs


def _passes_factors(graph: Dataflow, var: relax.Var, user: relax.Var) -> bool:
    """Tell whether an operator keeps the last axis and passes positive factors through."""
    call = graph.call(user)
    if call is None or not call.args[0].same_as(var):
        return False
    if call.op in (_MAX_POOL2D, _AVG_POOL2D):
        return str(call.attrs.layout) == "NHWC" and str(call.attrs.out_layout or "NHWC") == "NHWC"
    last = len(shape_of(var)) - 1
    if call.op == _MEAN:
        axes = call.attrs.axis
        return axes is not None and all(int(axis) % (last + 1) != last for axis in axes)
    if call.op == _RESHAPE:
        return bool(shape_of(user)) and shape_of(user)[-1] == shape_of(var)[-1]
    return False


def _factors(
    pair: _Pair,
    weights: Mapping[relax.Var, np.ndarray],
    ranges: tuple[Range, ...],
    scale: np.ndarray,
    by: By,
    alpha: float,
) -> np.ndarray:
    """Return this round's factors, ``[K]``; `scale` is the product of the earlier ones."""
    first, second = pair.first, pair.second
    low = np.array([r.minimum for r in ranges]) / scale
    high = np.array([r.maximum for r in ranges]) / scale
    own_scales = by is By.ACTIVATIONS and _is_depthwise(second)
    reading = np.abs(_by_input(second, weights[second.output])).max(1)
    if by is By.ACTIVATIONS:
        giving = np.maximum(
            -np.clip(low, first.low, first.high), np.clip(high, first.low, first.high)
        )
    else:
        giving = np.abs(weights[first.output]).reshape(len(scale), -1).max(1)
    useful = (giving > 0.0) & (reading > 0.0)
    if not useful.any():
        return np.ones_like(giving)
    giving, reading = np.where(useful, giving, 1.0), np.where(useful, reading, 1.0)
    if own_scales:
        exponent = np.ceil(np.log2(giving / giving[useful].max()))
    else:
        share = alpha if by is By.ACTIVATIONS else 0.5
        root = share * np.log2(giving) - (1.0 - share) * np.log2(reading)
        exponent = np.rint(root - np.median(root[useful]))
    done = np.log2(scale)
    exponent = np.clip(exponent + done, -LARGEST_EXPONENT, LARGEST_EXPONENT) - done
    # Nothing that a bound did not clip may be clipped afterwards.
    reach = np.zeros_like(giving)
    for values, bound in ((high, first.high), (low, first.low)):
        if bound != 0.0 and math.isfinite(bound):
            reach = np.maximum(reach, values / bound)
    least = np.ceil(np.log2(np.maximum(reach, 2.0**-LARGEST_EXPONENT)))
    exponent = np.where(
        reach >= 1.0, 0.0, np.where(reach > 0.0, np.maximum(exponent, least), exponent)
    )
    return np.where(useful, np.exp2(exponent), 1.0)


def _divide(weights: dict[relax.Var, np.ndarray], pair: _Pair, factor: np.ndarray) -> None:
    first = weights[pair.first.output]
    weights[pair.first.output] = first / factor.reshape(-1, *[1] * (first.ndim - 1))
    second = weights[pair.second.output]
    shape = (-1, *[1] * (second.ndim - 1)) if _is_depthwise(pair.second) else (-1,)
    weights[pair.second.output] = second * factor.reshape(shape)


def _is_depthwise(site: Site) -> bool:
    return site.kind is Kind.CONV2D and int(site.call.attrs.groups) != 1


def _by_input(site: Site, weight: np.ndarray) -> np.ndarray:
    """Return ``[C, ...]``: the weights that read each input channel."""
    moved = weight if _is_depthwise(site) else np.moveaxis(weight, -1, 0)
    return moved.reshape(len(moved), -1)


def _rewrite(
    function: relax.Function,
    scaled: list[tuple[_Pair, np.ndarray]],
    weights: Mapping[relax.Var, np.ndarray],
) -> relax.Function:
    constants: dict[relax.Var, np.ndarray] = {}
    biases: dict[relax.Var, np.ndarray] = {}
    for pair, scale in scaled:
        for site in (pair.first, pair.second):
            weight = weights[site.output]
            constants[site.chain[0]] = weight.T if site.kind is Kind.DENSE else weight
        biases |= dict.fromkeys(pair.first.chain[1 : pair.first.linear], scale)
    graph = Dataflow(function)
    rebuilder = Rebuilder(function)
    for binding in graph.bindings:
        var, call = binding.var, binding.value
        if var in constants:
            weight = np.ascontiguousarray(constants[var], np.float32)
            arguments = [rebuilder.use(call.args[0]), relax.const(weight)]
            rebuilder.bind(var, with_args(call, arguments))
        elif var in biases:
            arguments = [_bias(graph, rebuilder, argument, biases[var]) for argument in call.args]
            rebuilder.bind(var, with_args(call, arguments))
        else:
            rebuilder.copy(binding)
    return rebuilder.finish()


def _bias(
    graph: Dataflow, rebuilder: Rebuilder, argument: relax.Expr, scale: np.ndarray
) -> relax.Expr:
    """Return an operand of a bias addition: the constant one divided, the other as it is."""
    value = graph.constant(argument)
    if value is None:
        return rebuilder.use(argument)
    return relax.const((value / scale).astype(np.float32))


_MAX_POOL2D = Op.get("relax.nn.max_pool2d")
_AVG_POOL2D = Op.get("relax.nn.avg_pool2d")
_MEAN = Op.get("relax.mean")
_RESHAPE = Op.get("relax.reshape")
