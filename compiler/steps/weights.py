"""Store weights in a few bits, decoded inside the kernels; activations stay float32."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from hone import calibrate
from hone.adapt import learn_roundings, weight_tasks
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.quantize.adaptive_rounding import STEPS
from hone.passes.quantize.match_qdq import match_qdq
from hone.passes.quantize.pack_weights import pack_weights
from hone.passes.quantize.quantize_weights import PACKED, quantize_weight_only
from hone.passes.quantize.weight_schemes import Granularity, Scheme, WeightOptions
from hone.quantization_error import compared_floats

from .candidate import Candidate, Context, bindings_left, prepared, selected
from .options.weights import WeightsStep
from .recovered import recovered
from .sqnr import sqnr


def propose(model: Model, step: WeightsStep, context: Context) -> Candidate:
    """Return the model with every weight that has a kernel for it in a few bits.

    Raises
    ------
    ModelError
        Weights hold NaN or infinity.
    UsageError
        A selector of ``skip`` names no layer, or what is to be learned lacks data.
    """
    options = weight_options(step)
    given = model.with_module(pack_weights(match_qdq(model.module).module).module)
    ready = model.with_module(apply(prepared(given), ToNHWC()))
    skip = bindings_left(ready, selected(model, step), where="skip")
    note = ""
    if step.recover is not None:
        found = quantize_weight_only(ready.module, options, keep_float=skip)
        ready, note = recovered(
            ready,
            step.recover,
            context.calibration_for(step),
            context,
            layers=[entry.layer for entry in found.quantized],
            weights=options,
        )
    rounded = None
    if step.rounding == "adaptive":
        rounded, note = _rounded(ready, step, options, skip, context)
    result = quantize_weight_only(ready.module, options, keep_float=skip, rounded=rounded)
    skipped = tuple((entry.layer, entry.reason) for entry in result.skipped)
    if not result.quantized:
        packed = [entry.reason.endswith(PACKED) for entry in result.skipped]
        note = "all weights are packed already" if packed and all(packed) else "no weight fits"
        return Candidate(model=model, skipped=skipped, note=note)
    before = sum(entry.float_bytes for entry in result.quantized)
    after = sum(entry.stored_bytes for entry in result.quantized)
    changed = model.with_module(result.module)
    layers = [entry.layer for entry in result.quantized]
    pairs = compared_floats(ready.module, result.module, layers)
    ids = {layer.binding: layer.id for layer in ready.layers}
    alone = tuple((ids.get(entry.layer, entry.layer), entry.sqnr_db) for entry in result.quantized)
    return Candidate(
        model=changed,
        skipped=skipped,
        note=f"weights of {len(result.quantized)} layers from {before} to {after} bytes{note}",
        errors=sqnr(ready, changed, pairs, context.calibration, context) or alone,
    )


def weight_options(step: WeightsStep) -> WeightOptions:
    """Return how a step quantizes weights."""
    return WeightOptions(
        scheme=Scheme(step.scheme),
        bits=step.level_bits,
        granularity=Granularity(step.granularity),
        group_size=step.group,
        symmetric=step.symmetric,
        power_of_two=step.power_of_two,
    )


def _rounded(
    model: Model,
    step: WeightsStep,
    options: WeightOptions,
    skip: Collection[str],
    context: Context,
) -> tuple[dict[str, np.ndarray], str]:
    """Return learned levels of each layer's weights, and a note."""
    data = context.calibration_for(step)
    calibrate.check_calibration_data(data, allow_random=context.allow_random)
    found = learn_roundings(
        model,
        data,
        weight_tasks(model.module, options, keep_float=skip),
        threads=context.threads,
        steps=STEPS if step.rounding_steps is None else step.rounding_steps,
        seconds=step.rounding_seconds,
        progress=context.progress,
    )
    note = f", rounding of {len(found.levels)} layers learned"
    return dict(found.levels), note + "".join(f"; {text}" for text in found.notes)
