"""What a build makes of a tuning session's outcome."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hone import driver
from hone.errors import OutOfTimeError
from hone.progress import silent
from hone.steps import registry
from hone.steps.candidate import Candidate, Context
from hone.steps.options.tune import TuneStep
from hone.tune import TunedKernel, TuneResult
from hone.tuning.records import Verdict
from hone.workbench import Workbench


def kernel(name: str, *, after_ms: float | None, verdict: Verdict | None = None) -> TunedKernel:
    return TunedKernel(
        name=name,
        calls=1,
        untuned_ms=2.0,
        before_ms=None,
        after_ms=after_ms,
        trials=0,
        failed=0,
        verdict=verdict,
    )


def session(*kernels: TunedKernel, records: int) -> TuneResult:
    return TuneResult(
        trials=records,
        records=records,
        kernels=kernels,
        elapsed_s=10.0,
        first_record_s=None,
        quarantined=(),
        exhausted=False,
    )


def propose(monkeypatch: pytest.MonkeyPatch, outcome: TuneResult | OutOfTimeError) -> object:
    """What a tune step makes of a model when its search ends in a given way."""

    def search(*_args: object, **_options: object) -> TuneResult:
        if isinstance(outcome, OutOfTimeError):
            raise outcome
        return outcome

    monkeypatch.setattr(driver, "search", search)
    build = Workbench.__new__(Workbench)
    build.compact = False
    build.recipe = SimpleNamespace(tune_seconds=lambda _step: 10.0)
    build.target = build.threads = build.database = None
    build.progress = silent()
    build.context = Context(target=None, threads=1, search=build._search)
    return registry.propose("the model", "int8", TuneStep(kind="tune"), build.context)


def test_a_model_is_tried_with_old_records_when_the_search_finds_no_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = session(kernel("a", after_ms=1.0), kernel("b", after_ms=None), records=0)
    candidate = propose(monkeypatch, found)
    assert isinstance(candidate, Candidate)
    assert (candidate.model, candidate.precision) == ("the model", None)
    assert candidate.note == "no new record in 10 s, the database covers 1 of 2 kernels"


def test_a_step_is_reverted_when_the_database_has_no_record_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert propose(monkeypatch, OutOfTimeError("nothing was found")) == "nothing was found"


@pytest.mark.parametrize(
    ("verdicts", "note"),
    [
        (
            (Verdict.CONFIRMED, Verdict.REJECTED),
            "7 new records, used for 1 of 2 kernels, which are faster",
        ),
        ((Verdict.REJECTED, None), "7 new records, none makes the model faster"),
        ((None, None), "7 new records"),
    ],
)
def test_a_step_says_what_became_of_its_records_inside_the_model(
    monkeypatch: pytest.MonkeyPatch, verdicts: tuple[Verdict | None, ...], note: str
) -> None:
    kernels = [kernel(str(i), after_ms=1.0, verdict=v) for i, v in enumerate(verdicts)]
    candidate = propose(monkeypatch, session(*kernels, records=7))
    assert isinstance(candidate, Candidate)
    assert candidate.note.startswith(note)
