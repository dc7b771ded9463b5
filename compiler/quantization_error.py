"""How much of each layer's signal survives quantization: SQNR, float and integers side by side.

Both networks run on the same samples on this machine, and every quantized layer's result is
compared. The error of a layer contains that of all layers before it, as it does in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hone.passes.quantize.qparams import dequantize
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
    nothing but zeros with noise has the lowest finite number, -3082.6 dB or so.

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
    return 10.0 * math.log10(max(signal / noise, np.finfo(np.float64).tiny))


def layer_errors(
    model: Model, result: Quantization, dataset: Dataset, *, samples: int, threads: int
) -> tuple[LayerError, ...]:
    """Compare every quantized layer with its float self.

    Parameters
    ----------
    model : Model
        The float model, the very module that was quantized.
    result : Quantization
        Of its module, by `quantize_int8`.
    dataset : Dataset
        Where the samples come from.
    samples : int
        How many of them to run at most.
    threads : int
        Threads of one run.

    Returns
    -------
    tuple of LayerError
        In graph order, one for each quantized layer.
    """
    pairs = [
        (layer, layer.tensor, layer.result)
        for layer in result.quantized
        if layer.tensor is not None and layer.result is not None
    ]
    if not pairs:
        return ()
    real = TensorReader(model, [tensor for _, tensor, _ in pairs], threads=threads)
    integer = TensorReader(
        model.with_module(result.module), [name for *_, name in pairs], threads=threads
    )
    signal, noise = np.zeros(len(pairs)), np.zeros(len(pairs))
    for index in range(min(samples, len(dataset))):
        sample = dataset.sample(index)
        wanted, found = real.read(sample), integer.read(sample)
        for position, (layer, tensor, name) in enumerate(pairs):
            x = wanted[tensor].astype(np.float64)
            x_q = found[name]
            if layer.qparams is not None:
                x_q = dequantize(x_q, layer.qparams)
            signal[position] += np.sum(x**2)
            noise[position] += np.sum((x - x_q) ** 2)
    return tuple(
        LayerError(layer=layer.layer, sqnr_db=sqnr_db(float(s), float(n)))
        for (layer, *_), s, n in zip(pairs, signal, noise, strict=True)
    )
