"""Quantize convolutions and matrix products to 8-bit integers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from hone import calibrate
from hone.adapt import RoundingTask, learn_roundings
from hone.calibration_cache import CalibrationCache
from hone.data import Dataset
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.quantize.adaptive_rounding import STEPS
from hone.passes.quantize.bias_correction import InputMeans
from hone.passes.quantize.calibrator import Calibrator, Method
from hone.passes.quantize.equalize import DEFAULT_ALPHA, By, equalize, equalized_tensors
from hone.passes.quantize.integer_layer import quantize_weights
from hone.passes.quantize.observer import Range
from hone.passes.quantize.quantize_int8 import (
    Quantization,
    quantize_int8,
    quantized_reads,
    weighted_inputs,
    weighted_sites,
)
from hone.passes.quantize.site import Int8Scheme
from hone.passes.quantize.slice_splits import SliceSplits
from hone.passes.quantize.smooth_norms import smooth_norms, smoothed_tensors
from hone.passes.quantize.weight_schemes import WeightOptions
from hone.quantization_error import compared_levels

from .candidate import Candidate, Context, bindings_left, prepared, selected
from .options.int8 import Int8Options, Int8Step
from .recovered import recovered
from .sqnr import sqnr


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
    rounded : mapping of str to ndarray or None
        Layer → int8 levels of its weights, where they are not rounded to nearest.
    note : str
        What was done to the float network.
    scheme : Int8Scheme
        How levels are chosen.
    """

    model: Model
    ranges: Mapping[str, Range]
    keep_float: frozenset[str]
    means: Mapping[str, InputMeans] | None = None
    rounded: Mapping[str, np.ndarray] | None = None
    note: str = ""
    scheme: Int8Scheme = field(default_factory=Int8Scheme)

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
            rounded=self.rounded,
            scheme=self.scheme,
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
    note, scheme = "", int8_scheme(step)
    if step.equalize is not None:
        model, note = _equalized(model, By(step.equalize), step.alpha, data, context, cache)
    measure = partial(
        calibrate.calibrate,
        dataset=data,
        threads=threads,
        keep_float=skip,
        calibrator=calibrator(step),
        allow_random=context.allow_random,
        cache=cache,
        progress=progress,
    )
    ranges = measure(model)
    if step.recover is not None:
        sites = weighted_sites(model.module, ranges, keep_float=skip, scheme=scheme)
        model, text = recovered(
            model,
            step.recover,
            data,
            context,
            layers=[site.layer for site, _ in sites],
            weights=WeightOptions(symmetric=scheme.symmetric, power_of_two=scheme.power_of_two),
            reads=quantized_reads(model.module, ranges, keep_float=skip, scheme=scheme),
        )
        ranges = measure(model)
        note += text
    rounded = None
    if step.rounding == "adaptive":
        rounded, text = _rounded(model, step, data, context, ranges, skip)
        note += text
    means = None
    if step.bias_correction:
        inputs = weighted_inputs(model.module, ranges, keep_float=skip, scheme=scheme)
        means = calibrate.input_means(model, data, inputs, threads=threads, progress=progress)
    return Calibrated(
        model=model,
        ranges=ranges,
        keep_float=frozenset(skip),
        means=means,
        rounded=rounded,
        note=note,
        scheme=scheme,
    )


def int8_scheme(step: Int8Options) -> Int8Scheme:
    """Return how a step chooses levels."""
    return Int8Scheme(symmetric=step.weights == "symmetric", power_of_two=step.power_of_two)


def _equalized(
    model: Model,
    by: By,
    alpha: float | None,
    data: Dataset,
    context: Context,
    cache: CalibrationCache | None,
) -> tuple[Model, str]:
    """Return a model with channels scaled, and a note."""
    alpha = DEFAULT_ALPHA if alpha is None else alpha
    names = equalized_tensors(model.module)
    norms = smoothed_tensors(model.module) if by is By.ACTIVATIONS else ()
    extremes = calibrate.channel_ranges(
        model,
        data,
        [*names, *norms],
        threads=context.threads,
        cache=cache,
        progress=context.progress,
    )
    equalized = equalize(model.module, extremes, by=by, alpha=alpha)
    note = f", {len(equalized.pairs)} pairs of layers equalized"
    if norms:
        equalized = smooth_norms(equalized.module, extremes, alpha=alpha)
        note += f", {len(equalized.pairs)} products smoothed"
    return model.with_module(equalized.module), note


def _rounded(
    model: Model,
    step: Int8Options,
    data: Dataset,
    context: Context,
    ranges: Mapping[str, Range],
    skip: Collection[str],
) -> tuple[dict[str, np.ndarray], str]:
    """Return learned levels of each layer's weights, and a note."""
    tasks = []
    scheme = int8_scheme(step)
    for site, levels in weighted_sites(model.module, ranges, keep_float=skip, scheme=scheme):
        _, weights = quantize_weights(site, levels)
        column = (len(site.weight), 1)
        tasks.append(
            RoundingTask(
                site=site,
                scale=weights.scale.reshape(column),
                zero_point=weights.zero_point.reshape(column),
                type=weights.type,
                data=levels,
            )
        )
    found = learn_roundings(
        model,
        data,
        tasks,
        threads=context.threads,
        steps=STEPS if step.rounding_steps is None else step.rounding_steps,
        seconds=step.rounding_seconds,
        progress=context.progress,
    )
    shapes = {task.site.layer: task.site.weight.shape for task in tasks}
    levels_of = {layer: found.levels[layer].reshape(shapes[layer]) for layer in found.levels}
    gains = list(found.gains.values()) or [1.0]
    note = (
        f", rounding of {len(levels_of)} layers learned: on average "
        f"{100 * sum(gains) / len(gains):.0f}% of the squared error of rounding to nearest"
    )
    return levels_of, note + "".join(f"; {text}" for text in found.notes)


def propose(model: Model, step: Int8Step, context: Context) -> Candidate:
    """Return the model with every layer that fits in integers.

    Raises
    ------
    UsageError
        A selector of ``skip`` names no layer, there are no data, or they do not calibrate.
    """
    data = context.calibration_for(step)
    ready = model.with_module(apply(prepared(model), SliceSplits(), ToNHWC()))
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
    changed = ready.with_module(result.module)
    return sqnr(ready, changed, compared_levels(result), data, context)
