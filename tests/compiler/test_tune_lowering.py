"""The search over ways to lower layers: what it tries, keeps, remembers, and how it stops."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from hone import pipeline
from hone.database import Database
from hone.measure import Measurement
from hone.progress import silent
from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.target import resolve
from hone.tuning import lowering
from hone.tuning.choices import tune_lowerings
from hone.tuning.confirm import OutOfTime, Views
from hone.tuning.lowering import BEST, OTHER, LoweringSearch, Trial, canonical, named

HOST = resolve("host")
MACHINE = Machine.of(HOST, 1)
WINOGRAD = "winograd 1x13x11x24 to 40"


def network() -> tvm.IRModule:
    """Two equal 3x3 convolutions behind a pointwise one."""
    rng = np.random.default_rng(3)
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 24, 13, 11), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            value = x
            for channels, side in ((24, 1), (40, 3)):
                shape = (channels, int(value.ty.shape[1]), side, side)
                weight = relax.const(rng.standard_normal(shape).astype("float32"))
                padding = side // 2
                value = block.emit(relax.op.nn.conv2d(value, weight, padding=padding))
                value = block.emit(relax.op.nn.relu(value))
            result = block.emit_output(value)
        block.emit_func_output(result)
    return block.get()


@pytest.fixture
def search() -> LoweringSearch:
    return LoweringSearch(
        network(),
        HOST.tvm_target(1),
        MACHINE,
        compact=False,
        deadline=time.monotonic() + 100,
        pin=False,
    )


def test_kernels_are_named_after_what_they_do() -> None:
    lowered = pipeline.lower(network(), HOST, threads=1)
    first = canonical(ScheduleModule(MACHINE)(lowered))
    again = canonical(ScheduleModule(MACHINE)(pipeline.lower(network(), HOST, threads=1)))
    kernels = [v.name_hint for v, f in first.functions.items() if isinstance(f, tirx.PrimFunc)]
    assert len(set(kernels)) == len(kernels) > 1
    assert all(name.startswith("kernel_") for name in kernels)
    tvm.ir.assert_structural_equal(first, again)
    called: set[str] = set()

    def visit(expression: relax.Expr) -> None:
        if isinstance(expression, relax.Call) and isinstance(expression.args[0], tvm.ir.GlobalVar):
            called.add(expression.args[0].name_hint)

    relax.analysis.post_order_visit(first["main"], visit)
    assert called == set(kernels)


def test_transforms_are_tried_before_packings_and_no_first_option_is(
    search: LoweringSearch,
) -> None:
    options = search.options()
    points = search.untuned.points
    assert options[0][0] == WINOGRAD
    assert all(points[point][0] != option for point, option in options)
    ranks = [points[point].index(option) for point, option in options]
    assert ranks == sorted(ranks)


def measured(gain: float) -> Views:
    rows = np.full((8, 1), 1e-3)
    seen = Measurement(seconds={BEST: rows, OTHER: rows / gain})
    return Views(typical=seen, quiet=seen)


@pytest.mark.parametrize(("gain", "known"), [(0.8, False), (1.25, False), (0.8, True), (1.0, True)])
def test_a_choice_stays_when_its_kernels_are_faster_inside_the_model(
    search: LoweringSearch, monkeypatch: pytest.MonkeyPatch, gain: float, known: bool
) -> None:
    monkeypatch.setattr(LoweringSearch, "_compare", lambda *_: measured(gain))
    option = search.untuned.points[WINOGRAD][1]
    trial = search.attempt(((WINOGRAD, option),), known=known)
    kept = gain > 1 or (known and gain == 1)
    assert (trial.kept, trial.screened) == (kept, False)
    assert (trial.seconds, trial.default_s) == (pytest.approx(1e-3 / gain), pytest.approx(1e-3))
    assert trial.ratio == pytest.approx(gain)
    assert search.decided == ({WINOGRAD: option} if kept else {})
    assert (search.best is search.untuned) != kept


def test_only_calls_that_differ_and_those_behind_them_are_compared(search: LoweringSearch) -> None:
    trial = search.attempt(((WINOGRAD, search.untuned.points[WINOGRAD][1]),))
    assert trial.seconds is not None
    assert trial.default_s is not None
    assert 0 < trial.seconds < 1
    assert 0 < trial.default_s < 1
    assert search.attempt((("winograd of nothing", "4x4"),)).seconds is None


def test_packings_of_several_layers_are_screened_together(search: LoweringSearch) -> None:
    packings = [choice for choice in search.options() if choice[0].startswith("pack ")]
    points = dict.fromkeys(point for point, _ in packings)
    assert len(points) > 1
    calls = search._calls_of({point: search.untuned.points[point][1] for point in points})
    changed = [call for point in points for call in calls[point]]
    assert len(set(changed)) == len(changed) >= len(points)
    trials = search.screen(packings)
    assert sorted(trial.change for trial in trials) == sorted((choice,) for choice in packings)
    assert all(trial.screened and not trial.kept for trial in trials)
    assert all(trial.ratio > 0 for trial in trials if calls[trial.change[0][0]])
    assert search.decided == {}


def test_the_decision_that_saved_least_goes_when_the_whole_model_is_slower(
    search: LoweringSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = iter([1.5, 1.1])
    monkeypatch.setattr(LoweringSearch, "_compare", lambda *_: measured(next(gains)))
    packing = next(c for c in search.options() if c[0].startswith("pack 13x11x24"))
    choice = (WINOGRAD, search.untuned.points[WINOGRAD][1])
    assert search.attempt((choice,)).kept
    assert search.attempt((packing,)).kept
    wholes = iter([1.1, 1.0])
    monkeypatch.setattr(lowering, "compare", lambda *_: measured(next(wholes)))
    assert search.settle() == pytest.approx(1.0)
    assert search.decided == dict([choice])


def test_a_losing_form_comes_back_with_options_of_its_own_points(search: LoweringSearch) -> None:
    known = search.untuned.points
    for option in known[WINOGRAD][1:]:
        change = ((WINOGRAD, option),)
        _, points = search._scheduled(dict(change))
        new = set(points) - set(known)
        found = search.joint(Trial(change=change), known)
        assert {other[1][0] for other in found} <= new
        assert all(other[0] == change[0] for other in found)
        assert bool(found) == any(len(points[point]) > 1 for point in new)


def test_a_change_of_several_points_is_remembered_under_the_first() -> None:
    assert named((("a", "1"),)) == ("a", "1")
    assert named((("a", "1"), ("b", "2"))) == ("a", "1 + b: 2")


def test_the_search_stops_when_its_time_is_over(search: LoweringSearch) -> None:
    search._deadline = time.monotonic()
    with pytest.raises(OutOfTime):
        search.attempt((search.options()[0],))


def test_what_was_tried_is_kept_and_not_tried_again(tmp_path: Path) -> None:
    def run() -> tuple[int, bool, dict[str, str]]:
        result = tune_lowerings(
            network(),
            HOST,
            threads=1,
            budget_s=60,
            database=Database(tmp_path, HOST, threads=1),
            compact=False,
            progress=silent(),
        )
        assert result.failure == ""
        assert result.decided or result.speedup is None
        return result.tried, result.exhausted, result.decided

    tried, exhausted, decided = run()
    assert exhausted
    assert tried > 2
    database = Database(tmp_path, HOST, threads=1)
    assert database.lowerings() == decided
    assert sum(map(len, database.tried_lowerings().values())) == tried
    again, exhausted, _ = run()
    assert exhausted
    assert again >= len(decided)


def test_decided_lowerings_are_compiled(tmp_path: Path) -> None:
    direct = pipeline.lower(network(), HOST, threads=1, decided={WINOGRAD: "direct"})
    names = {variable.name_hint for variable in direct.functions}
    assert not any("winograd" in name for name in names)
    winograd = pipeline.lower(network(), HOST, threads=1, decided={WINOGRAD: "2x2"})
    assert any("winograd" in variable.name_hint for variable in winograd.functions)


def test_the_last_note_on_a_point_counts_and_changes_the_fingerprint(tmp_path: Path) -> None:
    database = Database(tmp_path, HOST, threads=1)
    before = database.fingerprint()
    with database.writing():
        database.add_lowering(WINOGRAD, "2x2", tried=["2x2", "direct"])
        noted = database.fingerprint()
        database.add_lowering("pack 1x1x8x1 to 8", "", tried=["1x1x2"])
    again = Database(tmp_path, HOST, threads=1)
    assert again.lowerings() == {WINOGRAD: "2x2"}
    assert again.tried_lowerings() == {WINOGRAD: {"2x2", "direct"}, "pack 1x1x8x1 to 8": {"1x1x2"}}
    assert again.fingerprint() == noted != before
    with again.writing():
        again.add_lowering(WINOGRAD, "", tried=[])
    assert again.lowerings() == {}
    assert again.fingerprint() == before
