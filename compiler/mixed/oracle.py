"""Who answers what a mixed precision search asks, and a memory in front of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .partition import Border
from .state import State

Assignment = Mapping[str, str]
"""Layer → precision; a layer that is missing stays in float."""

FLOAT = "fp32"


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What layers cost in time.

    Parameters
    ----------
    nodes : mapping of str to mapping of str to float
        Node → precision → microseconds. Nodes are the layers, and what stands between them.
    borders : tuple of Border
        Tensors between nodes, with the time of a conversion.
    """

    nodes: Mapping[str, Mapping[str, float]]
    borders: tuple[Border, ...]


class Oracle(Protocol):
    """Answers by compiling, running and timing; each answer is expensive."""

    def sensitivity(self) -> Mapping[str, Mapping[str, float]]:
        """Return precision → layer → output error where only this layer has that precision."""

    def lost(self, assignment: Assignment) -> float:
        """Return the loss of an assignment on the evaluation data, in the budget's unit."""

    def clock(self) -> Clock | None:
        """Return what layers cost in time; None where time cannot be, or need not be, measured."""

    def fastest(self, assignments: Sequence[Assignment]) -> int:
        """Return which one of several is fastest; the first unless another is, outside noise."""


class OutOfTimeError(Exception):
    """The time limit leaves no room for one more answer."""


class Remembering:
    """An oracle that is asked every question once, in this process or in one before.

    Parameters
    ----------
    oracle : Oracle
        Who knows.
    state : State
        What was answered.
    seconds : float or None
        Time limit of this process's answers: after the first, none is asked for that would end
        after it. One is always asked for, so that every build gets on.
    now : callable, optional
        A clock in seconds.
    """

    def __init__(
        self,
        oracle: Oracle,
        state: State,
        *,
        seconds: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._oracle = oracle
        self._state = state
        self._now = now
        self._end = None if seconds is None else now() + seconds
        self._answered = False

    def sensitivity(self) -> dict[str, dict[str, float]]:
        """As `Oracle.sensitivity`."""
        found: dict[str, dict[str, float]] = self._ask(
            ["sensitivity"],
            lambda: {name: dict(by) for name, by in self._oracle.sensitivity().items()},
        )
        return found

    def lost(self, assignment: Assignment) -> float:
        """As `Oracle.lost`.

        Raises
        ------
        OutOfTimeError
            The answer would come after the time limit.
        """
        question = ["lost", dict(sorted(assignment.items()))]
        return float(self._ask(question, lambda: self._oracle.lost(assignment)))

    def clock(self) -> Clock | None:
        """As `Oracle.clock`."""

        def answer() -> dict[str, Any]:
            found = self._oracle.clock()
            if found is None:
                return {}
            borders = [[border.left, border.right, border.us] for border in found.borders]
            return {"nodes": {n: dict(by) for n, by in found.nodes.items()}, "borders": borders}

        stored = self._ask(["clock"], answer)
        if not stored:
            return None
        return Clock(
            nodes=stored["nodes"],
            borders=tuple(Border(left=a, right=b, us=us) for a, b, us in stored["borders"]),
        )

    def fastest(self, assignments: Sequence[Assignment]) -> int:
        """As `Oracle.fastest`."""
        question = ["fastest", [dict(sorted(each.items())) for each in assignments]]
        return int(self._ask(question, lambda: self._oracle.fastest(assignments)))

    def seconds_each(self, kind: str) -> float | None:
        """Return the mean time of an answer of a kind; None where there is none yet."""
        times = self._state.seconds(kind)
        return sum(times) / len(times) if times else None

    def _ask(self, question: list[Any], answer: Callable[[], Any]) -> Any:
        known = self._state.recall(question)
        if known is not None:
            return known
        started = self._now()
        expected = started + (self.seconds_each(question[0]) or 0)
        if self._answered and self._end is not None and expected > self._end:
            raise OutOfTimeError
        found = answer()
        self._answered = True
        self._state.keep(question, found, seconds=self._now() - started)
        return found
