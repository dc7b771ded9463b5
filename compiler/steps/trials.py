"""How a step that searches tries its candidates: compiled, evaluated and measured by the build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hone.model import Model

if TYPE_CHECKING:
    from hone.measure import Measurement
    from hone.summary import Version


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What a build lends to its steps.

    Parameters
    ----------
    build : callable
        Compiles and evaluates: name of the trial, model, precision of the package.
    lost : callable
        The loss of a version against the baseline, in the unit of the budget.
    measure : callable or None
        Runs versions by name in interleaved rounds; None where time does not count or cannot be
        measured.
    sample : mapping of str to ndarray
        Inputs of a run.
    metric : {"top1", "relative_error"}
        What a loss is.
    budget : float
        Largest loss of the whole recipe.
    folder : Path
        Where the build writes.
    key : callable
        Returns what a loss depends on beside the model, for JSON: data, metric, target.
    """

    build: Callable[[str, Model, str], Version]
    lost: Callable[[Version], float]
    measure: Callable[[Mapping[str, Version]], Measurement] | None
    sample: Mapping[str, np.ndarray]
    metric: str
    budget: float
    folder: Path
    key: Callable[[], Mapping[str, Any]]
