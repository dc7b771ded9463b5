"""An append-only file of JSON lines that survives a kill at any moment, and its writer's lock.

Reading never changes a file: another process may be in the middle of an append. Repairing is the
writer's business, under the lock. Nothing here knows what the lines mean, or imports TVM.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.errors import ToolchainError, UsageError


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a journal holds.

    Parameters
    ----------
    values : tuple
        The value of each line; None where a line in the middle could not be read, so that
        positions stay what they were.
    warnings : tuple of str
        What was dropped.
    torn : bool
        Whether the file has to be repaired before the next append.
    """

    values: tuple[Any, ...]
    warnings: tuple[str, ...]
    torn: bool


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # covers bad UTF-8 as well
        return None


def read(path: Path) -> Contents:
    """Read every complete line; a missing file is an empty one.

    Parameters
    ----------
    path : Path
        The journal.

    Returns
    -------
    Contents
        A last line that was cut short by a crash is left out, with a warning.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    *lines, tail = data.split(b"\n")
    values = [_parse(line) for line in lines]
    warnings = [
        f"{path}: line {number} is not readable and is ignored."
        for number, value in enumerate(values, start=1)
        if value is None
    ]
    if tail:
        # An array or an object that parses is whole: only its newline is missing.
        value = _parse(tail)
        if value is None:
            warnings.append(
                f"{path}: the last line was cut short, and its {len(tail)} bytes are dropped."
            )
        else:
            values.append(value)
    return Contents(values=tuple(values), warnings=tuple(warnings), torn=bool(tail))


def dumps(value: Any) -> bytes:
    """Return the bytes of one line, without its newline.

    Parameters
    ----------
    value : Any
        JSON-able.

    Returns
    -------
    bytes
        The same for equal values, whatever the order of their keys.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rewrite(path: Path, values: Sequence[Any]) -> None:
    """Replace a journal in one step: readers see the old file or the new one.

    Parameters
    ----------
    path : Path
        The journal.
    values : sequence
        Its lines from now on.
    """
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as stream:
        stream.writelines(dumps(value) + b"\n" for value in values)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)
    _sync_folder(path.parent)


class Appender:
    """The open end of a journal; each line is on the disk when :meth:`append` returns.

    Parameters
    ----------
    path : Path
        The journal, whose last line is whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        created = not path.exists()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if created:
            _sync_folder(path.parent)

    def append(self, value: Any) -> None:
        """Write one line and wait for the disk.

        Parameters
        ----------
        value : Any
            JSON-able.

        Raises
        ------
        ToolchainError
            If the disk is full or fails; the file is as it was.
        """
        data = dumps(value) + b"\n"
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, before)
            raise ToolchainError(
                f"a tuning record could not be written: {error.strerror}.",
                where=str(self._path),
                hint="make room, and run the same command again: what was written is kept.",
            ) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a folder's only writer's place; the system frees it when the process dies.

    Parameters
    ----------
    path : Path
        The lock file; created, and never removed, since removing it would race.

    Raises
    ------
    UsageError
        If another process holds it; the message says which.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 4096, 0).decode(errors="replace").strip()
            raise UsageError(
                f"another process is writing this tuning database: {holder or 'it is starting'}.",
                where=str(path.parent),
                hint="wait for it, stop it, or tune into another folder.",
            ) from None
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} ({command})\n".encode(), 0)
        yield
    finally:
        os.close(handle)
