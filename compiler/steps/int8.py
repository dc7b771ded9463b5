"""Quantize convolutions and matrix products to 8-bit integers."""

from __future__ import annotations

from hone import calibrate
from hone.calibration_cache import CalibrationCache
from hone.data import Dataset
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.quantize.calibrator import Calibrator, Method
from hone.passes.quantize.equalize import By, equalize, equalized_tensors
from hone.passes.quantize.quantize_int8 import Quantization, quantize_int8, weighted_inputs
from hone.quantization_error import layer_errors

from .candidate import Candidate, Context, bindings_left, prepared, selected
from .options.int8 import Int8Step


def propose(model: Model, step: Int8Step, context: Context) -> Candidate:
    """Return the model with every layer that fits in integers.

    Raises
    ------
    UsageError
        A selector of ``skip`` names no layer, there are no data, or they do not calibrate.
    """
    calibration = context.calibration_for(step)
    threads, progress = context.threads, context.progress
    calibrate.check_calibration_data(calibration, allow_random=context.allow_random)
    cache = None if context.cache is None else CalibrationCache(context.cache)
    ready = model.with_module(apply(prepared(model), ToNHWC()))
    keep_float = bindings_left(ready, selected(model, step), where="skip")
    note = ""
    if step.equalize is not None:
        ranges = calibrate.channel_ranges(
            ready,
            calibration,
            equalized_tensors(ready.module),
            threads=threads,
            cache=cache,
            progress=progress,
        )
        equalized = equalize(ready.module, ranges, by=By(step.equalize))
        ready = ready.with_module(equalized.module)
        note = f", {len(equalized.pairs)} pairs of layers equalized"
    tensors = calibrate.calibrate(
        ready,
        calibration,
        threads=threads,
        keep_float=keep_float,
        calibrator=calibrator(step),
        allow_random=context.allow_random,
        cache=cache,
        progress=progress,
    )
    means = None
    if step.bias_correction:
        inputs = weighted_inputs(ready.module, tensors, keep_float=keep_float)
        means = calibrate.input_means(
            ready, calibration, inputs, threads=threads, progress=progress
        )
    result = quantize_int8(ready.module, tensors, keep_float=keep_float, means=means)
    skipped = tuple((entry.layer, entry.reason) for entry in result.skipped)
    if not result.quantized:
        return Candidate(model=model, skipped=skipped, note="no layer fits int8")
    return Candidate(
        model=model.with_module(result.module),
        precision="int8",
        skipped=skipped,
        note=f"{len(result.quantized)} kernels in int8, "
        f"conversions from or to float: {len(result.conversions)}{note}",
        errors=_errors(ready, result, calibration, context),
    )


def calibrator(step: Int8Step) -> Calibrator:
    """Return what chooses the range of each activation."""
    if step.percentile is None:
        return Calibrator(method=Method(step.observer))
    return Calibrator(method=Method(step.observer), percentile=step.percentile)


def _errors(
    ready: Model, result: Quantization, data: Dataset, context: Context
) -> tuple[tuple[str, float | None], ...]:
    samples = context.error_samples
    if not samples:
        return ()
    ids = {layer.binding: layer.id for layer in ready.layers}
    found = layer_errors(ready, result, data, samples=samples, threads=context.threads)
    return tuple((ids.get(error.layer, error.layer), error.sqnr_db) for error in found)
