"""Every error that hone raises for its user, with the exit code of the command line.

A leaf: it imports nothing, so that ``targets``, ``passes`` and ``compiler`` may all raise from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class HoneError(Exception):
    """An error that the user can act on.

    Parameters
    ----------
    message : str
        What was required and what was given, in one or more full sentences.
    where : str, optional
        The file, node, layer or key that it is about.
    hint : str, optional
        What to do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class UsageError(HoneError):
    """A wrong option, recipe, shape or data argument (exit 2)."""

    exit_code = 2


class ModelError(HoneError):
    """The model is invalid or unsupported (exit 3).

    Parameters
    ----------
    problems : sequence of str
        *All* problems found, one line each, with the node's name.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        problems: Sequence[str] = (),
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(message + lines, where=where, hint=hint)


class AccuracyError(HoneError):
    """A parity or accuracy gate failed (exit 4)."""

    exit_code = 4


class PerformanceError(HoneError):
    """A performance gate failed (exit 5)."""

    exit_code = 5


class ToolchainError(HoneError):
    """The environment lacks something: a linker, an extra, a GPU (exit 6)."""

    exit_code = 6


class DeviceError(HoneError):
    """A device could not be reached or failed (exit 7)."""

    exit_code = 7


class PackageError(HoneError):
    """A package is corrupt, or cannot run on this machine (exit 8)."""

    exit_code = 8


class LockedError(HoneError):
    """``--locked``, and a tuning record is missing (exit 9)."""

    exit_code = 9


class BudgetError(HoneError):
    """A size or memory budget is exceeded (exit 10)."""

    exit_code = 10


class OutOfTimeError(HoneError):
    """The time budget ran out; what was reached is kept (exit 11)."""

    exit_code = 11


class InterruptError(HoneError):
    """The user interrupted; everything measured is saved (exit 130)."""

    exit_code = 130
