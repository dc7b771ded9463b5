"""Compute layers from 16-bit floats, with sums in float32."""

from __future__ import annotations

import tvm

from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.dataflow import Dataflow
from hone.passes.graph.to_half import ToHalf
from hone.passes.quantize.operators import NAMES as INTEGER_OPERATORS
from hone.quantization_error import compared_floats
from hone.targets.half_dot import BFLOAT16, FLOAT16

from .candidate import Candidate, Context, bindings_left, prepared, selected
from .options.half import Bf16Step, HalfOptions
from .sqnr import sqnr

DTYPES = {"bf16": BFLOAT16, "fp16": FLOAT16}
"""The type that each kind of step stores."""


def propose(model: Model, step: HalfOptions, context: Context) -> Candidate:
    """Return the model with its float layers computed from 16-bit floats.

    Parameters
    ----------
    model : Model
        What was kept so far; layers that are in int8 already stay so.
    step : HalfOptions
        From the recipe.
    context : Context
        What all steps share; data are needed for the errors of layers alone.

    Raises
    ------
    UsageError
        A selector of ``skip`` names no layer, or all that it names became part of others.
    """
    ready = model.with_module(apply(prepared(model), ToNHWC()))
    keep = bindings_left(ready, selected(model, step), where="skip")
    conversion = ToHalf(
        dtype=DTYPES[step.kind],
        keep_float=keep,
        large_tiles=isinstance(step, Bf16Step) and step.winograd == "4x4",
    )
    plan = conversion.plan(ready.module)
    ids = {layer.binding: layer.id for layer in ready.layers}
    skipped = tuple((ids.get(layer, layer), reason) for layer, reason in plan.skipped)
    if not plan.converted:
        return Candidate(model=model, skipped=skipped, note=f"no layer fits {step.kind}")
    graph = Dataflow(ready.module["main"])
    calls = (graph.call(binding.var) for binding in graph.bindings)
    integers = any(
        isinstance(call.op, tvm.ir.Op) and str(call.op.name) in INTEGER_OPERATORS
        for call in calls
        if call is not None
    )
    count = len(plan.converted)
    changed = model.with_module(apply(ready.module, conversion))
    pairs = compared_floats(ready.module, changed.module, plan.converted)
    return Candidate(
        model=changed,
        precision=None if integers else step.kind,
        skipped=skipped,
        errors=sqnr(ready, changed, pairs, context.calibration, context),
        note=f"{count} {'layer' if count == 1 else 'layers'} in {step.kind}",
    )
