"""The mixed precision search: which layers get which precision.

1. *Sensitivity.* Each layer alone is given each precision, and the error of the network's outputs
   is measured, without labels, on a few calibration samples. One compiled network answers for all
   layers: a switch for each layer selects its float or its emulated result at run time
   (`hone.passes.quantize.switch_layers`), so that this costs runs and not compiles.
2. *Accuracy.* Precisions are taken in the order of the recipe, the fastest first. For each, the
   layers that have no precision yet are ranked by sensitivity, and the number ``k`` of the most
   sensitive ones that must be left out is bisected: the loss on the evaluation data of the really
   compiled network, with all other layers in that precision, has to stay within the budget. What
   is left out is offered to the next precision, and in the end stays in float. The loss grows with
   the number of quantized layers, so that ``1 + ceil(log2(n))`` probes find the least ``k`` for
   this ranking; where a probe breaks that rule, the result still is one that was probed.
3. *Latency.* Kernel times inside the running network, once for each precision throughout, say what
   each layer costs; the time of a conversion follows from the size of the tensor at a border. The
   cheapest assignment (`partition`) may only take layers *back*, to a precision that costs less
   accuracy: so that a layer whose integer kernel and conversions are not faster than float leaves
   the integers, its neighbours considered. Two proposals are made, with the conversions' price and
   without it (a conversion that is fused into a neighbour's kernel is nearly free), and both are
   measured as whole networks in one interleaved run with the result of step 2; the fastest stays.

Every answer of the oracle is kept (`state`), so that an interrupted search goes on where it was.
A time limit ends the search with the best result that was probed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hone.progress import Task

from .oracle import FLOAT, Assignment, Clock, OutOfTimeError, Remembering
from .partition import cheapest

TOLERANCE = 1e-12
"""What a loss may exceed the budget by: rounding of a difference of two fractions."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is searched for.

    Parameters
    ----------
    layers : tuple of str
        In graph order.
    precisions : tuple of str
        Candidates, the fastest first; float is always one and not listed.
    refused : mapping of str to mapping of str to str
        Precision → layer → why it cannot have that precision.
    budget : float
        Largest loss on the evaluation data.
    activations : mapping of str to str
        Precision → type of its activations: between two of one type nothing is converted.
    """

    layers: tuple[str, ...]
    precisions: tuple[str, ...]
    budget: float
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)

    def fits(self, layer: str, precision: str) -> bool:
        """Say whether a layer can have a precision."""
        return layer not in self.refused.get(precision, {})

    def same(self, left: str, right: str) -> bool:
        """Say whether tensors between two precisions need no conversion."""
        return self.activations.get(left, left) == self.activations.get(right, right)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found.

    Parameters
    ----------
    assignment : mapping of str to str
        Layer → precision, for the layers that are not in float.
    reasons : mapping of str to str
        Layer → why it does not have a precision before its own, or why it is not in float where
        that is faster.
    sensitivity : mapping of str to mapping of str to float
        Precision → layer → output error.
    clock : Clock or None
        What layers cost in time.
    probes : int
        Assignments whose loss was asked for.
    complete : bool
        Whether the time limit left room for everything.
    """

    assignment: Assignment
    reasons: Mapping[str, str]
    sensitivity: Mapping[str, Mapping[str, float]]
    clock: Clock | None
    probes: int
    complete: bool


class Controller:
    """One search.

    Parameters
    ----------
    question : Question
        What is searched for.
    oracle : Remembering
        Who answers.
    task : Task
        Where to report; its total is `most_probes`.
    """

    def __init__(self, question: Question, oracle: Remembering, task: Task) -> None:
        self._question = question
        self._oracle = oracle
        self._task = task
        self._most = most_probes(question)
        self._probes = 0
        self._cut: list[str] = []
        self._slower: list[Assignment] = []

    def run(self) -> Answer:
        """Search, and return the best result that was probed."""
        self._task.update(0, "sensitivity of each layer")
        sensitivity = self._oracle.sensitivity()
        accurate: dict[str, str] = {}
        for precision in self._question.precisions:
            accurate |= self._within_budget(precision, accurate, sensitivity[precision])
        found: Assignment = accurate
        clock: Clock | None = None
        if accurate and not self._cut:
            found, clock = self._fastest(accurate)
        self._task.update(self._most, "")
        return Answer(
            assignment=found,
            reasons=self._reasons(found, accurate, clock),
            sensitivity=sensitivity,
            clock=clock,
            probes=self._probes,
            complete=not self._cut,
        )

    # ---------------------------------------------------------------- accuracy

    def _within_budget(
        self, precision: str, taken: Assignment, errors: Mapping[str, float]
    ) -> dict[str, str]:
        """Return as many layers as the budget allows in a precision, beside those that have one."""
        free = [
            layer
            for layer in self._question.layers
            if layer not in taken and self._question.fits(layer, precision)
        ]
        # The sort is stable: of equals the first in the graph counts as the more sensitive.
        free.sort(key=lambda layer: -errors[layer])

        def without(count: int) -> dict[str, str]:
            return dict.fromkeys(free[count:], precision)

        def holds(count: int) -> bool:
            what = f"{len(free) - count} of {len(free)} layers in {precision}"
            return self._holds({**taken, **without(count)}, what)

        low, high = -1, len(free)
        try:
            while high - low > 1:
                # The first probe is often the answer: nothing has to be left out.
                middle = 0 if low < 0 else (low + high) // 2
                low, high = (low, middle) if holds(middle) else (middle, high)
        except OutOfTimeError:
            self._cut.append(precision)
        return without(high)

    def _holds(self, assignment: Assignment, what: str) -> bool:
        self._task.update(self._probes, f"probe {self._probes + 1}: {what}{self._left()}")
        self._probes += 1
        return self._oracle.lost(assignment) <= self._question.budget + TOLERANCE

    def _left(self) -> str:
        """Say how long the search will take at most, by what a probe took so far."""
        each = self._oracle.seconds_each("lost")
        if each is None:
            return ""
        return f", at most {duration(each * max(self._most - self._probes, 1))} left"

    # ---------------------------------------------------------------- latency

    def _fastest(self, accurate: Assignment) -> tuple[Assignment, Clock | None]:
        """Return the fastest of an assignment and those that take some of its layers back."""
        clock = None
        try:
            self._task.update(self._probes, "times of kernels")
            clock = self._oracle.clock()
            if clock is None:
                return accurate, None
            proposals = [
                proposal
                for proposal in self._proposals(accurate, clock)
                if self._holds(proposal, f"{len(proposal)} layers, the slow ones taken back")
            ]
            if not proposals:
                return accurate, clock
            self._task.update(self._probes, "whole networks against each other")
            candidates = [accurate, *proposals]
            best = self._oracle.fastest(candidates)
            self._slower = candidates[:best] + candidates[best + 1 :]
            return candidates[best], clock
        except OutOfTimeError:
            self._cut.append("")
            return accurate, clock

    def _proposals(self, accurate: Assignment, clock: Clock) -> list[dict[str, str]]:
        """Return the cheapest assignments that differ from one that holds, conversions paid or not.

        Not among them is all float: that is what the whole step is measured against.
        """
        order = [*self._question.precisions, FLOAT]
        costs: dict[str, dict[str, float]] = {}
        for node, by_precision in clock.nodes.items():
            allowed = set(by_precision)
            if node in self._question.layers:
                first = order.index(accurate.get(node, FLOAT))
                allowed &= {p for p in order[first:] if p == FLOAT or self._question.fits(node, p)}
            costs[node] = {p: us for p, us in by_precision.items() if p in allowed}
        proposals: list[dict[str, str]] = []
        for borders in (clock.borders, ()):
            labels = cheapest(costs, borders, self._question.same)
            proposal = {
                layer: labels[layer]
                for layer in self._question.layers
                if labels.get(layer, FLOAT) != FLOAT
            }
            if proposal and proposal != accurate and proposal not in proposals:
                proposals.append(proposal)
        return proposals

    # ---------------------------------------------------------------- reasons

    def _reasons(
        self, found: Assignment, accurate: Assignment, clock: Clock | None
    ) -> dict[str, str]:
        """Return why layers do not have the precisions before their own, or float."""
        reasons: dict[str, str] = {}
        for layer in self._question.layers:
            own = found.get(layer, FLOAT)
            missed = [
                f"{precision}: {self._why(layer, precision, own, accurate, clock)}"
                for precision in self._question.precisions[: self._rank(own)]
            ]
            if own != FLOAT and clock is not None:
                missed += self._why_not_float(layer, own, clock)
            if missed:
                reasons[layer] = "; ".join(missed)
        return reasons

    def _rank(self, precision: str) -> int:
        order = (*self._question.precisions, FLOAT)
        return order.index(precision)

    def _why(
        self, layer: str, precision: str, own: str, accurate: Assignment, clock: Clock | None
    ) -> str:
        refusal = self._question.refused.get(precision, {}).get(layer)
        if refusal is not None:
            return refusal
        if self._rank(accurate.get(layer, FLOAT)) > self._rank(precision):
            if precision in self._cut:
                return "the time limit came first"
            return "costs more accuracy than the budget allows"
        times = {} if clock is None else clock.nodes.get(layer, {})
        if clock is None or precision not in times or own not in times:
            return "the whole network is faster without it"
        if times[precision] >= times[own]:
            return f"takes {times[precision]:.1f} us, {own} {times[own]:.1f} us"
        return _with_conversions(layer, precision, own, clock)

    def _why_not_float(self, layer: str, own: str, clock: Clock) -> list[str]:
        """Return what keeps a layer from float although it is faster there, if it is."""
        times = clock.nodes.get(layer, {})
        if own not in times or FLOAT not in times or times[own] <= times[FLOAT]:
            return []
        if any(layer not in other for other in self._slower):
            return [
                f"{FLOAT}: takes {times[FLOAT]:.1f} us, {own} {times[own]:.1f} us, but the whole "
                "network was not faster with it"
            ]
        return [f"{FLOAT}: {_with_conversions(layer, FLOAT, own, clock)}"]


def _with_conversions(layer: str, precision: str, own: str, clock: Clock) -> str:
    """Say that the conversions of a precision eat what it gains."""
    us = sum(border.us for border in clock.borders if layer in (border.left, border.right))
    times = clock.nodes[layer]
    return (
        f"takes {times[precision]:.1f} us and up to {us:.1f} us of conversions, "
        f"{own} {times[own]:.1f} us"
    )


def most_probes(question: Question) -> int:
    """Return how many losses a search asks for at most.

    For each precision ``1 + ceil(log2(n))`` of its ``n`` layers, and two proposals.
    Worked number: 21 layers and one precision: 1 + 5 + 2 = 8.
    """
    fitting = (
        sum(question.fits(layer, precision) for layer in question.layers)
        for precision in question.precisions
    )
    return 2 + sum(1 + math.ceil(math.log2(count)) for count in fitting if count)


def duration(seconds: float) -> str:
    """Return a time for people, such as ``40 s`` or ``3 min``."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
