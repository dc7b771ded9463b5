"""Puts the threads of a measuring process on processors of their own.

Linux wakes a thread where it ran last. Two threads that met on one processor stay there for tens
of milliseconds, and a kernel takes twice as long; a process that runs for some milliseconds at a
time may never be put right. Measured: one of two conditions that alternate between processes, a
factor of two apart, gone once the threads are pinned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def threads_of_process() -> list[int]:
    """Return the ids of this process's threads, the main one first."""
    return sorted(int(name) for name in os.listdir("/proc/self/task"))


def workers(name: str) -> list[int]:
    """Return the ids of the main thread and of the threads of this process with a name."""
    main, *others = threads_of_process()
    return [main, *(thread for thread in others if _name(thread) == name)]


def _name(thread: int) -> str:
    try:
        return Path(f"/proc/self/task/{thread}/comm").read_text(encoding="utf-8").strip()
    except OSError:  # it ended meanwhile
        return ""


def pin(threads: list[int]) -> None:
    """Put each thread on a processor of its own, where there are enough of them.

    Parameters
    ----------
    threads : list of int
        Ids of the threads that share the work, at rest or not.
    """
    processors = sorted(os.sched_getaffinity(0))
    if len(threads) > len(processors):
        return
    for thread, processor in zip(threads, processors, strict=False):
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(thread, {processor})


def pin_all() -> None:
    """Pin every thread of this process: one that was forked to measure has no others."""
    pin(threads_of_process())


@contextmanager
def pinned(threads: list[int]) -> Iterator[None]:
    """Pin some threads of a process that does other things too, for the time of a measurement."""
    before = {thread: os.sched_getaffinity(thread) for thread in threads}
    pin(threads)
    try:
        yield
    finally:
        for thread, processors in before.items():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, processors)
