"""How much each layer alone moves the outputs when it is computed in another precision.

No labels are needed: outputs are compared with those of the network as it is, on a few samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hone.data import Dataset
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.quantize.switch_layers import Emulation, SwitchLayers
from hone.progress import Progress
from hone.tensor_reader import compile_for_host

Divergence = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], float]


def kl_divergence(reference: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    """Return the mean divergence of class scores, of the first output, in nats.

    ``KL = mean over rows of Σ p log(p / q)`` with ``p = softmax(reference)``, ``q =
    softmax(actual)``: what a student loses that guesses with q where p is right. 0 where both are
    equal up to a shift.

    Worked number: the scores (0, 0) become (log 3, 0): p = (1/2, 1/2), q = (3/4, 1/4), and
    KL = 1/2 log(2/3) + 1/2 log(2) = 0.1438.

    Source: Kullback and Leibler 1951; as a measure of sensitivity to quantization Cai et al.,
    "ZeroQ", CVPR 2020, section 3.2.

    Parameters
    ----------
    reference, actual : sequence of ndarray
        Outputs of one sample; the last axis of the first one runs over classes.
    """
    p, q = (_log_softmax(np.asarray(outputs[0], np.float64)) for outputs in (reference, actual))
    return max(float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1))), 0.0)


def relative_error(reference: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    """Return the largest ``sqrt(Σ (y - y')² / Σ y²)`` of all outputs.

    Worked number: y = (3, 4) and y' = (3, 3.5): sqrt(0.25 / 25) = 0.1. Zeros that become
    something else count as 1.

    Parameters
    ----------
    reference, actual : sequence of ndarray
        Outputs of one sample.
    """
    worst = 0.0
    for wanted, found in zip(reference, actual, strict=True):
        y = np.asarray(wanted, np.float64)
        noise = float(np.sum((y - np.asarray(found, np.float64)) ** 2))
        signal = float(np.sum(y**2))
        if noise:
            worst = max(worst, math.sqrt(noise / signal) if signal else 1.0)
    return worst


def sensitivity(
    model: Model,
    emulations: Mapping[str, Mapping[str, Emulation]],
    dataset: Dataset,
    *,
    samples: int,
    threads: int,
    divergence: Divergence,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Measure every precision of every layer, one at a time, with one compiled network.

    Parameters
    ----------
    model : Model
        Float, in NHWC with folded batch norm.
    emulations : mapping of str to mapping of str to Emulation
        Precision → binding name of a layer → how it is emulated.
    dataset : Dataset
        Where the samples come from; labels are not used.
    samples : int
        How many of them to run at most.
    threads : int
        Threads of one run.
    divergence : callable
        Compares the outputs of one sample.
    progress : Progress
        Where to report.

    Returns
    -------
    dict of str to dict of str to float
        Precision → layer → mean divergence over samples.
    """
    found: dict[str, dict[str, float]] = {precision: {} for precision in emulations}
    layers = list(dict.fromkeys(name for by_layer in emulations.values() for name in by_layer))
    if not layers:
        return found
    choices = {
        name: [p for p, by_layer in emulations.items() if name in by_layer] for name in layers
    }
    network = apply(
        model.module,
        SwitchLayers(alternatives={n: [emulations[p][n] for p in choices[n]] for n in layers}),
    )
    count = min(samples, len(dataset))
    runs = count * (1 + sum(map(len, choices.values())))
    with progress.task("sensitivity of layers", total=runs) as task:
        task.update(0, "compiling")
        run = compile_for_host(network, threads=threads)
        done = 0
        for index in range(count):
            sample = dataset.sample(index)
            inputs = [sample[spec.name] for spec in model.signature.inputs]
            off = np.zeros(len(layers), np.int32)
            reference = run([*inputs, off])
            for position, name in enumerate(layers):
                for value, precision in enumerate(choices[name], 1):
                    switch = off.copy()
                    switch[position] = value
                    error = divergence(reference, run([*inputs, switch]))
                    found[precision][name] = found[precision].get(name, 0.0) + error / count
                    done += 1
                    task.update(index + 1 + done, "")
    return found


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    logs: np.ndarray = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return logs
