"""Which function proposes for which kind of step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from hone.kernel_table import rebound
from hone.model import Model

from . import half, int8, mixed, prune, split, tune, weights
from .candidate import Candidate, Context
from .options.section import StepSection

PROPOSE: Final[Mapping[str, Callable[[Model, Any, Context], Candidate | str]]] = {
    "prune": prune.propose,
    "int8": int8.propose,
    "mixed": mixed.propose,
    "weights": weights.propose,
    "bf16": half.propose,
    "fp16": half.propose,
    "split": split.propose,
    "tune": tune.propose,
}
"""By the step's ``kind``: the proposal, or why there is none."""


def propose(model: Model, precision: str, step: StepSection, context: Context) -> Candidate | str:
    """Return what a step makes of a model, or why it makes nothing.

    Parameters
    ----------
    model : Model
        What was kept so far.
    precision : str
        Lowest precision of its kernels.
    step : StepSection
        From the recipe.
    context : Context
        What all steps share.

    Raises
    ------
    UsageError
        The step lacks data, or its selectors name no layer.
    """
    if precision not in step.accepts:
        works_on = " or ".join(sorted(step.accepts))
        return f"{step.kind} works on {works_on}, and the model is {precision} already"
    candidate = PROPOSE[step.kind](model, step, context)
    if isinstance(candidate, str) or candidate.model is model:
        return candidate
    return replace(candidate, model=rebound(model, candidate.model, candidate.merged))
