"""Calibration: the range of every tensor that becomes integers, from running the float network.

The network is compiled once with the reductions inside, so one sample costs one run and memory does
not grow with the data. It always runs on this machine: the ranges do not depend on the target.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import tvm
from tvm import relax

from hone.passes.apply import apply
from hone.passes.quantize.observe_tensors import STATISTICS, ObserveTensors
from hone.passes.quantize.observer import MinMaxObserver, Observer, Range
from hone.passes.quantize.quantize_int8 import observed_tensors
from hone.targets.target import resolve

from . import pipeline
from .data import Dataset
from .errors import ModelError, UsageError
from .model import Model
from .progress import Progress, silent

Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def calibrate(
    model: Model,
    dataset: Dataset,
    *,
    threads: int,
    keep_float: Collection[str] = (),
    observer: Callable[..., Observer] = MinMaxObserver,
    allow_random: bool = False,
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
    observer : callable
        Makes one observer for a tensor, given ``layer``, its name. It is fed the smallest and the
        largest value of each index of the tensor's last axis, ``[2, C]`` for each sample.
    allow_random : bool
        Whether ``random:N`` data will do.
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
    if dataset.source.startswith("random:") and not allow_random:
        raise UsageError(
            "random data say nothing about the model's real value ranges, so they do not calibrate",
            where=dataset.source,
            hint="give real samples, or allow random ones by name",
        )
    if not len(dataset):
        raise UsageError("calibration needs at least one sample", where=dataset.source)
    progress = progress or silent()
    names = observed_tensors(model.module, keep_float=keep_float)
    if not names:
        return {}
    observers = {name: observer(layer=name) for name in names}
    with progress.task("calibrate", total=len(dataset)) as task:
        task.update(completed=0, detail=f"compiling for {len(names)} tensors")
        run = _compile(model, names, threads)
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            results = run([sample[spec.name] for spec in model.signature.inputs])
            for position, name in enumerate(names):
                first = STATISTICS * position
                low, high, finite = results[first : first + STATISTICS]
                if not finite.all():
                    raise ModelError(
                        f"calibration sample {index} of {dataset.source} makes this tensor NaN or "
                        "infinite",
                        where=name,
                        hint="remove the sample, or keep the layer before it in float if it "
                        "overflows float32",
                    )
                observers[name].update(np.stack([low, high]))
            task.update(completed=index + 1, detail="")
    return {name: watcher.range for name, watcher in observers.items()}


def _compile(model: Model, names: Sequence[str], threads: int) -> Run:
    """Compile the observing network for this machine."""
    target = resolve("host")
    observing = apply(model.module, ObserveTensors(tensors=names))
    lowered = pipeline.lower(observing, target, threads=threads)
    scheduled = pipeline.schedule(lowered, target, threads=threads)
    executable = pipeline.build_executable(scheduled.module, target, threads=threads)
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        # Copied into TVM's own memory: generated code assumes its alignment.
        return [out.numpy() for out in main(*[tvm.runtime.tensor(x) for x in inputs])]

    return run
