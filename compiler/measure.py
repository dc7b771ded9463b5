"""Latency by interleaved rounds, with a bootstrap interval and a threshold for noise.

The speed of a shared machine swings by a factor of two between minutes, so two contenders are
only ever compared inside one run: in each round every contender runs one block, in turn, and the
ratio of two contenders is taken round by round. A comparison goes on until its interval is narrow,
whatever it says: to stop when it says something would find differences where there are none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

# A ratio closer to 1 than this is called noise whatever its interval says: repeated A/A runs of
# one package on the machines used so far differ by up to this much.
NOISE = 0.02
# Of fewer rounds nothing is claimed. Of two contenders that are equal, with independent noise, the
# bootstrap calls one faster in 12 of 100 comparisons of 7 rounds, in 6 to 8 of 100 of 8 and more.
LEAST_ROUNDS = 8
# An interval whose ends are further apart, as a ratio, shows nothing, unless its nearer end is
# further from 1 than that.
WIDEST = 1.25
# More rounds are taken until the ends are no further apart than this, or than half of the way from
# 1 to the nearer one (on the scale of logarithms).
NARROW = 1 + 2 * NOISE
# More rounds than asked for: as many times, and so many seconds, at most.
MOST = 5
MORE_S = 30.0
# Resamples of the bootstrap (Efron and Tibshirani 1993 ask for at least 1000 for intervals).
RESAMPLES = 2000
# Threads of a peer's pool go on spinning for a moment after its last run.
SETTLE_S = 0.002
# Threads that slept meanwhile take some tens of microseconds to come back, which are several runs
# of a small model.
WAKE_S = 0.001


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How often to run.

    Parameters
    ----------
    rounds : int
        Interleaved rounds; more where a comparison wants them, see `measure`.
    runs : int
        Runs of each contender in one round.
    warmup : int
        Runs at the start of each block that are dropped.
    """

    rounds: int = 10
    runs: int = 10
    warmup: int = 3

    @property
    def most(self) -> int:
        """Rounds that a comparison may take."""
        return max(MOST * self.rounds, LEAST_ROUNDS)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one run.

    Parameters
    ----------
    median_ms, p90_ms : float
        Over all samples.
    ci95_ms : tuple of float
        Bootstrap interval of the median.
    samples : int
        Runs that counted.
    """

    median_ms: float
    p90_ms: float
    ci95_ms: tuple[float, float]
    samples: int


class Outcome(StrEnum):
    """What a comparison of two contenders says."""

    FASTER = "faster"
    SLOWER = "slower"
    NOISE = "noise"
    """The same, or too near to tell."""
    NOT_SHOWN = "not shown"
    """Too few rounds, or an interval too wide to say anything."""


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """How many times faster one contender is than another.

    Parameters
    ----------
    ratio : float
        Median over rounds of ``time of the other / time of this``; above 1 is faster.
    ci95 : tuple of float
        Bootstrap interval over rounds.
    rounds : int
        How many there were.
    """

    ratio: float
    ci95: tuple[float, float]
    rounds: int

    @property
    def outcome(self) -> Outcome:
        """Faster or slower only where the interval excludes 1 and the ratio exceeds the noise.

        Neither is shown by fewer than `LEAST_ROUNDS` rounds, nor by a wide interval: 1.02 to 7.11
        is not shown, 2.2 to 3.6 is faster.
        """
        if self.rounds < LEAST_ROUNDS or self._width > max(math.log(WIDEST), self._distance):
            return Outcome.NOT_SHOWN
        if self.ci95[0] > 1 and self.ratio > 1 + NOISE:
            return Outcome.FASTER
        if self.ci95[1] < 1 and self.ratio < 1 / (1 + NOISE):
            return Outcome.SLOWER
        return Outcome.NOISE

    @property
    def settled(self) -> bool:
        """Whether more rounds would hardly change the outcome."""
        narrow = max(math.log(NARROW), self._distance / 2)
        return self.rounds >= LEAST_ROUNDS and self._width <= narrow

    @property
    def _width(self) -> float:
        """The logarithm of the ratio of the interval's ends."""
        return math.log(self.ci95[1] / self.ci95[0])

    @property
    def _distance(self) -> float:
        """The logarithm's distance from 1 to the nearer end; 0 where the interval holds 1."""
        return max(math.log(self.ci95[0]), -math.log(self.ci95[1]), 0.0)


class Contender(Protocol):
    """Something that can run a block and time each run itself, such as another process."""

    def block(self, runs: int) -> list[float]:
        """Run ``runs`` times and return the seconds of each."""
        ...


@dataclass(frozen=True)
class InProcess:
    """A contender that is a function of this process."""

    run: Callable[[], object]

    def block(self, runs: int) -> list[float]:
        """Run ``runs`` times and return the seconds of each.

        Runs that end within `WAKE_S` after the start do not count.
        """
        seconds: list[float] = []
        awake = time.perf_counter_ns() + WAKE_S * 1e9
        while len(seconds) < runs:
            start = time.perf_counter_ns()
            self.run()
            end = time.perf_counter_ns()
            if end >= awake:
                seconds.append((end - start) * 1e-9)
        return seconds


def bootstrap_median(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95% percentile interval of the median of ``values``."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All samples of one interleaved run.

    Parameters
    ----------
    seconds : mapping of str to array
        For each contender ``[rounds, runs - warmup]``.
    """

    seconds: Mapping[str, np.ndarray]

    def latency(self, name: str) -> Latency:
        """Return the statistics of a contender."""
        samples = self.seconds[name].ravel() * 1e3
        return Latency(
            median_ms=float(np.median(samples)),
            p90_ms=float(np.percentile(samples, 90)),
            ci95_ms=bootstrap_median(samples),
            samples=len(samples),
        )

    def speedup(self, name: str, *, over: str) -> Speedup:
        """Return how many times faster ``name`` is than ``over``."""
        ratios = np.median(self.seconds[over], axis=1) / np.median(self.seconds[name], axis=1)
        return Speedup(
            ratio=float(np.median(ratios)), ci95=bootstrap_median(ratios), rounds=len(ratios)
        )


def measure(
    contenders: Mapping[str, Contender],
    rounds: Rounds | None = None,
    *,
    settle: Sequence[tuple[str, str]] = (),
    on_round: Callable[[int], None] | None = None,
) -> Measurement:
    """Run all contenders in interleaved rounds.

    Parameters
    ----------
    contenders : mapping of str to Contender
        What to compare.
    rounds : Rounds, optional
        How often; 10 rounds of 10 runs, the first 3 of each block dropped.
    settle : sequence of (str, str)
        Contenders to be compared: rounds are added until the interval of each of these ratios is
        narrow (`Speedup.settled`), up to `Rounds.most`, and for `MORE_S` at most.
    on_round : callable, optional
        Called with the number of rounds done.

    Returns
    -------
    Measurement
    """
    plan = rounds or Rounds()
    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    names = list(contenders)
    done, enough, started = 0, False, 0.0
    while not enough:
        # Nobody always follows the same neighbour, whose caches and threads it inherits.
        first = done % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE_S)
            samples[name].append(contenders[name].block(plan.runs)[plan.warmup :])
        done += 1
        if on_round is not None:
            on_round(done)
        if done == plan.rounds:
            started = time.monotonic()
        if done >= plan.rounds:
            in_time = done < LEAST_ROUNDS or time.monotonic() - started < MORE_S
            more = done < plan.most and in_time
            enough = not more or _settled(_measurement(samples), settle)
    return _measurement(samples)


def _measurement(samples: Mapping[str, list[list[float]]]) -> Measurement:
    return Measurement(seconds={name: np.array(rows) for name, rows in samples.items()})


def _settled(measured: Measurement, pairs: Sequence[tuple[str, str]]) -> bool:
    return all(measured.speedup(name, over=other).settled for name, other in pairs)
