"""Clocks for versions of a model: in turns, each round in other memory, until it is clear.

A round runs one block of each version; ratios are taken round by round. Two loads of one package
differ by 2 to 5%, since their pages lie elsewhere: so all tensors move between rounds. A kernel's
own clock shows a gain of 3% of it, which the whole run would hide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher

import numpy as np

from hone.measure import LEAST_ROUNDS, Measurement, Rounds

from .confirm import OutOfTime, Views
from .versions import Version, Versions

BLOCK_S = 0.01
"""Length of one block of runs."""

MEASURE_S = 8.0
MEASURE_SHARE = 0.25
"""How long a comparison may take: this, or a share of the time that is left."""

PROFILE_S = 0.5

PROBES = 5
"""Runs that tell how long one takes."""

SCREEN_ROUNDS = 12
"""Of a comparison that only ranks."""

QUIET = 0.1
"""Quantile of a block's runs that shows a quiet machine."""

RUNS = (3, 200)
ROUNDS = (LEAST_ROUNDS, 60)
"""Least and most runs of a block, and rounds of a comparison."""

FIRST_LOOK = 3
LOOKS = 1.5
"""A comparison is looked at after so many rounds, after the least that decide something, and then
each time that there are so many times more: the more looks, the more differences by chance."""


def plan(run_s: float, contenders: int, seconds: float) -> Rounds:
    """Return how often to run contenders in turns, in about a given time.

    Parameters
    ----------
    run_s : float
        Seconds of one run.
    contenders : int
        How many there are.
    seconds : float
        The time; the least numbers of runs and rounds may take longer.
    """
    runs = min(max(int(BLOCK_S / run_s), RUNS[0]), RUNS[1])
    warmup = 1 + runs // 4
    block_s = (runs + warmup) * run_s
    rounds = min(max(int(seconds / (contenders * block_s)), ROUNDS[0]), ROUNDS[1])
    return Rounds(rounds=rounds, runs=runs + warmup, warmup=warmup)


def probe(version: Version) -> float:
    """Return the seconds of one run."""
    return float(np.median(version.clock(Rounds(rounds=1, runs=PROBES + 1, warmup=1))))


def call_times(versions: Versions, version: Version, run_s: float) -> np.ndarray:
    """Return ``[calls]``: seconds of each call of a run, the median over rounds."""
    rounds = plan(run_s, 1, PROFILE_S)
    medians = []
    for _ in range(rounds.rounds):
        versions.move([version])
        medians.append(np.median(version.watch(rounds), axis=0))
    return np.asarray(np.median(medians, axis=0))


def kernel_times(versions: Versions, version: Version, run_s: float) -> dict[str, float]:
    """Return the seconds of all calls of each kernel in one run."""
    found: dict[str, float] = {}
    for name, seconds in zip(version.calls, call_times(versions, version, run_s), strict=True):
        found[name] = found.get(name, 0.0) + float(seconds)
    return found


def differing(one: Version, other: Version) -> tuple[list[int], list[int]]:
    """Return the calls in which two versions differ, and the call behind each such part.

    The next kernel reads what the changed one wrote: where its threads share the rows in another
    way, what they read lies in the cache of the other core.

    Returns
    -------
    tuple of list of int
        Positions in the calls of each; both empty where the versions are the same.
    """
    columns: tuple[set[int], set[int]] = (set(), set())
    matcher = SequenceMatcher(None, one.codes, other.codes, autojunk=False)
    for tag, begin, end, first, last in matcher.get_opcodes():
        if tag != "equal":
            columns[0].update(range(begin, min(end + 1, len(one.codes))))
            columns[1].update(range(first, min(last + 1, len(other.codes))))
    return sorted(columns[0]), sorted(columns[1])


def least_s(run_s: float, contenders: int) -> float:
    """Return the seconds that the shortest comparison takes."""
    rounds = plan(run_s, contenders, 0.0)
    return contenders * rounds.rounds * rounds.runs * run_s


def fitting(run_s: float, contenders: int, deadline: float) -> tuple[Rounds, float]:
    """Return the rounds of a comparison that fits into the time that is left, and its end.

    Raises
    ------
    OutOfTime
        None does.
    """
    now = time.monotonic()
    left = deadline - now
    seconds = min(MEASURE_S, left * MEASURE_SHARE)
    rounds = plan(run_s, contenders, seconds)
    if least_s(run_s, contenders) > left:
        raise OutOfTime
    return rounds, now + seconds


def interleave(
    blocks: Mapping[str, Callable[[Rounds], np.ndarray]],
    run_s: float,
    deadline: float,
    *,
    move: Callable[[], None] | None = None,
    settled: Callable[[Mapping[str, list[np.ndarray]]], bool] | None = None,
) -> dict[str, list[np.ndarray]]:
    """Return the block of each round of each contender, measured in turns.

    A busy machine may slow down a thousandfold: after the least number of rounds the clock ends
    them.

    Parameters
    ----------
    blocks : mapping of str to callable
        Runs one block of a contender.
    run_s : float
        Seconds of a run.
    deadline : float
        Monotonic time.
    move : callable, optional
        Called before each round.
    settled : callable, optional
        Says of what was measured whether more rounds would change nothing.

    Raises
    ------
    OutOfTime
        The deadline came too early for a comparison.
    """
    rounds, end = fitting(run_s, len(blocks), deadline)
    samples: dict[str, list[np.ndarray]] = {name: [] for name in blocks}
    names = list(blocks)
    look = FIRST_LOOK
    for number in range(ROUNDS[1]):
        now = time.monotonic()
        if now > deadline and number < ROUNDS[0]:
            raise OutOfTime
        if now > end and number >= ROUNDS[0]:
            break
        if number == look and settled is not None:
            if settled(samples):
                break
            look = max(ROUNDS[0], int(look * LOOKS))
        if move is not None:
            move()
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(blocks[name](rounds))
    return samples


def compare(
    versions: Versions,
    contenders: Mapping[str, Version],
    run_s: float,
    deadline: float,
    *,
    columns: Mapping[str, Sequence[int]] | None = None,
) -> Views:
    """Time versions of a model in turns, until it is clear which of two is faster.

    Parameters
    ----------
    versions : Versions
        Loaded them.
    contenders : mapping of str to Version
        The first one is what the others have to beat.
    run_s : float
        Seconds of a run.
    deadline : float
        Monotonic time.
    columns : mapping of str to sequence of int, optional
        The calls of each that count, see `differing`; whole runs when not given.

    Raises
    ------
    OutOfTime
        The deadline came too early for a comparison.
    """
    over, *others = contenders

    def block(name: str, version: Version) -> Callable[[Rounds], np.ndarray]:
        if columns is None:
            return version.clock
        wanted = list(columns[name])
        return lambda rounds: np.asarray(version.watch(rounds)[:, wanted].sum(axis=1))

    def settled(samples: Mapping[str, list[np.ndarray]]) -> bool:
        seen = views(samples)
        return all(seen.settled(name, over=over) for name in others)

    return views(
        interleave(
            {name: block(name, version) for name, version in contenders.items()},
            run_s,
            deadline,
            move=lambda: versions.move(list(contenders.values())),
            settled=settled,
        )
    )


def call_ratios(
    versions: Versions, pair: Sequence[Version], run_s: float, deadline: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``[calls]`` of two versions: seconds of each call, to be compared call by call.

    Those of the second are those of the first divided by the median of the ratio in each round.

    Raises
    ------
    OutOfTime
        The deadline came too early.
    """
    one, other = pair
    rows = interleave(
        {"one": one.watch, "other": other.watch},
        run_s,
        deadline,
        move=lambda: versions.move(pair),
        settled=lambda samples: len(samples["one"]) >= SCREEN_ROUNDS,
    )
    first, second = (
        np.array([np.quantile(row, QUIET, axis=0) for row in rows[name]]) for name in rows
    )
    seconds = np.median(first, axis=0)
    return seconds, seconds * np.median(second / first, axis=0)


def views(blocks: Mapping[str, Sequence[np.ndarray]]) -> Views:
    """Return what blocks, whose numbers of runs may differ, say of their contenders."""
    typical, quiet = (
        Measurement(
            seconds={
                name: np.array([[np.quantile(block, quantile)] for block in rows])
                for name, rows in blocks.items()
            }
        )
        for quantile in (0.5, QUIET)
    )
    return Views(typical=typical, quiet=quiet)
