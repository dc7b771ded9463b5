"""The search process as its parent sees it: how it is started, heard and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from json import loads
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import journal

LONGEST_TEMPORARY_PATH = 48

LAST_BREATH_S = 2.0
"""How long a child that hung up may take to end (a crash writes its traceback first)."""


class Child:
    """The search process and the pipe to it.

    Parameters
    ----------
    request : dict
        What to search; JSON-able.
    folder : Path
        For the request and its log.
    sockets : Path
        For the fork server's socket: a short path.
    threads : int
        Threads that candidates run on.
    entry : str
        Module whose ``main`` is the search.
    """

    def __init__(
        self,
        request: dict[str, Any],
        folder: Path,
        sockets: Path,
        *,
        threads: int,
        entry: str = "hone.tuning.worker",
    ) -> None:
        ours, theirs = socket.socketpair()
        self._errors = folder / "search.log"
        # A file, not the pipe: a child that never reads must not stop this side.
        order = folder / "request.json"
        order.write_bytes(journal.dumps(request))
        environment = {
            **os.environ,
            "TVM_NUM_THREADS": str(threads),
            # One thread of numpy keeps the fork server single-threaded.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "TMPDIR": str(sockets),
        }
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c"),
                    f"from {entry} import main; main()",
                    str(theirs.fileno()),
                    str(order),
                ],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        theirs.close()
        self.link = Connection(ours.detach())

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None when the child is gone."""
        try:
            message: dict[str, Any] = loads(self.link.recv_bytes())
        except (EOFError, OSError):  # OSError: it was killed in the middle of a message
            return None
        return message

    def acknowledge(self) -> None:
        """Tell the child that everything it said is on the disk."""
        with suppress(ConnectionError):
            self.link.send_bytes(b"{}")

    def kill(self, *, ended: bool) -> str:
        """End the child and everything it started; return how it had ended by itself.

        Parameters
        ----------
        ended : bool
            Whether it hung up: then the system is about to say how it ended.
        """
        if ended:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=LAST_BREATH_S)
        code = self._process.poll()
        # The session's group outlives its leader: forked candidates may still be at work.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if code is None:
            return "was stopped"
        return f"died by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def complaint(self) -> str:
        """Return the last line that the child wrote to its log."""
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "it wrote nothing"


def socket_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder whose path leaves room for the fork server's socket (108 bytes on Linux)."""
    place = tempfile.gettempdir()
    return tempfile.TemporaryDirectory(
        prefix="hone-tune-",
        dir=place if len(place) <= LONGEST_TEMPORARY_PATH else "/tmp",
        ignore_cleanup_errors=True,
    )
