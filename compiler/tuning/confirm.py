"""Decides which records stay, by clocks inside the running model.

A kernel that runs in a loop of its own finds its weights and inputs in the caches and its threads
awake; between its neighbours it does not. So every record has to beat the untuned kernel once more
inside the model, and all of them together must not make the whole model slower. Nothing here knows
TVM: what runs the model is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from hone.measure import LEAST_ROUNDS, Measurement, Speedup

UNTUNED, RECORD = "untuned", "record"
"""The contenders of each kernel's measurement."""

LEAST_GAIN = 1.005
"""What is less is not worth a decision: clocks around each kernel show it, nobody else."""

HOPELESS = 0.97
"""When no round of the first few was better than this, no further ones are needed."""

NARROW = 1.005
"""Ratio of the ends of an interval that more rounds would hardly make narrower."""

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
        quiet = self.quiet.speedup(name, over=over)
        typical = self.typical.speedup(name, over=over)
        shown = quiet.rounds >= LEAST_ROUNDS and quiet.ci95[0] > 1 and quiet.ratio > LEAST_GAIN
        return shown and typical.ci95[1] >= 1

    def slower(self, name: str, *, over: str) -> bool:
        """Say whether a contender is slower beyond noise."""
        quiet = self.quiet.speedup(name, over=over)
        limit = 1 / LEAST_GAIN if quiet.rounds >= LEAST_ROUNDS else HOPELESS
        return quiet.ci95[1] < limit

    def settled(self, name: str, *, over: str) -> bool:
        """Say whether more rounds would hardly change what `faster` says."""
        quiet = self.quiet.speedup(name, over=over)
        low, high = quiet.ci95
        if quiet.rounds < LEAST_ROUNDS:
            return high < HOPELESS
        return low > LEAST_GAIN or high < LEAST_GAIN or high / low < NARROW


class Stage(Protocol):
    """Something that runs the model with some of its kernels replaced.

    All methods raise `OutOfTime` when there is not enough of it.
    """

    def kernels(self, choice: Choice) -> Mapping[str, Views]:
        """Time each kernel of a choice in the running model, in turns with the untuned model.

        The contenders are `UNTUNED` and `RECORD`; a sample is all calls of one run. A kernel
        whose candidate could not be built is missing.
        """
        ...

    def right(self, choice: Choice) -> bool:
        """Say whether the model computes what the untuned one does."""
        ...

    def pair(self, before: Choice, after: Choice) -> Views:
        """Time the calls in which two choices differ and those behind them, in turns.

        The contenders are `UNTUNED`, with the choice before, and `RECORD`.
        """
        ...

    def whole(self, choices: Mapping[str, Choice]) -> Views:
        """Time whole runs, one contender per choice."""
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

    @property
    def saved_s(self) -> float:
        """Seconds less in one run."""
        return self.untuned_s - self.seconds


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
    stage: Stage,
    candidates: Mapping[str, int],
    say: Callable[[str], None],
    *,
    decide: bool = True,
) -> Confirmation:
    """Try candidates inside the model.

    Each kernel's first candidate is timed inside the model in turns with the untuned kernel, then
    the second one, and so on, while time permits: the order in isolation is not the order there.
    The fastest one of each kernel is tried once more, without those of other kernels, together
    with the calls behind it, until it is clear whether it is faster. At last the whole model is
    timed: what has made its kernels faster stays unless it makes the whole slower; while it does,
    the candidate that saved least goes.

    Parameters
    ----------
    stage : Stage
        Runs the model.
    candidates : mapping of str to int
        How many candidates each kernel has, best first.
    say : callable
        Is told what is going on; nothing where it goes on as before.
    decide : bool
        Whether to end with what is to be used; else all that seem faster are kept.

    Returns
    -------
    Confirmation

    Raises
    ------
    OutOfTime
        The time does not suffice for any conclusion.
    """
    trials: dict[tuple[str, int], Trial] = {}
    best: dict[str, Trial] = {}
    ranks = max(candidates.values(), default=0)
    if decide:
        say(
            f"trying up to {ranks} candidates of each of {len(candidates)} kernels inside the model"
        )
    for number in range(ranks):
        trying = {kernel: number for kernel, count in candidates.items() if count > number}
        say("")
        try:
            measured = stage.kernels(trying)
        except OutOfTime:
            if not number:
                raise
            say(f"no time is left for candidates of rank {number + 1} and behind")
            break
        for kernel in trying:
            if kernel not in measured:
                continue
            trials[kernel, number] = trial = _trial(kernel, number, measured[kernel])
            if trial.gain > max(LEAST_GAIN, best[kernel].gain if kernel in best else 0.0):
                best[kernel] = trial
    if not decide:
        return Confirmation(trials=tuple(trials.values()), speedup=None)
    found, untried = _alone(stage, best, say)
    used, speedup = _settled(stage, found, say)
    return Confirmation(
        trials=tuple(
            replace(trial, kept=kernel in used and used[kernel].candidate == candidate)
            for (kernel, candidate), trial in trials.items()
            if trial not in untried
        ),
        speedup=speedup,
    )


def _alone(
    stage: Stage, best: Mapping[str, Trial], say: Callable[[str], None]
) -> tuple[dict[str, Trial], list[Trial]]:
    """Return the candidates that are faster on top of one another, the calls behind included.

    And those for which no time was left, on which there is no verdict.
    """
    used: dict[str, Trial] = {}
    if best:
        say(f"trying the faster candidates of {len(best)} kernels one by one")
    ordered = sorted(best.items(), key=lambda item: -item[1].saved_s)
    for number, (kernel, trial) in enumerate(ordered):
        before = {name: other.candidate for name, other in used.items()}
        say("")
        if not stage.right({kernel: trial.candidate}):
            say(f"candidate {trial.candidate + 1} of kernel {kernel} computes something else")
            continue
        try:
            measured = stage.pair(before, {**before, kernel: trial.candidate})
        except OutOfTime:
            untried = [other for _, other in ordered[number:]]
            say(f"no time is left to try the candidates of {len(untried)} kernels")
            return used, untried
        if measured.faster(RECORD, over=UNTUNED):
            used[kernel] = trial
    return used, []


def _settled(
    stage: Stage, used: dict[str, Trial], say: Callable[[str], None]
) -> tuple[dict[str, Trial], Speedup | None]:
    """Return what does not make the whole model slower, and its speedup."""
    slower = False
    while used:
        if not slower:
            say("comparing the whole models")
        choice = {kernel: trial.candidate for kernel, trial in used.items()}
        try:
            measured = stage.whole({UNTUNED: {}, RECORD: choice})
        except OutOfTime:
            if not slower:
                raise
            break
        if not measured.slower(RECORD, over=UNTUNED):
            return used, measured.quiet.speedup(RECORD, over=UNTUNED)
        slower = True
        weakest = min(used, key=lambda kernel: used[kernel].saved_s)
        used = {kernel: trial for kernel, trial in used.items() if kernel != weakest}
    return {}, None
