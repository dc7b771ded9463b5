"""The process that runs the whole model, as the search sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from typing import Any

from .confirm import Confirmation
from .whole_model import Candidates, serve

PATIENCE_S = 20.0
"""How long after its deadline an answer may come that is not the last one: a kernel that takes long
to compile is not given up."""


class WholeModel:
    """Starts the model's process, and asks it.

    Whatever goes wrong there costs what it would have said, not the search.

    Parameters
    ----------
    context : ForkServerContext
        Of a warm fork server.
    model : str
        File with the JSON of the scheduled module.
    target : str
        JSON of the TVM target.
    threads : int
        Threads of one run.

    Attributes
    ----------
    failure : str
        Why there is no answer any more; empty as long as there is one.
    """

    def __init__(
        self, context: ForkServerContext, *, model: str, target: str, threads: int
    ) -> None:
        self.failure = ""
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, model, target, threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def _receive(self, deadline: float) -> tuple[str, Any]:
        if self.failure:
            return "failed", None
        try:
            if self._connection.poll(max(deadline - time.monotonic(), 0.0)):
                kind, value = self._connection.recv()
                if kind != "failed":
                    return kind, value
                self.failure = str(value)
            else:
                self.failure = "it took too long"
        except (EOFError, OSError):
            self.failure = "its process died"
        self.close()
        return "failed", None

    def profile(self, deadline: float) -> dict[str, float] | None:
        """Return the seconds that each function takes in one run of the untuned model.

        Parameters
        ----------
        deadline : float
            Monotonic time at which the model is given up.
        """
        kind, value = self._receive(deadline)
        return value if kind == "profile" else None

    def confirm(
        self,
        candidates: Mapping[str, Candidates],
        deadline: float,
        say: Callable[[str], None],
        *,
        decide: bool = True,
    ) -> Confirmation | None:
        """Try candidates inside the model; see `hone.tuning.confirm.confirm`.

        Parameters
        ----------
        candidates : mapping of str to Candidates
            By kernel.
        deadline : float
            Monotonic time of the last answer.
        say : callable
            Is told what is going on.
        decide : bool
            Whether to end with what is to be used.

        Returns
        -------
        Confirmation or None
            None when the time did not suffice, or something went wrong: `failure` says what.
        """
        try:
            self._connection.send((dict(candidates), deadline, decide))
        except OSError:
            self.failure = self.failure or "its process died"
            return None
        while True:
            kind, value = self._receive(deadline if decide else deadline + PATIENCE_S)
            if kind != "say":
                return value if kind == "confirmed" else None
            say(value)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()
