"""Calibration: the range of every tensor that becomes integers, from running the float network.

The network is compiled once and runs sample by sample, so memory does not grow with the data. For
methods that need no more than a sample's extremes, the reductions are part of the compiled graph;
for the others it returns the tensors of one sample at a time. It always runs on this machine: the
ranges do not depend on the target. With a cache, known results are not computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version

import numpy as np

from hone.passes.apply import apply
from hone.passes.quantize.bias_correction import InputMeans, MeanObserver
from hone.passes.quantize.calibrator import Calibrator
from hone.passes.quantize.observe_tensors import STATISTICS, ObserveTensors
from hone.passes.quantize.observer import Range
from hone.passes.quantize.qparams import QParams
from hone.passes.quantize.quantize_int8 import observed_tensors

from . import fingerprint
from .calibration_cache import CalibrationCache
from .data import RANDOM_HINT, Dataset
from .errors import ModelError, UsageError
from .model import Model
from .progress import Progress, silent
from .tensor_reader import TensorReader, compile_for_host


def calibrate(
    model: Model,
    dataset: Dataset,
    *,
    threads: int,
    keep_float: Collection[str] = (),
    calibrator: Calibrator | None = None,
    allow_random: bool = False,
    cache: CalibrationCache | None = None,
    progress: Progress | None = None,
) -> dict[str, Range]:
    """Collect the ranges that `hone.passes.quantize.quantize_int8` needs.

    Parameters
    ----------
    model : Model
        Its module in NHWC with folded batch norm: the very module that is quantized afterwards.
    dataset : Dataset
        Samples like those that the model will see; a few hundred are usual.
    threads : int
        Threads of one run.
    keep_float : collection of str
        Binding names of layers that stay in float.
    calibrator : Calibrator, optional
        The method; min-max when absent.
    allow_random : bool
        Whether ``random:N`` data will do.
    cache : CalibrationCache, optional
        Where to look first, and to keep the result.
    progress : Progress, optional
        Where to report.

    Returns
    -------
    dict of str to Range
        Tensor name → range, in graph order.

    Raises
    ------
    UsageError
        There are no samples, or they are random and that was not allowed.
    ModelError
        A tensor holds NaN or infinity: names the first such tensor and the sample.
    """
    check_calibration_data(dataset, allow_random=allow_random)
    progress = progress or silent()
    calibrator = calibrator or Calibrator()
    names = observed_tensors(model.module, keep_float=keep_float)
    if not names:
        return {}
    key = cache_key(model, dataset, {"tensors": names, **calibrator.settings}) if cache else {}
    stored = cache.load(key) if cache else None
    if stored is not None:
        progress.log(f"calibration of {len(names)} tensors taken from the cache")
        return {name: Range(minimum=float(a), maximum=float(b)) for name, (a, b) in stored.items()}
    observers = {name: calibrator.observer(name) for name in names}
    read = _values if calibrator.needs_values else _extremes
    with progress.task("calibrate", total=len(dataset)) as task:
        task.update(completed=0, detail=f"compiling for {len(names)} tensors")
        for index, name, values in read(model, dataset, names, threads):
            observers[name].update(values)
            task.update(completed=index, detail="")
        task.update(completed=len(dataset))
    ranges = {name: watcher.range for name, watcher in observers.items()}
    if cache:
        cache.save(key, {n: np.array([r.minimum, r.maximum]) for n, r in ranges.items()})
    return ranges


def channel_ranges(
    model: Model,
    dataset: Dataset,
    names: Sequence[str],
    *,
    threads: int,
    cache: CalibrationCache | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[Range, ...]]:
    """Return the smallest and largest value of each channel, for `hone.passes.quantize.equalize`.

    Parameters
    ----------
    model : Model
        As for `calibrate`.
    dataset : Dataset
        Checked already.
    names : sequence of str
        Tensors of the module.
    threads, cache, progress
        As for `calibrate`.

    Returns
    -------
    dict of str to tuple of Range
        Tensor name → one range for each index of the last axis.

    Raises
    ------
    ModelError
        A tensor holds NaN or infinity: names the first such tensor and the sample.
    """
    if not names:
        return {}
    progress = progress or silent()
    key = cache_key(model, dataset, {"channels of": list(names)}) if cache else {}
    extremes = cache.load(key) if cache else None
    if extremes is None:
        extremes = {}
        with progress.task("calibrate channels", total=len(dataset)) as task:
            for index, name, (low, high) in _extremes(model, dataset, names, threads):
                before = extremes.get(name, (low, high))
                extremes[name] = np.stack([np.minimum(before[0], low), np.maximum(before[1], high)])
                task.update(completed=index)
            task.update(completed=len(dataset))
        if cache:
            cache.save(key, extremes)
    else:
        progress.log(f"channel ranges of {len(names)} tensors taken from the cache")
    return {
        name: tuple(Range(minimum=float(a), maximum=float(b)) for a, b in values.T)
        for name, values in extremes.items()
    }


def input_means(
    model: Model,
    dataset: Dataset,
    qparams: Mapping[str, QParams],
    *,
    threads: int,
    progress: Progress | None = None,
) -> dict[str, InputMeans]:
    """Return the means of layers' inputs before and after quantization, for bias correction.

    Parameters
    ----------
    model : Model
        As for `calibrate`.
    dataset : Dataset
        That gave the ranges: finite throughout.
    qparams : mapping of str to QParams
        From `hone.passes.quantize.quantize_int8.weighted_inputs`.
    threads, progress
        As for `calibrate`.
    """
    if not qparams:
        return {}
    progress = progress or silent()
    observers = {name: MeanObserver(layer=name, qparams=q) for name, q in qparams.items()}
    with progress.task("calibrate means", total=len(dataset)) as task:
        for index, name, values in _values(model, dataset, list(qparams), threads):
            observers[name].update(values)
            task.update(completed=index)
        task.update(completed=len(dataset))
    return {name: watcher.means for name, watcher in observers.items()}


def check_calibration_data(dataset: Dataset, *, allow_random: bool) -> None:
    """Refuse data that do not calibrate.

    Raises
    ------
    UsageError
        There are no samples, or they are random and that was not allowed.
    """
    if dataset.source.startswith("random:") and not allow_random:
        raise UsageError(
            "random data say nothing about the model's real value ranges, so they do not calibrate",
            where=dataset.source,
            hint=RANDOM_HINT,
        )
    if not len(dataset):
        raise UsageError("calibration needs at least one sample", where=dataset.source)


def cache_key(model: Model, dataset: Dataset, options: dict[str, object]) -> dict[str, object]:
    """Return what decides a calibration's result: network, data, options, and who computes it."""
    return {
        "module": fingerprint.of_module(model.module),
        "data": fingerprint.of_dataset(dataset),
        "options": options,
        "tvm": version("apache-tvm"),
    }


def _extremes(
    model: Model, dataset: Dataset, names: Sequence[str], threads: int
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yield ``[2, C]``, the extremes of each tensor's last axis, computed inside the network."""
    run = compile_for_host(apply(model.module, ObserveTensors(tensors=names)), threads=threads)
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        results = run([sample[spec.name] for spec in model.signature.inputs])
        for position, name in enumerate(names):
            low, high, finite = results[STATISTICS * position : STATISTICS * (position + 1)]
            if not finite.all():
                raise _not_finite(name, dataset, index)
            yield index, name, np.stack([low, high])


def _values(
    model: Model, dataset: Dataset, names: Sequence[str], threads: int
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yield each tensor as it is."""
    reader = TensorReader(model, names, threads=threads)
    for index in range(len(dataset)):
        for name, values in reader.read(dataset.sample(index)).items():
            if not np.isfinite(values).all():
                raise _not_finite(name, dataset, index)
            yield index, name, values


def _not_finite(name: str, dataset: Dataset, index: int) -> ModelError:
    return ModelError(
        f"calibration sample {index} of {dataset.source} makes this tensor NaN or infinite",
        where=name,
        hint="remove the sample, or keep the layer before it in float if it overflows float32",
    )
