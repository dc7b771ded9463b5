"""SmoothQuant: moves outliers of normalized activations into the weights that read them.

A few channels behind a layer normalization are often a hundred times larger than the others, and
one scale for all of them leaves those others no levels. Each channel is divided by s before the
matrix products and their weights are multiplied by s. Rewrites the normalization's gain and shift;
where somebody else reads it too (a residual), a product with 1 / s stands between, which becomes
one kernel with the quantization behind it. Runs before calibration, in NHWC with folded batch norm.
Numerics: factors are powers of two, so float results stay the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, Op

from hone.errors import ModelError
from hone.passes.graph.dataflow import PART, Dataflow, Rebuilder, layer_of, shape_of, with_args

from .equalize import DEFAULT_ALPHA, LARGEST_EXPONENT, Equalization
from .observer import Range
from .site import Kind, Site
from .survey import survey


@dataclass(frozen=True, kw_only=True, eq=False)
class _Norm:
    """A normalization, the products that read it, and whether nobody else does."""

    var: relax.Var
    call: relax.Call
    readers: tuple[Site, ...]
    alone: bool


def smoothed_tensors(module: tvm.IRModule) -> tuple[str, ...]:
    """Return the names of the tensors whose ranges per channel `smooth_norms` needs.

    Parameters
    ----------
    module : IRModule
        ``main`` in NHWC with folded batch norm.
    """
    return tuple(str(norm.var.name) for norm in _norms(module["main"]))


def smooth_norms(
    module: tvm.IRModule, ranges: Mapping[str, tuple[Range, ...]], *, alpha: float = DEFAULT_ALPHA
) -> Equalization:
    """Scale the channels between layer normalizations and matrix products.

    For channel j of the normalized X and the weights W of all products that read it::

        s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) / median of it, to the nearest power of two
        X_j / s_j,  W[:, j] × s_j

    The median takes out a factor that all channels share, which changes nothing. A channel of zeros
    keeps s = 1.

    Worked number: max|X| = [64, 1, 1], max|W| = [1, 1, 1] and alpha = 0.5: s = [8, 1, 1]. The
    activation's range falls from 64 to 8, so the steps of the other channels are 8 times finer; the
    weights' range grows from 1 to 8.

    Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models" (ICML 2023), equation 4.

    Parameters
    ----------
    module : IRModule
        ``main`` in NHWC with folded batch norm; stays as it is.
    ranges : mapping of str to tuple of Range
        For every name of `smoothed_tensors`, the range of each channel over calibration data.
    alpha : float
        From 0, all of the difference stays in the activation, to 1, all of it moves to the weights.

    Returns
    -------
    Equalization
        The pairs are normalization and product.

    Raises
    ------
    ModelError
        Ranges are missing (all of them are listed).
    """
    function = module["main"]
    norms = _norms(function)
    missing = [str(norm.var.name) for norm in norms if str(norm.var.name) not in ranges]
    if missing:
        raise ModelError("calibration gave no range for some tensors", problems=missing)
    factors = {norm.var: _factor(norm, ranges[str(norm.var.name)], alpha) for norm in norms}
    scaled = [norm for norm in norms if (factors[norm.var] != 1.0).any()]
    if not scaled:
        return Equalization(module=module, pairs=())
    rewritten = module.clone()
    rewritten.update_func(module.get_global_var("main"), _rewrite(function, scaled, factors))
    return Equalization(
        module=rewritten,
        pairs=tuple((layer_of(norm.var), site.layer) for norm in scaled for site in norm.readers),
    )


def _norms(function: relax.Function) -> list[_Norm]:
    graph = Dataflow(function)
    products: dict[relax.Var, list[Site]] = {}
    for site in survey(function).sites:
        if site.kind is Kind.DENSE:
            products.setdefault(site.inputs[0], []).append(site)
    found = []
    for binding in graph.bindings:
        call = graph.call(binding.var, _LAYER_NORM)
        readers = products.get(binding.var, [])
        if call is None or not readers or not _is_over_channels(call):
            continue
        users = graph.users[binding.var]
        alone = len(users) == len(readers) and bool(call.attrs.scale) and bool(call.attrs.center)
        found.append(_Norm(var=binding.var, call=call, readers=tuple(readers), alone=alone))
    return found


def _is_over_channels(call: relax.Call) -> bool:
    rank = len(shape_of(call))
    axes = [int(axis) % rank for axis in call.attrs.axes]
    return axes == [rank - 1] and all(isinstance(x, GenericConst) for x in list(call.args)[1:])


def _factor(norm: _Norm, ranges: tuple[Range, ...], alpha: float) -> np.ndarray:
    """Return s, ``[C]``."""
    giving = np.array([max(-r.minimum, r.maximum) for r in ranges])
    reading = np.max([np.abs(site.weight).max(0) for site in norm.readers], axis=0)
    useful = (giving > 0.0) & (reading > 0.0)
    if not useful.any():
        return np.ones_like(giving)
    giving, reading = np.where(useful, giving, 1.0), np.where(useful, reading, 1.0)
    root = alpha * np.log2(giving) - (1.0 - alpha) * np.log2(reading)
    exponent = np.rint(root - np.median(root[useful]))
    exponent = np.clip(exponent, -LARGEST_EXPONENT, LARGEST_EXPONENT)
    return np.asarray(np.where(useful, np.exp2(exponent), 1.0).astype(np.float32))


def _rewrite(
    function: relax.Function, scaled: list[_Norm], factors: Mapping[relax.Var, np.ndarray]
) -> relax.Function:
    norms = {norm.var: norm for norm in scaled}
    products = {site.chain[0]: norm for norm in scaled for site in norm.readers}
    rebuilder = Rebuilder(function)
    smooth: dict[relax.Var, relax.Var] = {}
    for binding in Dataflow(function).bindings:
        var, call = binding.var, binding.value
        if var in products:
            norm = products[var]
            weight = call.args[1].value.numpy() * factors[norm.var][:, None]
            arguments = [smooth[norm.var], relax.const(weight)]
            rebuilder.bind(var, with_args(call, arguments))
        elif var not in norms:
            rebuilder.copy(binding)
        elif norms[var].alone:
            data, *gains = call.args
            divided = [relax.const(gain.value.numpy() / factors[var]) for gain in gains]
            arguments = [rebuilder.use(data), *divided]
            smooth[var] = rebuilder.bind(var, with_args(call, arguments))
        else:
            new = rebuilder.copy(binding)
            inverse = relax.const(np.float32(1.0) / factors[var])
            product = relax.op.multiply(new, inverse)
            smooth[var] = rebuilder.emit(product, f"{layer_of(var)}{PART}smooth")
    return rebuilder.finish()


_LAYER_NORM = Op.get("relax.nn.layer_norm")
