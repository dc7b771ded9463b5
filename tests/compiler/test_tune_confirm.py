from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from hone.measure import Measurement
from hone.tuning.confirm import RECORD, UNTUNED, Choice, Confirmation, OutOfTime, Views, confirm

ROUNDS, RUNS = 12, 5


def samples(seconds: float, seed: int) -> np.ndarray:
    """Times around a mean, with 0.1% of noise."""
    return seconds * (1 + 1e-3 * np.random.default_rng(seed).standard_normal((ROUNDS, RUNS)))


class Model:
    """A model of kernels with known times, in microseconds, by candidate; -1 is untuned.

    Parameters
    ----------
    kernels : mapping
        What each takes under the instrument.
    whole : mapping, optional
        What each takes in whole runs; the same when not given.
    calls : int
        Comparisons that the time suffices for.
    behind : mapping, optional
        What a candidate of a kernel adds to the time of the kernel behind it.
    """

    def __init__(
        self,
        kernels: Mapping[str, Mapping[int, float]],
        whole: Mapping[str, Mapping[int, float]] | None = None,
        calls: int = 99,
        behind: Mapping[str, float] | None = None,
    ) -> None:
        self._behind = behind or {}
        self._kernels = kernels
        self._whole = whole or kernels
        self._calls = calls
        self.asked: list[dict[str, int]] = []

    def _spend(self) -> None:
        self._calls -= 1
        if self._calls < 0:
            raise OutOfTime

    def _views(self, seconds: Mapping[str, float]) -> Views:
        measured = Measurement(
            seconds={name: samples(value, i) for i, (name, value) in enumerate(seconds.items())}
        )
        return Views(typical=measured, quiet=measured)

    def kernels(self, choice: Choice) -> Mapping[str, Views]:
        self._spend()
        self.asked.append(dict(choice))
        return {
            kernel: self._views(
                {UNTUNED: self._kernels[kernel][-1], RECORD: self._kernels[kernel][number]}
            )
            for kernel, number in choice.items()
            if number in self._kernels[kernel]
        }

    def right(self, choice: Choice) -> bool:
        return "wrong" not in choice

    def pair(self, before: Choice, after: Choice) -> Views:
        self._spend()
        changed = [kernel for kernel in after if before.get(kernel) != after[kernel]]
        beside = [kernel for kernel in self._behind if kernel in changed]
        return self._views(
            {
                name: sum(self._kernels[k][choice.get(k, -1)] for k in changed)
                + sum(self._behind[k] for k in beside if name == RECORD)
                for name, choice in ((UNTUNED, before), (RECORD, after))
            }
        )

    def whole(self, choices: Mapping[str, Choice]) -> Views:
        self._spend()
        totals = {
            name: sum(times[choice.get(kernel, -1)] for kernel, times in self._whole.items())
            for name, choice in choices.items()
        }
        return self._views(totals)


def run(model: Model, **candidates: int) -> tuple[Confirmation, list[str]]:
    said: list[str] = []
    return confirm(model, candidates, said.append), said


def kept(confirmation: Confirmation) -> dict[str, int]:
    return {trial.kernel: trial.candidate for trial in confirmation.trials if trial.kept}


def test_a_record_stays_only_where_it_is_faster_inside_the_model() -> None:
    model = Model({"good": {-1: 100, 0: 50}, "bad": {-1: 100, 0: 120}, "same": {-1: 9, 0: 8.99}})
    confirmation, said = run(model, good=1, bad=1, same=1)
    assert kept(confirmation) == {"good": 0}
    assert {trial.kernel for trial in confirmation.trials} == {"good", "bad", "same"}
    assert confirmation.speedup is not None
    assert confirmation.speedup.ratio == pytest.approx(209 / 159, rel=1e-2)
    assert [text for text in said if text] == [
        "trying up to 1 candidates of each of 3 kernels inside the model",
        "trying the faster candidates of 1 kernels one by one",
        "comparing the whole models",
    ]


def test_the_record_that_is_fastest_inside_the_model_stays() -> None:
    model = Model({"a": {-1: 100, 0: 120, 1: 60}, "b": {-1: 100, 0: 70, 1: 10, 2: 20}})
    confirmation, _ = run(model, a=2, b=3)
    assert model.asked == [{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"b": 2}]
    assert kept(confirmation) == {"a": 1, "b": 1}
    trial = next(t for t in confirmation.trials if (t.kernel, t.candidate) == ("a", 0))
    assert (trial.kept, trial.seconds) == (False, pytest.approx(120, rel=1e-2))
    assert trial.untuned_s == pytest.approx(100, rel=1e-2)


def test_nothing_stays_when_the_whole_model_is_slower() -> None:
    watched = {"a": {-1: 100.0, 0: 50.0}, "b": {-1: 100.0, 0: 60.0}}
    alone = {"a": {-1: 100.0, 0: 103.0}, "b": {-1: 100.0, 0: 102.0}}
    confirmation, _ = run(Model(watched, alone), a=1, b=1)
    assert kept(confirmation) == {}
    assert len(confirmation.trials) == 2
    assert confirmation.speedup is None


def test_faster_kernels_stay_when_the_whole_model_does_not_show_them() -> None:
    watched = {"a": {-1: 100.0, 0: 97.0}, "rest": {-1: 9900.0}}
    same = {"a": {-1: 100.0, 0: 100.0}, "rest": {-1: 9900.0}}
    confirmation, _ = run(Model(watched, same), a=1)
    assert kept(confirmation) == {"a": 0}


def test_the_candidate_that_saved_least_goes_first_when_the_whole_model_is_slower() -> None:
    watched = {"a": {-1: 100.0, 0: 50.0}, "b": {-1: 100.0, 0: 90.0}}
    whole = {"a": {-1: 100.0, 0: 90.0}, "b": {-1: 100.0, 0: 130.0}}
    confirmation, _ = run(Model(watched, whole), a=1, b=1)
    assert kept(confirmation) == {"a": 0}
    assert confirmation.speedup is not None
    assert confirmation.speedup.ratio == pytest.approx(200 / 190, rel=1e-2)


def test_a_candidate_that_slows_down_the_kernel_behind_it_does_not_stay() -> None:
    kernels = {"a": {-1: 100.0, 0: 50.0}, "b": {-1: 100.0, 0: 90.0}}
    confirmation, _ = run(Model(kernels, behind={"a": 60.0}), a=1, b=1)
    assert kept(confirmation) == {"b": 0}


def test_a_candidate_that_computes_something_else_does_not_stay() -> None:
    model = Model({"wrong": {-1: 100.0, 0: 50.0}, "b": {-1: 100.0, 0: 90.0}})
    confirmation, said = run(model, wrong=1, b=1)
    assert kept(confirmation) == {"b": 0}
    assert "candidate 1 of kernel wrong computes something else" in said


def test_there_is_no_verdict_on_candidates_for_which_no_time_was_left() -> None:
    class Late(Model):
        def pair(self, before: Choice, after: Choice) -> Views:
            if "b" in after:
                raise OutOfTime
            return super().pair(before, after)

    model = Late({"a": {-1: 100.0, 0: 50.0, 1: 120.0}, "b": {-1: 100.0, 0: 90.0, 1: 99.0}})
    confirmation, said = run(model, a=2, b=2)
    assert kept(confirmation) == {"a": 0}
    assert [(t.kernel, t.candidate) for t in confirmation.trials] == [("a", 0), ("a", 1), ("b", 1)]
    assert "no time is left to try the candidates of 1 kernels" in said


def test_candidates_are_only_timed_when_nothing_is_to_be_decided() -> None:
    model = Model({"a": {-1: 100, 0: 50}, "b": {-1: 100, 0: 120}}, calls=1)
    confirmation = confirm(model, {"a": 1, "b": 1}, lambda _: None, decide=False)
    assert [(trial.kernel, round(trial.gain, 1)) for trial in confirmation.trials] == [
        ("a", 2.0),
        ("b", 0.8),
    ]
    assert confirmation.speedup is None


def test_a_candidate_that_cannot_be_built_has_no_verdict() -> None:
    model = Model({"a": {-1: 100, 0: 50}, "b": {-1: 100}})
    confirmation, _ = run(model, a=1, b=1)
    assert [trial.kernel for trial in confirmation.trials] == ["a"]


def test_a_model_without_a_candidate_that_can_be_built_is_not_measured_as_a_whole() -> None:
    model = Model({"a": {-1: 100}}, calls=1)
    confirmation, _ = run(model, a=1)
    assert confirmation == Confirmation(trials=(), speedup=None)


def test_further_records_are_left_out_when_their_time_is_over() -> None:
    class Late(Model):
        def kernels(self, choice: Choice) -> Mapping[str, Views]:
            if 1 in choice.values():
                raise OutOfTime
            return super().kernels(choice)

    model = Late({"a": {-1: 100, 0: 120, 1: 60}, "b": {-1: 100, 0: 50}})
    confirmation, said = run(model, a=2, b=1)
    assert kept(confirmation) == {"b": 0}
    assert "no time is left for candidates of rank 2 and behind" in said


@pytest.mark.parametrize("calls", [0, 2])
def test_no_conclusion_is_drawn_when_the_time_does_not_suffice(calls: int) -> None:
    with pytest.raises(OutOfTime):
        run(Model({"a": {-1: 100, 0: 50}}, calls=calls), a=1)


@pytest.mark.parametrize(
    ("typical", "quiet", "faster"),
    [(0.5, 0.5, True), (0.5, 1.1, False), (1.0, 0.5, True), (1.1, 0.5, False), (0.5, 1.0, False)],
)
def test_faster_is_what_is_so_on_a_quiet_machine_and_not_slower_on_a_busy_one(
    typical: float, quiet: float, faster: bool
) -> None:
    busy, calm = (
        Measurement(seconds={UNTUNED: samples(1.0, 1), RECORD: samples(value, 2)})
        for value in (typical, quiet)
    )
    assert Views(typical=busy, quiet=calm).faster(RECORD, over=UNTUNED) is faster


@pytest.mark.parametrize(
    ("ratio", "rounds", "settled"),
    [(1.2, 8, True), (1.2, 5, False), (0.5, 3, True), (0.99, 3, False), (0.9, 8, True)],
)
def test_a_comparison_is_settled_when_more_rounds_would_not_change_it(
    ratio: float, rounds: int, settled: bool
) -> None:
    seconds = {UNTUNED: samples(ratio, 1)[:rounds], RECORD: samples(1.0, 2)[:rounds]}
    measured = Measurement(seconds=seconds)
    assert Views(typical=measured, quiet=measured).settled(RECORD, over=UNTUNED) is settled
