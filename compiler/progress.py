"""Live progress on stderr: bars on a terminal, a heartbeat line otherwise, never a byte on stdout.

Library code takes a `Progress` and reports to it; only the command line makes a `console` one.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    import rich.console
    import rich.progress

HEARTBEAT_S = 5.0
"""Seconds between two heartbeat lines: well under the output time-outs of CI services."""

BAR_REFRESH_HZ = 4.0
"""Redraws per second: each one takes a core for a moment, while kernels may be being measured."""


class Task(Protocol):
    """One piece of work that is under way."""

    def update(self, completed: float | None = None, detail: str | None = None) -> None:
        """Say how far the task is.

        Parameters
        ----------
        completed : float, optional
            Units done so far, in the units of the task's total.
        detail : str, optional
            A few words, such as ``best 0.41 ms``; replaces the previous ones.
        """


class Progress(Protocol):
    """Where library code reports to."""

    def task(self, label: str, total: float | None = None) -> AbstractContextManager[Task]:
        """Open a task; tasks may nest.

        Parameters
        ----------
        label : str
            What is being done.
        total : float, optional
            Units of work; None when nobody knows.
        """

    def log(self, message: str) -> None:
        """Print one line that stays."""


def silent() -> Progress:
    """Return a progress that shows nothing."""
    return _Silent()


def console(stream: TextIO | None = None) -> Progress:
    """Return a progress for people: bars on a terminal, otherwise a line now and then.

    Parameters
    ----------
    stream : TextIO, optional
        Where it writes; standard error when not given.
    """
    stream = stream or sys.stderr
    if stream.isatty():
        from rich.console import Console

        return _Bars(Console(file=stream, highlight=False))
    return _Heartbeat(stream)


class _Silent:
    def update(self, completed: float | None = None, detail: str | None = None) -> None:
        """Show nothing."""

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Task]:
        yield self

    def log(self, message: str) -> None:
        """Show nothing."""


class _Bar:
    def __init__(self, bars: rich.progress.Progress, key: rich.progress.TaskID) -> None:
        self._bars = bars
        self._key = key

    def update(self, completed: float | None = None, detail: str | None = None) -> None:
        self._bars.update(self._key, completed=completed)
        if detail is not None:
            self._bars.update(self._key, detail=detail)


class _Bars:
    """Rich bars, one for each open task, the nested ones below and indented."""

    def __init__(self, terminal: rich.console.Console) -> None:
        from rich import progress
        from rich.table import Column

        self._terminal = terminal
        self._open = 0
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn(
                "{task.fields[detail]}",
                style="dim",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True),
            ),
            console=terminal,
            refresh_per_second=BAR_REFRESH_HZ,
            transient=True,
        )

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Task]:
        if self._open == 0:
            self._bars.start()
        key = self._bars.add_task("  " * self._open + label, total=total, detail="")
        self._open += 1
        try:
            yield _Bar(self._bars, key)
        finally:
            self._open -= 1
            self._bars.remove_task(key)
            if self._open == 0:
                self._bars.stop()

    def log(self, message: str) -> None:
        self._terminal.print(message, markup=False, soft_wrap=True)


class _Line:
    """A task shown by lines: what its next heartbeat says."""

    def __init__(self, owner: _Heartbeat, label: str, total: float | None, now: float) -> None:
        self._owner = owner
        self._total = total
        self._completed: float | None = None
        self._detail = ""
        self.label = label
        self.started = now

    def update(self, completed: float | None = None, detail: str | None = None) -> None:
        if completed is not None:
            self._completed = completed
        if detail is not None:
            self._detail = detail
        self._owner.beat()

    def state(self) -> str:
        parts = []
        if self._completed is not None:
            done = f"{self._completed:g}"
            parts.append(f"{done}/{self._total:g}" if self._total is not None else done)
        if self._detail:
            parts.append(self._detail)
        return ", ".join(parts)


class _Heartbeat:
    """Lines at the start and the end of each task, and every `HEARTBEAT_S` between them."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._lock = threading.RLock()
        self._open: list[_Line] = []
        self._last = clock()
        self._stop: threading.Event | None = None

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Task]:
        with self._lock:
            line = _Line(self, label, total, self._clock())
            self._open.append(line)
            self._write(f"{self._path()} ...")
            if self._stop is None:
                self._stop = threading.Event()
                threading.Thread(target=self._run, args=(self._stop,), daemon=True).start()
        end = "stopped"
        try:
            yield line
            end = "done"
        finally:
            with self._lock:
                state = line.state()
                took = f"{end} after {self._clock() - line.started:.1f} s"
                self._write(f"{self._path()}: {took}" + (f" ({state})" if state else ""))
                self._open.remove(line)
                if not self._open and self._stop is not None:
                    self._stop.set()
                    self._stop = None

    def log(self, message: str) -> None:
        with self._lock:
            self._write(message)

    def beat(self) -> None:
        """Write where the innermost task is, unless something was written a moment ago."""
        with self._lock:
            if not self._open or self._clock() - self._last < HEARTBEAT_S:
                return
            line = self._open[-1]
            state = line.state()
            elapsed = f"{self._clock() - line.started:.0f} s"
            self._write(f"{self._path()}: {elapsed}" + (f", {state}" if state else ""))

    def _run(self, stop: threading.Event) -> None:
        # A task that does not report (one long call into the compiler) still has a heartbeat.
        while not stop.wait(HEARTBEAT_S):
            self.beat()

    def _path(self) -> str:
        return " > ".join(line.label for line in self._open)

    def _write(self, text: str) -> None:
        self._last = self._clock()
        # Work must not fail because its audience left.
        with suppress(BrokenPipeError):
            self._stream.write(text + "\n")
            self._stream.flush()
