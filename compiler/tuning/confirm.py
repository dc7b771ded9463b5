"""Decides which records stay, by clocks inside the running model.

A kernel that runs in a loop of its own finds its weights and inputs in the caches and its threads
awake; between its neighbours it does not. So every record has to beat the untuned kernel once more
inside the model, and all of them together have to make the whole model faster. Nothing here knows
TVM: what runs the model is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from hone.measure import Measurement, Outcome, Speedup

UNTUNED, RECORD = "untuned", "record"
"""The contenders of each kernel's measurement."""

CONFIRMED, ALL = "confirmed", "all"
"""The contenders of the whole model's measurement, beside `UNTUNED`."""

Choice = Mapping[str, int]
"""Kernel to the number of its candidate; a kernel that is missing is untuned."""


class OutOfTime(Exception):  # noqa: N818 - not an error: the records stay unconfirmed
    """What was asked for does not fit into the time that is left."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """The same blocks of runs, seen twice.

    Parameters
    ----------
    typical : Measurement
        The median of each block: what runs took while the machine did what else it did.
    quiet : Measurement
        A low quantile of each block: what they take when it does nothing else. On a busy machine
        a kernel on one thread beats one whose threads wait for a processor, and only there.
    """

    typical: Measurement
    quiet: Measurement

    def faster(self, name: str, *, over: str) -> bool:
        """Say whether a contender is faster when the machine is quiet, and no slower otherwise."""
        return (
            self.quiet.speedup(name, over=over).outcome is Outcome.FASTER
            and self.typical.speedup(name, over=over).outcome is not Outcome.SLOWER
        )


class Stage(Protocol):
    """Something that runs the model with some of its kernels replaced.

    Both methods raise `OutOfTime` when there is not enough of it.
    """

    def kernels(self, choice: Choice) -> Mapping[str, Views]:
        """Time each kernel of a choice in the running model, in turns with the untuned model.

        The contenders are `UNTUNED` and `RECORD`; a sample is all calls of one run. A kernel
        whose candidate could not be built is missing.
        """
        ...

    def whole(self, choices: Mapping[str, Choice]) -> Views:
        """Time whole runs that nobody watches, one contender per choice."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate of one kernel, inside the model.

    Parameters
    ----------
    kernel : str
        Its name.
    candidate : int
        Its number.
    kept : bool
        Whether it is to be used.
    seconds, untuned_s : float
        Of all its calls in one run, with and without the candidate, when the machine is quiet.
    """

    kernel: str
    candidate: int
    kept: bool
    seconds: float
    untuned_s: float

    @property
    def gain(self) -> float:
        """How many times faster than the untuned kernel of the same runs."""
        return self.untuned_s / self.seconds


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The outcome of all trials.

    Parameters
    ----------
    trials : tuple of Trial
        What was tried; the first candidates of all kernels before the second ones.
    speedup : Speedup or None
        Of the whole model with the kept candidates over the untuned one, when the machine is
        quiet; None when none is kept.
    """

    trials: tuple[Trial, ...]
    speedup: Speedup | None


def _trial(kernel: str, candidate: int, views: Views) -> Trial:
    return Trial(
        kernel=kernel,
        candidate=candidate,
        kept=views.faster(RECORD, over=UNTUNED),
        seconds=views.quiet.latency(RECORD).median_ms * 1e-3,
        untuned_s=views.quiet.latency(UNTUNED).median_ms * 1e-3,
    )


def confirm(
    stage: Stage, candidates: Mapping[str, int], say: Callable[[str], None]
) -> Confirmation:
    """Try candidates inside the model.

    Each kernel's best candidate is timed inside the model in turns with the untuned kernel, then
    the second one, and so on, while time permits: the order in isolation is not the order there.
    Of those that are faster outside noise the fastest is chosen. At last the whole model is timed
    with the chosen ones, and with every kernel's best one, since an instrument that watches
    kernels of a microsecond disturbs them. What makes the whole model faster outside noise stays;
    otherwise nothing does.

    Parameters
    ----------
    stage : Stage
        Runs the model.
    candidates : mapping of str to int
        How many candidates each kernel has, best first.
    say : callable
        Is told what is going on.

    Returns
    -------
    Confirmation

    Raises
    ------
    OutOfTime
        The time does not suffice for any conclusion.
    """
    trials: dict[tuple[str, int], Trial] = {}
    chosen: dict[str, int] = {}
    best: dict[str, int] = {}
    for number in range(max(candidates.values(), default=0)):
        trying = {kernel: number for kernel, count in candidates.items() if count > number}
        say(f"trying the records of {len(trying)} kernels inside the model, rank {number + 1}")
        try:
            measured = stage.kernels({**chosen, **trying})
        except OutOfTime:
            if not number:
                raise
            say("no time is left for records of this rank")
            break
        for kernel in trying:
            if kernel not in measured:
                continue
            trials[kernel, number] = trial = _trial(kernel, number, measured[kernel])
            if kernel not in best or trial.gain > trials[kernel, best[kernel]].gain:
                best[kernel] = number
            if trial.kept and (
                kernel not in chosen or trial.gain > trials[kernel, chosen[kernel]].gain
            ):
                chosen[kernel] = number
    say("comparing the whole models")
    everything = {**best, **chosen}
    choices: dict[str, Choice] = {UNTUNED: {}}
    if chosen:
        choices[CONFIRMED] = chosen
    if everything and everything != chosen:
        choices[ALL] = everything
    winner, speedup = _best(stage.whole(choices)) if len(choices) > 1 else (UNTUNED, None)
    used = choices[winner]
    return Confirmation(
        trials=tuple(
            Trial(
                kernel=kernel,
                candidate=candidate,
                kept=used.get(kernel) == candidate,
                seconds=trial.seconds,
                untuned_s=trial.untuned_s,
            )
            for (kernel, candidate), trial in trials.items()
        ),
        speedup=speedup,
    )


def _best(views: Views) -> tuple[str, Speedup | None]:
    """Return the contender to keep: the confirmed one unless another is faster outside noise."""
    faster = [
        name for name in views.quiet.seconds if name != UNTUNED and views.faster(name, over=UNTUNED)
    ]
    if not faster:
        return UNTUNED, None
    winner = faster[0]
    if len(faster) > 1 and views.faster(ALL, over=CONFIRMED):
        winner = ALL
    return winner, views.quiet.speedup(winner, over=UNTUNED)
