"""Decides which kernel the search works on next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FLOPS_PER_S = 2e10
BYTES_PER_S = 1e10
"""A roofline of one middling core: it only orders the kernels until they have been timed."""

STALE = 0.5
"""What a kernel's claim is multiplied by for each batch that brought it nothing."""

WORTH_NOTING = 0.99
"""A batch counts as progress when it makes a kernel at least this much faster."""


def estimate_s(flops: float, moved_bytes: float) -> float:
    """Return a guess of a kernel's time: ``flops / FLOPS_PER_S + bytes / BYTES_PER_S``.

    Parameters
    ----------
    flops : float
        Operations.
    moved_bytes : float
        Size of all arguments.
    """
    return flops / FLOPS_PER_S + moved_bytes / BYTES_PER_S


UNTRIED = 4.0
"""What the claim of a kernel without a turn is multiplied by where shares of the model are known:
the first candidates, those of the templates, bring the most."""


@dataclass
class _Claim:
    seconds: float
    calls: int
    model_s: float | None = None
    first_s: float | None = None
    measured: bool = False
    batches: int = 0
    stale: int = 0
    done: bool = False

    def share(self) -> float:
        if self.model_s is None:
            return self.seconds * self.calls
        return self.model_s * (self.seconds / self.first_s if self.first_s else 1.0)


class Order:
    """Turns of the kernels: by the time that is at stake.

    A kernel's claim is ``time x calls x 0.5^stale / turns`` (the highest averages method, with a
    penalty for batches that found nothing better); the largest claim is next. Where the kernels
    were timed inside the model, that is the time, less what candidates have saved since; a kernel
    without a turn claims `UNTRIED` times as much. Otherwise each gets one early. Deterministic.

    Parameters
    ----------
    estimates_s : sequence of float
        Guess of each kernel's seconds per call.
    calls : sequence of int
        How often the model calls it.
    model_s : sequence of float, optional
        Seconds of all calls of each in one run of the untuned model.
    """

    def __init__(
        self,
        estimates_s: Sequence[float],
        calls: Sequence[int],
        model_s: Sequence[float] | None = None,
    ) -> None:
        self._measured = model_s is not None
        shares = model_s if model_s is not None else [None] * len(calls)
        self._claims = [
            _Claim(seconds=seconds, calls=count, model_s=share)
            for seconds, count, share in zip(estimates_s, calls, shares, strict=True)
        ]

    def next(self) -> int | None:
        """Return the kernel whose turn it is; None when all are done."""
        alive = [i for i, claim in enumerate(self._claims) if not claim.done]
        if not alive:
            return None
        fresh = [i for i in alive if self._claims[i].batches == 0]
        if fresh and not self._measured:
            return max(fresh, key=lambda i: (self._claims[i].share(), -i))

        def claim(i: int) -> float:
            kernel = self._claims[i]
            return kernel.share() * STALE**kernel.stale / (kernel.batches or 1 / UNTRIED)

        return max(alive, key=lambda i: (claim(i), -i))

    def timed(self, kernel: int, seconds: float) -> bool:
        """Note a measured time of a kernel.

        Parameters
        ----------
        kernel : int
            Its position.
        seconds : float
            Per call.

        Returns
        -------
        bool
            Whether it is its best one so far, by more than noise.
        """
        claim = self._claims[kernel]
        better = not claim.measured or seconds < WORTH_NOTING * claim.seconds
        claim.seconds = min(seconds, claim.seconds) if claim.measured else seconds
        claim.first_s = claim.first_s or seconds
        claim.measured = True
        return better

    def turned(self, kernel: int, *, progress: bool) -> None:
        """Note the end of a kernel's turn.

        Parameters
        ----------
        kernel : int
            Its position.
        progress : bool
            Whether the turn made it faster.
        """
        claim = self._claims[kernel]
        claim.batches += 1
        claim.stale = 0 if progress else claim.stale + 1

    def finish(self, kernel: int) -> None:
        """Give a kernel no more turns: its search space is exhausted."""
        self._claims[kernel].done = True
