"""Compare two reports row by row, without taking noise for news."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hone.report import numbers
from hone.report.schema import Latency, Report, StepRow, Verdict

FLOAT = "fp32"
FINAL = "final package"
"""Name of the row that compares what the two builds shipped, whatever its step was called."""


class Change(StrEnum):
    """What became of a row."""

    SAME = "same"
    """The confidence intervals overlap."""
    FASTER = "faster"
    SLOWER = "slower"
    ADDED = "added"
    REMOVED = "removed"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One row of both reports.

    Parameters
    ----------
    name : str
        Of the step.
    change : Change
        Judged by latency.
    old, new : StepRow or None
        The rows; None where a report has none of that name.
    """

    name: str
    change: Change
    old: StepRow | None
    new: StepRow | None

    @property
    def slowdown(self) -> float | None:
        """How much longer the new one takes, as a fraction: 0.05 is 5% slower, -0.05 faster."""
        old, new = _latency(self.old), _latency(self.new)
        if old is None or new is None or old.median == 0:
            return None
        return new.median / old.median - 1

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "name": self.name,
            "change": self.change.value,
            "slowdown": self.slowdown,
            "old": _facts(self.old),
            "new": _facts(self.new),
        }


@dataclass(frozen=True, kw_only=True)
class PrecisionChange:
    """A layer that has another precision in the new final package.

    Parameters
    ----------
    layer : str
        Its id.
    old, new : str
        Precisions.
    reason : str
        Why not a faster one now; empty where the new report does not say.
    """

    layer: str
    old: str
    new: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"layer": self.layer, "old": self.old, "new": self.new, "reason": self.reason}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two reports side by side.

    Parameters
    ----------
    rows : tuple of Difference
        One for each step name in the order of the new report, then the removed ones, then `FINAL`.
    precisions : tuple of PrecisionChange
        In the order of the new report's layers, then those that only the old one names.
    warnings : tuple of str
        Why the two may not be comparable.
    """

    rows: tuple[Difference, ...]
    precisions: tuple[PrecisionChange, ...]
    warnings: tuple[str, ...]

    def slower(self, limit: float) -> list[Difference]:
        """Return the shipped rows that are slower by more than a fraction, outside noise.

        A reverted step is not shipped, so its slowness fails nothing.
        """
        return [
            row
            for row in self.rows
            if row.change is Change.SLOWER
            and row.new is not None
            and row.new.verdict in {Verdict.BASELINE, Verdict.KEPT}
            and (row.slowdown or 0) > limit
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "schema": "hone.report-diff/1",
            "rows": [row.to_json() for row in self.rows],
            "precisions": [change.to_json() for change in self.precisions],
            "warnings": list(self.warnings),
        }


MACHINE = ("cpu", "features", "cores", "governor")
"""Entries of the environment without which two timings cannot be compared."""

COLUMNS = ("step", "change", "old median ms", "new median ms", "slowdown", "top-1", "weights")
RIGHT = "  >>>  "
PRECISION_COLUMNS = ("layer", "old precision", "new precision", "why")


def compare(old: Report, new: Report) -> Comparison:
    """Match the rows of two reports by name."""
    before = {row.name: row for row in old.steps}
    after = {row.name: row for row in new.steps}
    names = [*after, *(name for name in before if name not in after)]
    rows = [_difference(name, before.get(name), after.get(name)) for name in names]
    rows.append(_difference(FINAL, old.final, new.final))
    return Comparison(
        rows=tuple(rows),
        precisions=tuple(_precision_changes(old, new)),
        warnings=tuple(_warnings(old, new)),
    )


def cells(row: Difference) -> tuple[str, ...]:
    """Return one text per column of `COLUMNS`."""
    old, new = row.old, row.new
    return (
        row.name,
        row.change.value,
        numbers.timing(_latency(old)),
        numbers.timing(_latency(new)),
        numbers.NOTHING if row.slowdown is None else f"{100 * row.slowdown:+.1f}%",
        _pair(
            numbers.percentage(old.accuracy if old else None),
            numbers.percentage(new.accuracy if new else None),
        ),
        _pair(
            numbers.size(old.weights_bytes if old else None),
            numbers.size(new.weights_bytes if new else None),
        ),
    )


def precision_cells(change: PrecisionChange) -> tuple[str, ...]:
    """Return one text per column of `PRECISION_COLUMNS`."""
    return (change.layer, change.old, change.new, change.reason)


def _precision_changes(old: Report, new: Report) -> list[PrecisionChange]:
    before, after = _precisions(old), _precisions(new)
    return [
        PrecisionChange(layer=layer, old=one, new=other, reason=reason)
        for layer in dict.fromkeys((*after, *before))
        for one, other, reason in [
            (before.get(layer, (FLOAT, ""))[0], *after.get(layer, (FLOAT, "")))
        ]
        if one != other
    ]


def _precisions(report: Report) -> dict[str, tuple[str, str]]:
    """Return layer → its precision in the final package and why, for layers that a step names."""
    found: dict[str, tuple[str, str]] = {}
    for row in report.steps:
        if row.verdict in (Verdict.KEPT, Verdict.NOT_MEASURED):
            if row.settings.get("kind") == "int8":
                found |= {each.layer: ("int8", "") for each in row.quantized}
            found |= {each.layer: (each.precision, each.reason) for each in row.precisions}
    return found


def _difference(name: str, old: StepRow | None, new: StepRow | None) -> Difference:
    return Difference(name=name, change=_change(old, new), old=old, new=new)


def _change(old: StepRow | None, new: StepRow | None) -> Change:
    if old is None:
        return Change.ADDED
    if new is None:
        return Change.REMOVED
    before, after = old.latency_ms, new.latency_ms
    if before is None or after is None:
        return Change.NOT_MEASURED
    if after.ci95[0] > before.ci95[1]:
        return Change.SLOWER
    if after.ci95[1] < before.ci95[0]:
        return Change.FASTER
    return Change.SAME


def _latency(row: StepRow | None) -> Latency | None:
    return row.latency_ms if row else None


def _facts(row: StepRow | None) -> dict[str, Any] | None:
    if row is None:
        return None
    keys = {"verdict", "accuracy", "weights_bytes", "package_bytes", "latency_ms"}
    return row.model_dump(mode="json", include=keys)


def _pair(old: str, new: str) -> str:
    return new if old == new else f"{old} -> {new}"


def _warnings(old: Report, new: Report) -> list[str]:
    facts = [
        ("model", old.model.sha256[:12], new.model.sha256[:12]),
        ("target", old.target, new.target),
        ("threads", old.threads, new.threads),
        *((name, old.environment.get(name), new.environment.get(name)) for name in MACHINE),
    ]
    return [
        f"{name} differs: {before} and {after}" for name, before, after in facts if before != after
    ]
