"""Split operators into parts with a concatenation behind them."""

from __future__ import annotations

from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.split_operator import SplitOperator

from .candidate import Candidate, Context, prepared, selected
from .options.split import SplitStep


def propose(model: Model, step: SplitStep, context: Context) -> Candidate:
    """Return the model with the selected operators in parts.

    Raises
    ------
    UsageError
        A selector names no layer.
    """
    bindings = [layer.binding for layer in selected(model, step)]
    splitting = SplitOperator(layers=bindings, parts=step.parts, axis=step.axis)
    return Candidate(model=model.with_module(apply(prepared(model), splitting)))
