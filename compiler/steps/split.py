"""Split operators into parts: one by one, or a part of the network in bands of rows."""

from __future__ import annotations

import tvm
from tvm import relax

from hone.activations import lowered_activation_bytes
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.bands import WORTHWHILE, Bands
from hone.passes.graph.split_operator import SplitOperator
from hone.passes.graph.split_patches import SplitPatches

from .candidate import Candidate, Context, prepared, selected
from .options.split import SplitStep
from .split_parallel import search


def propose(model: Model, step: SplitStep, context: Context) -> Candidate | str:
    """Return the model with the selected operators in parts, or why nothing can be split.

    Raises
    ------
    UsageError
        A selector names no layer, or the layers cannot be split.
    """
    if step.automatic:
        by_memory = step.axis == "patches"
        return _automatic(model, step, context) if by_memory else search(model, step, context)
    bindings = [layer.binding for layer in selected(model, step)]
    parts = step.parts or 2
    module = prepared(model)
    if step.axis != "patches":
        splitting = SplitOperator(layers=bindings, parts=parts, axis=step.axis)
        return Candidate(model=model.with_module(apply(module, splitting)))
    split = apply(module, SplitPatches(layers=bindings, parts=parts))
    before, after = (_memory(each, context) for each in (module, split))
    return Candidate(model=model.with_module(split), note=_saved(before, after))


def _automatic(model: Model, step: SplitStep, context: Context) -> Candidate | str:
    """Plan the memory of the forecast splits, and take the one that needs the least."""
    module = prepared(model)
    function = next(f for f in module.functions.values() if isinstance(f, relax.Function))
    wanted = [f.parts for f in Bands(function).ranked() if step.parts in (None, f.parts)]
    before = _memory(module, context)
    planned: list[tuple[int, int, tvm.IRModule]] = []
    for parts in sorted(wanted):
        split = apply(module, SplitPatches(layers=None, parts=parts))
        planned.append((_memory(split, context), parts, split))
    least, parts, split = min(planned, key=lambda row: row[:2], default=(before, 0, module))
    if least > WORTHWHILE * before:
        return f"no split into patches needs less than {before} bytes of activations"
    note = f"{parts} bands of rows; {_saved(before, least)}"
    return Candidate(model=model.with_module(split), note=note)


def _memory(module: tvm.IRModule, context: Context) -> int:
    return lowered_activation_bytes(module, context.target, threads=context.threads)


def _saved(before: int, after: int) -> str:
    return f"activations {before} → {after} bytes, as planned"
