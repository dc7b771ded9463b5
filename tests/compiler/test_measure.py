"""Statistics of interleaved rounds, on scripted times."""

from __future__ import annotations

import numpy as np
import pytest

from hone import measure as module
from hone.measure import (
    LEAST_ROUNDS,
    NOISE,
    WAKE_S,
    InProcess,
    Measurement,
    Outcome,
    Rounds,
    Speedup,
    measure,
)


class Scripted:
    """A contender whose runs take the given seconds, then again from the start."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self._name = name
        self._seconds = seconds
        self._log = log
        self._next = 0

    def block(self, runs: int) -> list[float]:
        self._log.append(self._name)
        taken = [self._seconds[(self._next + i) % len(self._seconds)] for i in range(runs)]
        self._next += runs
        return taken


@pytest.mark.parametrize(("run_s", "dropped"), [(0.1 * WAKE_S, 9), (3 * WAKE_S, 0)])
def test_runs_do_not_count_while_threads_wake_up(monkeypatch, run_s: float, dropped: int) -> None:
    clock = [0]
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: clock[0])
    runs = []

    def run() -> None:
        runs.append(1)
        clock[0] += round(run_s * 1e9)

    assert InProcess(run).block(4) == pytest.approx([run_s] * 4)
    assert len(runs) == 4 + dropped


def two(a: np.ndarray, b: np.ndarray) -> Measurement:
    return Measurement(seconds={"a": a, "b": b})


def test_measure_drops_the_warm_up_of_every_block() -> None:
    log: list[str] = []
    slow_start = Scripted("a", [9.0, 9.0, 1.0, 1.0, 1.0], log)
    result = measure({"a": slow_start}, Rounds(rounds=4, runs=5, warmup=2))
    np.testing.assert_array_equal(result.seconds["a"], np.ones((4, 3)))


def test_measure_interleaves_and_rotates_the_order() -> None:
    log: list[str] = []
    contenders = {name: Scripted(name, [1.0], log) for name in "abc"}
    measure(contenders, Rounds(rounds=3, runs=2, warmup=1))
    assert "".join(log) == "abc" + "bca" + "cab"


def test_measure_reports_each_round() -> None:
    seen: list[int] = []
    measure(
        {"a": Scripted("a", [1.0], [])}, Rounds(rounds=3, runs=2, warmup=0), on_round=seen.append
    )
    assert seen == [1, 2, 3]


def test_latency_is_in_milliseconds_with_median_and_p90() -> None:
    samples = np.arange(1, 102).reshape(1, 101) * 1e-3
    latency = Measurement(seconds={"a": samples}).latency("a")
    assert latency.median_ms == pytest.approx(51)
    assert latency.p90_ms == pytest.approx(91)
    assert latency.samples == 101
    assert latency.ci95_ms[0] < 51 < latency.ci95_ms[1]


def test_latency_interval_covers_the_true_median_in_about_95_of_100_runs() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        samples = rng.exponential(1e-3, size=(10, 7))
        low, high = Measurement(seconds={"a": samples}).latency("a").ci95_ms
        covered += low <= np.log(2) <= high
    # Binomial(200, 0.95) lies in 180..199 but for one time in 200.
    assert 178 <= covered <= 200


def test_speedup_is_faster_when_every_round_is() -> None:
    swing = np.linspace(1, 2, 10)[:, None] * np.ones((10, 7)) * 1e-3
    speedup = two(swing / 1.5, swing).speedup("a", over="b")
    assert speedup.ratio == pytest.approx(1.5)
    assert speedup.outcome is Outcome.FASTER
    assert two(swing / 1.5, swing).speedup("b", over="a").outcome is Outcome.SLOWER


def test_speedup_is_noise_when_both_are_the_same_program() -> None:
    rng = np.random.default_rng(3)
    outcomes = []
    for _ in range(50):
        a, b = rng.normal(1e-3, 1e-4, size=(2, 10, 7))
        outcomes.append(two(a, b).speedup("a", over="b").outcome)
    assert outcomes.count(Outcome.NOISE) >= 45


@pytest.mark.parametrize(
    ("ratio", "interval", "expected"),
    [
        (1.10, (1.05, 1.15), Outcome.FASTER),
        (1.10, (0.99, 1.20), Outcome.NOISE),
        (1 + NOISE / 2, (1.005, 1.015), Outcome.NOISE),
        (0.90, (0.85, 0.95), Outcome.SLOWER),
        (0.90, (0.85, 1.01), Outcome.NOISE),
        (1 - NOISE / 2, (0.985, 0.995), Outcome.NOISE),
    ],
)
def test_outcome_needs_the_interval_and_more_than_the_noise(
    ratio: float, interval: tuple[float, float], expected: Outcome
) -> None:
    assert Speedup(ratio=ratio, ci95=interval, rounds=10).outcome is expected


@pytest.mark.parametrize(
    ("ratio", "interval", "expected"),
    [
        (1.5, (1.02, 7.11), Outcome.NOT_SHOWN),
        (0.6, (0.2, 0.95), Outcome.NOT_SHOWN),
        (1.0, (0.8, 1.3), Outcome.NOT_SHOWN),
        (1.6, (1.3, 2.0), Outcome.NOT_SHOWN),
        (2.5, (2.2, 3.6), Outcome.FASTER),
        (0.4, (0.28, 0.45), Outcome.SLOWER),
    ],
)
def test_wide_interval_shows_nothing_unless_it_is_far_from_one(
    ratio: float, interval: tuple[float, float], expected: Outcome
) -> None:
    assert Speedup(ratio=ratio, ci95=interval, rounds=50).outcome is expected


def test_few_rounds_show_nothing() -> None:
    few = two(np.ones((LEAST_ROUNDS - 1, 7)), 2 * np.ones((LEAST_ROUNDS - 1, 7)))
    assert few.speedup("a", over="b").outcome is Outcome.NOT_SHOWN
    enough = two(np.ones((LEAST_ROUNDS, 7)), 2 * np.ones((LEAST_ROUNDS, 7)))
    assert enough.speedup("a", over="b").outcome is Outcome.FASTER


def counted(a: list[float], b: list[float], rounds: int) -> int:
    """Return how many rounds a comparison takes."""
    contenders = {"a": Scripted("a", a, []), "b": Scripted("b", b, [])}
    plan = Rounds(rounds=rounds, runs=1, warmup=0)
    return len(measure(contenders, plan, settle=[("a", "b")]).seconds["a"])


def test_rounds_are_added_up_to_the_least_that_shows_anything() -> None:
    assert counted([1.0], [1.0], 2) == LEAST_ROUNDS


def test_no_round_is_added_when_the_interval_is_narrow() -> None:
    assert counted([1.0], [1.5], 10) == 10


def test_rounds_are_added_while_the_interval_is_wide_and_end_at_the_limit() -> None:
    plan = Rounds(rounds=10, runs=1, warmup=0)
    assert counted([1.0], [1.0, 1.3], 10) == plan.most == 50
    # a median of rounds that agree but for the first few is known once those are outweighed
    assert 10 < counted([1.0], [1.4, 1.3, 1.4, 1.3, 1.4, 1.3, 1.4] + 200 * [1.0], 10) < 50


def test_rounds_stay_as_planned_when_nothing_is_compared() -> None:
    contenders = {"a": Scripted("a", [1.0, 9.0], []), "b": Scripted("b", [1.0], [])}
    assert len(measure(contenders, Rounds(rounds=3, runs=1, warmup=0)).seconds["a"]) == 3


def test_no_round_is_added_when_the_time_is_up(monkeypatch) -> None:
    monkeypatch.setattr(module, "MORE_S", 0.0)
    assert counted([1.0], [1.0, 1.3], 10) == 10
