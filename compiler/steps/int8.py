"""Quantize convolutions and matrix products to 8-bit integers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hone import calibrate
from hone.calibration_cache import CalibrationCache
from hone.data import Dataset
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.quantize.bias_correction import InputMeans
from hone.passes.quantize.calibrator import Calibrator, Method
from hone.passes.quantize.equalize import By, equalize, equalized_tensors
from hone.passes.quantize.observer import Range
from hone.passes.quantize.quantize_int8 import Quantization, quantize_int8, weighted_inputs
from hone.quantization_error import layer_errors

from .candidate import Candidate, Context, bindings_left, prepared, selected
from .options.int8 import Int8Options, Int8Step


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A float network and all that is needed to write any of its layers in integers.

    Parameters
    ----------
    model : Model
        In NHWC, batch norm folded, equalized where that was asked for.
    ranges : mapping of str to Range
        Tensor name → range.
    keep_float : frozenset of str
        Binding names of layers that stay in float by request.
    means : mapping of str to InputMeans or None
        For bias correction.
    note : str
        What was done to the float network.
    """

    model: Model
    ranges: Mapping[str, Range]
    keep_float: frozenset[str]
    means: Mapping[str, InputMeans] | None = None
    note: str = ""

    def quantize(self, *, keep_float: Collection[str] = ()) -> Quantization:
        """Return the network in integers.

        Parameters
        ----------
        keep_float : collection of str
            Binding names of further layers that stay in float.
        """
        return quantize_int8(
            self.model.module,
            self.ranges,
            keep_float=self.keep_float.union(keep_float),
            means=self.means,
        )


def calibrated(
    model: Model, step: Int8Options, skip: Collection[str], data: Dataset, context: Context
) -> Calibrated:
    """Collect what quantization needs to know of a network.

    Parameters
    ----------
    model : Model
        In NHWC, batch norm folded.
    step : Int8Options
        How to calibrate.
    skip : collection of str
        Binding names of layers that stay in float.
    data : Dataset
        For calibration.
    context : Context
        What all steps share.

    Raises
    ------
    UsageError
        The data do not calibrate.
    """
    threads, progress = context.threads, context.progress
    calibrate.check_calibration_data(data, allow_random=context.allow_random)
    cache = None if context.cache is None else CalibrationCache(context.cache)
    note = ""
    if step.equalize is not None:
        names = equalized_tensors(model.module)
        extremes = calibrate.channel_ranges(
            model, data, names, threads=threads, cache=cache, progress=progress
        )
        equalized = equalize(model.module, extremes, by=By(step.equalize))
        model = model.with_module(equalized.module)
        note = f", {len(equalized.pairs)} pairs of layers equalized"
    ranges = calibrate.calibrate(
        model,
        data,
        threads=threads,
        keep_float=skip,
        calibrator=calibrator(step),
        allow_random=context.allow_random,
        cache=cache,
        progress=progress,
    )
    means = None
    if step.bias_correction:
        inputs = weighted_inputs(model.module, ranges, keep_float=skip)
        means = calibrate.input_means(model, data, inputs, threads=threads, progress=progress)
    return Calibrated(
        model=model, ranges=ranges, keep_float=frozenset(skip), means=means, note=note
    )


def propose(model: Model, step: Int8Step, context: Context) -> Candidate:
    """Return the model with every layer that fits in integers.

    Raises
    ------
    UsageError
        A selector of ``skip`` names no layer, there are no data, or they do not calibrate.
    """
    data = context.calibration_for(step)
    ready = model.with_module(apply(prepared(model), ToNHWC()))
    skip = bindings_left(ready, selected(model, step), where="skip")
    found = calibrated(ready, step, skip, data, context)
    result = found.quantize()
    skipped = tuple((entry.layer, entry.reason) for entry in result.skipped)
    if not result.quantized:
        return Candidate(model=model, skipped=skipped, note="no layer fits int8")
    return Candidate(
        model=model.with_module(result.module),
        precision="int8",
        skipped=skipped,
        note=f"{len(result.quantized)} kernels in int8, "
        f"conversions from or to float: {len(result.conversions)}{found.note}",
        errors=errors(found.model, result, data, context),
        merged=result.merged,
    )


def calibrator(step: Int8Options) -> Calibrator:
    """Return what chooses the range of each activation."""
    if step.percentile is None:
        return Calibrator(method=Method(step.observer))
    return Calibrator(method=Method(step.observer), percentile=step.percentile)


def errors(
    ready: Model, result: Quantization, data: Dataset, context: Context
) -> tuple[tuple[str, float | None], ...]:
    """Return each quantized layer's id and SQNR in dB, on a few samples; none where not asked.

    Parameters
    ----------
    ready : Model
        In float, the very module that was quantized.
    result : Quantization
        Of it.
    data : Dataset
        Where the samples come from.
    context : Context
        Says on how many of them.
    """
    samples = context.error_samples
    if not samples:
        return ()
    ids = {layer.binding: layer.id for layer in ready.layers}
    found = layer_errors(ready, result, data, samples=samples, threads=context.threads)
    return tuple((ids.get(error.layer, error.layer), error.sqnr_db) for error in found)
