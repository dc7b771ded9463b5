"""How right a compiled model is: top-1 on labelled samples, or the error of its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .data import Dataset
from .errors import UsageError

Run = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What one evaluation says.

    Parameters
    ----------
    accuracy : float or None
        Top-1 as a fraction in [0, 1]; None without labels.
    output_error : float or None
        ``max |y - reference| / max |reference|`` over all samples and outputs, infinite where
        only one of the two is a finite number; None without a reference.
    samples : int
        Single samples evaluated.
    """

    accuracy: float | None
    output_error: float | None
    samples: int


def outputs(run: Run, data: Dataset) -> dict[str, np.ndarray]:
    """Run every sample; return each output as ``[samples, *shape]``."""
    rows = [run(data.sample(index)) for index in range(len(data))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of samples whose largest logit is at the label.

    Parameters
    ----------
    logits : ndarray
        ``[samples, B, ..., classes]``; axes of extent 1 between are ignored.
    labels : ndarray
        int64 ``[samples, B]``.

    Raises
    ------
    UsageError
        The output is not one vector of class scores for each label.
    """
    classes = logits.shape[-1]
    if logits.size != labels.size * classes:
        raise UsageError(
            f"top-1 needs one vector of class scores for each label: {labels.size} labels, "
            f"the model's first output is {list(logits.shape[1:])} for each sample",
            hint='[data] metric = "relative_error" compares outputs instead',
        )
    guessed = logits.reshape(-1, classes).argmax(axis=1)
    return float(np.mean(guessed == labels.reshape(-1)))


def relative_error(actual: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """Return the largest ``max |y - reference| / max |reference|`` of all outputs.

    Infinite where one of the two is not a finite number and the other is something else.
    """
    worst = 0.0
    for name, output in reference.items():
        if output.size == 0:
            continue
        wanted, found = output.astype(np.float64), actual[name].astype(np.float64)
        finite = np.isfinite(wanted)
        if not np.array_equal(found[~finite], wanted[~finite], equal_nan=True):
            return math.inf
        if not np.isfinite(found[finite]).all():
            return math.inf
        scale = float(np.max(np.abs(wanted[finite]), initial=0.0)) or 1.0
        error = np.max(np.abs(found[finite] - wanted[finite]), initial=0.0)
        worst = max(worst, float(error) / scale)
    return worst


def evaluate(
    run: Run, data: Dataset, *, reference: Mapping[str, np.ndarray] | None = None
) -> tuple[Quality, dict[str, np.ndarray]]:
    """Run the evaluation data through a model.

    Parameters
    ----------
    run : callable
        One sample's inputs to outputs.
    data : Dataset
        With labels for an accuracy.
    reference : mapping of str to ndarray, optional
        Outputs of the unchanged model, as this function returned them.

    Returns
    -------
    tuple
        The quality and the outputs.
    """
    found = outputs(run, data)
    first = next(iter(found.values()))
    accuracy = None if data.labels is None else top1(first, data.labels)
    error = None if reference is None else relative_error(found, reference)
    return Quality(accuracy=accuracy, output_error=error, samples=len(data)), found
