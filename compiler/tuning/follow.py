"""Runs search processes for a session: follows what they say, replaces the lost.

This side owns the clock and SIGINT. Whatever happens to a child, what it measured is kept; the
kernel on which it died or fell silent is quarantined.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path

from hone.errors import HoneError

from .child import Child
from .session import Session

TICK_S = 0.25
"""How often the progress moves while nothing happens."""

START_ATTEMPTS = 2
"""Children that may die before their first kernel; then it is not a kernel's fault."""


@contextmanager
def interrupts() -> Iterator[Connection | None]:
    """Turn SIGINT into something to wait for; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    ours, theirs = socket.socketpair()
    waiting = Connection(ours.detach())
    previous = signal.signal(signal.SIGINT, lambda _signal, _frame: theirs.send(b"\n"))
    try:
        yield waiting
    finally:
        signal.signal(signal.SIGINT, previous)
        waiting.close()
        theirs.close()


def _follow(
    session: Session, child: Child, interrupt: Connection | None, show: Callable[[], None]
) -> str:
    """Write down what a child says until it ends.

    Returns
    -------
    str
        Why it ended: ``done``, ``time``, ``interrupt``, ``hang``, ``died``, or ``late``.
    """
    heard = time.monotonic()
    sources: list[Connection] = [child.link] if interrupt is None else [child.link, interrupt]
    while True:
        show()
        ready = wait(sources, timeout=TICK_S)
        now = time.monotonic()
        if interrupt is not None and interrupt in ready:
            return "interrupt"
        if child.link in ready:
            heard = now
            message = child.receive()
            if message is None:
                return "died"
            session.take(message)
            if message["kind"] == "done":
                return "done"
            if message["kind"] == "batch":
                child.acknowledge()
        if now >= session.last_call:
            return "time"
        if session.is_late(now):
            return "late"
        if now - heard > session.watchdog_s:
            return "hang"


def search(
    session: Session,
    folder: Path,
    sockets: Path,
    interrupt: Connection | None,
    show: Callable[[], None],
) -> bool:
    """Run children until the search is over.

    Parameters
    ----------
    session : Session
        What to search, and where to write it down.
    folder : Path
        For temporary files.
    sockets : Path
        The same, with a short path.
    interrupt : Connection or None
        From `interrupts`.
    show : callable
        Moves the progress.

    Returns
    -------
    bool
        Whether the user interrupted it.

    Raises
    ------
    HoneError
        If children die before they reach a kernel.
    """
    false_starts = 0
    while True:
        session.restart()
        child = Child(session.request(folder), folder, sockets, threads=session.threads)
        ended = False
        try:
            reason = _follow(session, child, interrupt, show)
            ended = reason == "died"
        finally:
            how = child.kill(ended=ended)
        # What the child had said before it was stopped is kept.
        while child.link.poll() and (message := child.receive()) is not None:
            session.take(message)
        child.link.close()
        if reason == "interrupt":
            return True
        if reason in ("done", "time") or time.monotonic() >= session.deadline:
            return False
        if reason == "late":
            session.searched = True
            continue
        if session.searched:
            session.log(f"the records were not tried inside the model: the trial {how}")
            return False
        if reason == "hang":
            how = f"was silent for {session.watchdog_s:g} s"
        if session.current is None:
            false_starts += 1
            if false_starts == START_ATTEMPTS:
                raise HoneError(
                    f"the search {how} before it reached the first kernel: {child.complaint()}",
                    hint="this is a bug in hone; records found before are kept.",
                )
            continue
        session.quarantine(session.current, f"the search {how} while it worked on this kernel")
