"""Adaptive rounding of a network's layers, from calibration data.

The float network is compiled once and runs sample by sample; each layer's second moments are all
that is kept. Where they do not fit the memory limit together, layers take turns, and the data are
read again for each turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import tvm

from hone.passes.quantize.adaptive_rounding import STEPS, learn_rounding
from hone.passes.quantize.gram import GramObserver, gram_shape
from hone.passes.quantize.qparams import QParams, QuantizedType, dequantize, quantize
from hone.passes.quantize.site import WEIGHTED, Site
from hone.passes.quantize.survey import survey
from hone.passes.quantize.weight_schemes import Scheme, WeightOptions, quantize_weights

from .data import Dataset
from .model import Model
from .progress import Progress, silent
from .tensor_reader import TensorReader

MEMORY_BYTES: Final = 512 << 20
"""For second moments at one time; the largest layer of ResNet-18 takes 85 MB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundingTask:
    """A layer whose weights are to be rounded.

    Parameters
    ----------
    site : Site
        A convolution or matrix product of the float module in NHWC.
    scale, zero_point : numpy.ndarray
        Of the weights, broadcast to ``[K, D]``.
    type : QuantizedType
        Their levels.
    data : QParams or None
        How the layer's input is quantized; None where it stays float.
    """

    site: Site
    scale: np.ndarray
    zero_point: np.ndarray
    type: QuantizedType
    data: QParams | None = None


@dataclass(frozen=True, kw_only=True)
class Roundings:
    """Levels of several layers' weights.

    Parameters
    ----------
    levels : mapping of str to ndarray
        Layer of a site → levels ``[K, D]``.
    gains : mapping of str to float
        Layer → its squared error relative to that of rounding to nearest, at most 1.
    notes : tuple of str
        Layers that stay nearest, and time limits reached.
    """

    levels: Mapping[str, np.ndarray]
    gains: Mapping[str, float]
    notes: tuple[str, ...] = field(default=())


def weight_tasks(
    module: tvm.IRModule, options: WeightOptions, *, keep_float: Collection[str] = ()
) -> tuple[RoundingTask, ...]:
    """Return the layers whose weights alone will be integers, for `quantize_weight_only`.

    None for ternary and binary weights, whose levels are no neighbours of the weight.

    Parameters
    ----------
    module : IRModule
        ``main`` in NHWC with folded batch norm.
    options : WeightOptions
        How they will be quantized.
    keep_float : collection of str
        Binding names of layers that stay in float.
    """
    if options.scheme is not Scheme.INTEGER:
        return ()
    type_ = QuantizedType(bits=options.bits, signed=True, narrow=options.symmetric)
    tasks = []
    for site in survey(module["main"], keep_float=keep_float).sites:
        if site.kind not in WEIGHTED:
            continue
        rows = site.weight.reshape(len(site.weight), -1)
        found = quantize_weights(rows, options, layer=site.layer)
        zeros = np.zeros_like(found.scale)
        scale, zero_point = (
            np.broadcast_to(np.repeat(values, found.group, 1)[:, : rows.shape[1]], rows.shape)
            for values in (found.scale, zeros if found.zero_point is None else found.zero_point)
        )
        tasks.append(
            RoundingTask(site=site, scale=scale, zero_point=zero_point.astype(np.int32), type=type_)
        )
    return tuple(tasks)


def learn_roundings(
    model: Model,
    dataset: Dataset,
    tasks: Sequence[RoundingTask],
    *,
    threads: int,
    steps: int = STEPS,
    seconds: float | None = None,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress | None = None,
) -> Roundings:
    """Choose the levels of weights so that the layers' outputs change least on the data.

    Parameters
    ----------
    model : Model
        The float module that the sites are of.
    dataset : Dataset
        Checked already.
    tasks : sequence of RoundingTask
        The layers.
    threads : int
        Threads of one run.
    steps : int
        Optimizer steps of each layer.
    seconds : float, optional
        For learning all layers, shared out by their cost; the runs of the network are not counted.
        The result then depends on the machine's speed.
    memory_bytes : int
        For second moments. A layer that needs more alone stays nearest.
    progress : Progress, optional
        Where to report.
    """
    progress = progress or silent()
    notes = []
    fitting = []
    for task in tasks:
        if _moment_bytes(task) > memory_bytes:
            notes.append(
                f"{task.site.layer} stays rounded to nearest: its {gram_shape(task.site)[1]} "
                f"inputs need {_moment_bytes(task) >> 20} MiB of second moments, "
                f"{memory_bytes >> 20} MiB are allowed"
            )
        else:
            fitting.append(task)
    total = sum(_cost(task) for task in fitting)
    levels: dict[str, np.ndarray] = {}
    gains: dict[str, float] = {}
    short = 0
    with progress.task("adapt rounding", total=len(fitting)) as shown:
        for turn in _turns(fitting, memory_bytes):
            shown.update(len(levels), "reading inputs")
            for task, gram in zip(turn, _grams(model, dataset, turn, threads), strict=True):
                limit = np.inf if seconds is None else seconds * _cost(task) / total
                weight = task.site.weight
                result = learn_rounding(
                    weight.reshape(len(weight), -1),
                    task.scale,
                    task.zero_point,
                    gram,
                    type=task.type,
                    steps=steps,
                    seconds=limit,
                )
                layer = task.site.layer
                levels[layer] = result.levels
                gains[layer] = result.error / result.nearest_error if result.nearest_error else 1.0
                short += result.steps < steps
                shown.update(len(levels), f"{layer}: {100 * (1 - gains[layer]):.0f}% less error")
    if short:
        notes.append(f"{seconds:g} s ended the rounding of {short} layers before {steps} steps")
    return Roundings(levels=levels, gains=gains, notes=tuple(notes))


def _moment_bytes(task: RoundingTask) -> int:
    groups, depth, _ = gram_shape(task.site)
    return 4 * groups * depth * depth


def _cost(task: RoundingTask) -> int:
    return task.site.weight.size * gram_shape(task.site)[1]


def _turns(tasks: Sequence[RoundingTask], memory_bytes: int) -> list[list[RoundingTask]]:
    turns: list[list[RoundingTask]] = []
    left = 0
    for task in tasks:
        needed = _moment_bytes(task)
        if needed > left:
            turns.append([])
            left = memory_bytes
        turns[-1].append(task)
        left -= needed
    return turns


def _grams(
    model: Model, dataset: Dataset, tasks: Sequence[RoundingTask], threads: int
) -> list[np.ndarray]:
    """Return the second moments of each layer's input, quantized where it will be."""
    names = [str(task.site.inputs[0].name) for task in tasks]
    observers = [GramObserver(task.site) for task in tasks]
    reader = TensorReader(model, list(dict.fromkeys(names)), threads=threads)
    for index in range(len(dataset)):
        values = reader.read(dataset.sample(index))
        for name, task, observer in zip(names, tasks, observers, strict=True):
            tensor = values[name]
            if task.data is not None:
                tensor = dequantize(quantize(tensor, task.data), task.data)
            observer.update(tensor)
    return [observer.gram for observer in observers]
