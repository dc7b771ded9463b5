"""Whether a step of a recipe stays: measured against what was kept, within the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .measure import Outcome, Speedup
from .recipe import Recipe
from .report.schema import Verdict

_NOT_FASTER: Final = {
    Outcome.SLOWER: "slower",
    Outcome.NOISE: "not faster outside noise",
    Outcome.NOT_SHOWN: "not shown to be faster, on a machine too busy to tell",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a step changes.

    Parameters
    ----------
    lost : float
        Accuracy lost since the baseline, in the unit of the budget.
    weights_bytes : tuple of int
        Before and after.
    speedup : Speedup or None
        Over what was kept; None where nothing can be measured.
    activations_bytes : tuple of int or None
        Before and after; None where the goal is another one.
    """

    lost: float
    weights_bytes: tuple[int, int]
    speedup: Speedup | None
    activations_bytes: tuple[int, int] | None = None


def judge(change: Change, recipe: Recipe) -> tuple[Verdict, str]:
    """Return whether a step stays, and why, with the numbers.

    Parameters
    ----------
    change : Change
        What it changes.
    recipe : Recipe
        Says what is wanted, and what it may cost.
    """
    budget, metric = recipe.goal.max_accuracy_drop, recipe.data.metric
    size = _bytes("weights", change.weights_bytes)
    if change.lost > budget + 1e-12:
        reason = f"loses {loss(change.lost, metric)}, budget {loss(budget, metric)}"
        return Verdict.REVERTED, reason
    if recipe.goal.goal == "size":
        return _less(change.weights_bytes, size, "not smaller")
    if change.activations_bytes is not None:
        memory = _bytes("activations", change.activations_bytes)
        return _less(change.activations_bytes, memory, "no less memory")
    if change.speedup is None:
        return Verdict.NOT_MEASURED, f"no device; {size}"
    if change.speedup.outcome is Outcome.FASTER:
        return Verdict.KEPT, speed(change.speedup)
    return Verdict.REVERTED, f"{_NOT_FASTER[change.speedup.outcome]}: {speed(change.speedup)}"


def loss(amount: float, metric: str) -> str:
    """Return an amount of accuracy as text."""
    if metric == "top1":
        return f"{100 * amount:.2f} points of top-1"
    return f"{amount:.2g} relative output error"


def speed(speedup: Speedup) -> str:
    """Return a ratio with its interval as text."""
    low, high = speedup.ci95
    return f"{speedup.ratio:.2f} times as fast (95% {low:.2f} to {high:.2f})"


def _bytes(name: str, pair: tuple[int, int]) -> str:
    return f"{name} {pair[0]} → {pair[1]} bytes"


def _less(pair: tuple[int, int], text: str, otherwise: str) -> tuple[Verdict, str]:
    if pair[1] < pair[0]:
        return Verdict.KEPT, text
    return Verdict.REVERTED, f"{otherwise}: {text}"
