"""Looks for layers that leave threads idle, and splits those that are faster in parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from hone.errors import UsageError
from hone.importing.layer_names import layer_binding
from hone.measure import Outcome
from hone.model import Layer, Model
from hone.passes.apply import apply
from hone.passes.graph.split_operator import SplitOperator
from hone.profiling.balance import busy_shares
from hone.profiling.call_times import call_times
from hone.selectors import WEIGHTED
from hone.verdict import speed

from .candidate import Candidate, Context, prepared
from .options.split import SplitStep

if TYPE_CHECKING:
    from hone.summary import Version

BUSY = 0.8
"""A kernel that keeps less of the threads busy is looked at."""
LEAST_SHARE = 0.01
"""Of the time of all kernels; what takes less is not worth a trial."""
MOST_TRIALS = 12
TIMING_S = 0.3


def search(model: Model, step: SplitStep, context: Context) -> Candidate | str:
    """Return the model with those layers in parts that are faster so, or why there are none.

    Every split is measured in the whole model, against the best so far.

    Parameters
    ----------
    model : Model
        In fp32.
    step : SplitStep
        With ``layers = ["auto"]`` along channels or the batch.
    context : Context
        Of a build, which measures.

    Raises
    ------
    UsageError
        The model branches, so that its kernels cannot be timed.
    """
    trials = context.trials
    if trials is None or trials.measure is None:
        return 'only the clock chooses layers to split: on the target, with goal = "latency"'
    best = trials.build("unsplit", model, "fp32")
    layers = idle_layers(model, best, threads=context.threads, sample=trials.sample)
    if not layers:
        return f"every kernel that counts keeps {100 * BUSY:.0f}% of the threads busy"
    module, chosen = prepared(model), list[str]()
    skipped: list[tuple[str, str]] = []
    for layer in layers[:MOST_TRIALS]:
        splitting = SplitOperator(
            layers=[*chosen, layer.binding],
            parts=step.parts or max(context.threads, 2),
            axis="batch" if step.axis == "batch" else "channels",
        )
        try:
            candidate = model.with_module(apply(module, splitting))
        except UsageError as error:
            skipped.append((layer.id, error.message))
            continue
        version = trials.build(f"split {layer.id}", candidate, "fp32")
        speedup = trials.measure({"kept": best, "split": version}).speedup("split", over="kept")
        if speedup.outcome is Outcome.FASTER:
            best = version
            chosen.append(layer.binding)
        else:
            skipped.append((layer.id, f"in parts it is {speed(speedup)}"))
    if not chosen:
        tried = "; ".join(map(": ".join, skipped))
        return f"none of the layers that leave threads idle is faster in parts: {tried}"
    note = f"{len(chosen)} of {len(layers)} layers that leave threads idle are faster in parts"
    return Candidate(model=best.model, skipped=tuple(skipped), note=note)


def idle_layers(
    model: Model, version: Version, *, threads: int, sample: Mapping[str, np.ndarray]
) -> list[Layer]:
    """Return the layers that can be split whose kernels leave threads idle, the slowest first."""
    slicing = version.assembled.slicing
    if slicing.parts > 1:
        return []  # every thread has a slice of the batch of its own
    shares = busy_shares(version.assembled.scheduled.module, threads)
    calls = call_times(version.runner, sample, version.assembled.lowered, seconds=TIMING_S)
    whole_us = sum(call.us for call in calls)
    splittable = {layer.binding: layer for layer in model.layers if layer.op_type in WEIGHTED}
    found: dict[str, float] = {}
    for call in calls:
        if shares.get(call.kernel, 1.0) >= BUSY or call.us < LEAST_SHARE * whole_us:
            continue
        for name in {layer_binding(name) for name in call.names}.intersection(splittable):
            found[name] = found.get(name, 0.0) + call.us
    return [splittable[name] for name in sorted(found, key=lambda name: -found[name])]
