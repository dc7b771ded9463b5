"""How much of each layer's signal survives quantization: SQNR, before and after side by side.

Both networks run on the same samples on this machine, and the result of every layer in integers, of
weights of few bits or of 16-bit floats is compared. The error of a layer contains that of all
layers before it, as it does in use.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from hone.passes.graph.dataflow import Dataflow, shape_of
from hone.passes.graph.to_half import HALF
from hone.passes.quantize.qparams import QParams, dequantize
from hone.passes.quantize.quantize_int8 import Quantization

from .data import Dataset
from .model import Model
from .tensor_reader import TensorReader


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """The quantization error of one layer's result.

    Parameters
    ----------
    layer : str
        Binding name.
    sqnr_db : float or None
        Signal to quantization noise in dB; None where there is no noise.
    """

    layer: str
    sqnr_db: float | None


def sqnr_db(signal: float, noise: float) -> float | None:
    """Return the signal-to-quantization-noise ratio in dB.

    ``10 log10(Σ x² / Σ (x - x_q)²)``: each bit less costs 6 dB. None without noise; a signal of
    nothing but zeros with noise has the lowest finite number, -3076.5 dB or so, and so has what is
    not finite, such as a layer of float16 that overflows.

    Worked number: x = [1, 2, 2] and x_q = [1, 2, 1.7]: 10 log10(9 / 0.09) = 20 dB.

    Source: Widrow and Kollár, "Quantization Noise" (2008), section 1.3.

    Parameters
    ----------
    signal : float
        Σ x².
    noise : float
        Σ (x - x_q)².
    """
    if noise == 0.0:
        return None
    ratio = signal / noise if math.isfinite(signal) and math.isfinite(noise) else 0.0
    return 10.0 * math.log10(max(ratio, np.finfo(np.float64).tiny))


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A tensor of the float network, and the one that stands for it.

    Parameters
    ----------
    layer : str
        Binding name of the layer whose result it is.
    tensor : str
        Its name in the float module.
    result : str
        The name of the other one in its module.
    qparams : QParams or None
        What its levels mean; None for floats.
    """

    layer: str
    tensor: str
    result: str
    qparams: QParams | None = None


def compared_levels(result: Quantization) -> tuple[Compared, ...]:
    """Return the results of all layers that became integer operators.

    Parameters
    ----------
    result : Quantization
        By `quantize_int8`.
    """
    return tuple(
        Compared(layer=layer.layer, tensor=layer.tensor, result=layer.result, qparams=layer.qparams)
        for layer in result.quantized
        if layer.tensor is not None and layer.result is not None
    )


def compared_floats(
    before: tvm.IRModule, after: tvm.IRModule, layers: Collection[str]
) -> tuple[Compared, ...]:
    """Return the results of layers that are computed otherwise, in floats all the same.

    A layer whose result has another name or shape afterwards is left out.

    Parameters
    ----------
    before, after : IRModule
        The float network, and the one with weights or products of fewer bits.
    layers : collection of str
        Binding names.
    """
    wanted, found = _float_tensors(before), _float_tensors(after)
    pairs = []
    for layer in dict.fromkeys(layers):
        names = (layer, f"{layer}{HALF}")
        result = next((n for n in names if found.get(n, ()) == wanted.get(layer)), None)
        if layer in wanted and result is not None:
            pairs.append(Compared(layer=layer, tensor=layer, result=result))
    return tuple(pairs)


def _float_tensors(module: tvm.IRModule) -> dict[str, tuple[int, ...]]:
    return {
        str(binding.var.name): shape_of(binding.var)
        for binding in Dataflow(module["main"]).bindings
        if isinstance(binding.var.ty, relax.TensorType)
        and str(binding.var.ty.dtype) in ("float32", "float16", "bfloat16")
    }


def layer_errors(
    model: Model,
    changed: Model,
    pairs: Sequence[Compared],
    dataset: Dataset,
    *,
    samples: int,
    threads: int,
) -> tuple[LayerError, ...]:
    """Compare layers of fewer bits with their float selves.

    Parameters
    ----------
    model : Model
        The float model, the very module that was changed.
    changed : Model
        What became of it.
    pairs : sequence of Compared
        What is compared.
    dataset : Dataset
        Where the samples come from.
    samples : int
        How many of them to run at most.
    threads : int
        Threads of one run.

    Returns
    -------
    tuple of LayerError
        One for each pair, in their order.
    """
    if not pairs:
        return ()
    real = TensorReader(model, list(dict.fromkeys(p.tensor for p in pairs)), threads=threads)
    other = TensorReader(changed, list(dict.fromkeys(p.result for p in pairs)), threads=threads)
    signal, noise = np.zeros(len(pairs)), np.zeros(len(pairs))
    for index in range(min(samples, len(dataset))):
        sample = dataset.sample(index)
        wanted, found = real.read(sample), other.read(sample)
        for position, pair in enumerate(pairs):
            x = wanted[pair.tensor].astype(np.float64)
            x_q = found[pair.result]
            if pair.qparams is not None:
                x_q = dequantize(x_q, pair.qparams)
            signal[position] += np.sum(x**2)
            noise[position] += np.sum((x - x_q.astype(np.float64)) ** 2)
    return tuple(
        LayerError(layer=pair.layer, sqnr_db=sqnr_db(float(s), float(n)))
        for pair, s, n in zip(pairs, signal, noise, strict=True)
    )
