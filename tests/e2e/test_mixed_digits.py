"""Mixed precision on the digits network, from the recipe to the report."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from hone import improve, recipe
from hone.errors import UsageError
from hone.model import Model
from hone.report.schema import Report, StepRow, Verdict
from hone.steps import mixed
from hone.steps.candidate import Context
from hone.steps.options.mixed import MixedStep

FOLDER = files("hone.models") / "digits"
LAYERS = ["/conv1/Conv", "/conv2/Conv", "/conv3/Conv", "/fc/Gemm"]


def build(
    folder: Path,
    *,
    metric: str = "relative_error",
    goal: str = "latency",
    budget: float,
    **step: object,
) -> Report:
    data = {
        "model": {"path": str(FOLDER / "digits.onnx")},
        "target": {"threads": 1},
        "data": {
            "calibration": str(FOLDER / "calibration.npz"),
            "evaluation": str(FOLDER / "evaluation.npz"),
            "metric": metric,
        },
        "goal": {"goal": goal, "max_accuracy_drop": budget},
        "output": {"directory": str(folder)},
        "measure": {"baselines": [], "rounds": 3, "runs": 4, "warmup": 1},
        "step": [{"kind": "mixed", "samples": 2, **step}],
    }
    return improve.build(recipe.parse(data, folder=folder))


def mixed_row(report: Report) -> StepRow:
    return next(row for row in report.steps if row.name.startswith("mixed"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixed")


@pytest.fixture(scope="module")
def half(folder: Path) -> Report:
    """A budget that int8 throughout does not hold: it loses 0.012."""
    return build(folder, budget=0.009)


def test_layers_that_cost_too_much_accuracy_stay_in_float(half: Report):
    row = mixed_row(half)
    assert [each.layer for each in row.precisions] == LAYERS
    precisions = {each.layer: each.precision for each in row.precisions}
    assert set(precisions.values()) == {"fp32", "int8"}
    assert row.output_error is not None
    assert row.output_error <= 0.009
    floats = [each for each in row.precisions if each.precision == "fp32"]
    assert all(each.reason.startswith("int8: ") for each in floats)
    errors = {each.layer: each.costs["int8"].error for each in row.precisions}
    budgeted = [each.layer for each in floats if "costs more accuracy" in each.reason]
    assert budgeted == sorted(errors, key=lambda layer: errors[layer] or 0)[-len(budgeted) :]


def test_row_has_times_of_layers_and_names_conversions(half: Report):
    row = mixed_row(half)
    assert all(each.microseconds is not None for each in row.precisions)
    assert all(set(each.costs) == {"int8", "fp32"} for each in row.precisions)
    assert all(each.costs["fp32"].microseconds is not None for each in row.precisions)
    assert ("image", "quantize") in {(each.tensor, each.direction) for each in row.conversions}
    integers = {each.layer for each in row.precisions if each.precision == "int8"}
    assert {each.layer for each in row.quantized} == integers
    assert {e.layer: e.sqnr_db for e in row.quantized} == {
        e.layer: e.sqnr_db for e in row.precisions if e.precision == "int8"
    }


def test_next_build_of_the_same_asks_nothing_again(half: Report, folder: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    for question in ("sensitivity", "lost", "clock", "fastest"):
        monkeypatch.setattr(mixed._Oracle, question, refuse)
    again = mixed_row(build(folder, budget=0.009))
    assert {e.layer: e.precision for e in again.precisions} == {
        e.layer: e.precision for e in mixed_row(half).precisions
    }


def test_budget_of_nothing_keeps_float_and_says_so(folder: Path):
    row = mixed_row(build(folder, budget=0.0))
    assert row.verdict is Verdict.REVERTED
    assert row.reason == (
        "all layers stay in float after 3 probes: int8: costs more accuracy than the budget allows"
    )
    assert {each.precision for each in row.precisions} == {"fp32"}


def test_top1_is_within_the_budget_and_skipped_layers_stay_in_float(folder: Path):
    report = build(folder, metric="top1", budget=0.003, skip=["/fc/Gemm"])
    row = mixed_row(report)
    assert (report.baseline.accuracy or 0) - (row.accuracy or 0) <= 0.003
    last = row.precisions[-1]
    assert (last.precision, last.reason) == ("fp32", "int8: kept in float by request")


def test_search_needs_a_build(digits: Model):
    step = MixedStep(kind="mixed")
    with pytest.raises(UsageError, match=r"^mixed precision needs a build, which evaluates"):
        mixed.propose(digits, step, Context(target=None, threads=1))  # type: ignore[arg-type]


@pytest.fixture
def digits() -> Model:
    from hone.importer import load

    return load(FOLDER / "digits.onnx")


def test_layers_that_one_precision_leaves_get_the_next_when_size_counts(folder: Path):
    precisions = ["int4-weights", "int8-weights"]
    row = mixed_row(build(folder, goal="size", budget=0.055, precisions=precisions))
    assert {each.precision for each in row.precisions} == set(precisions)
    assert row.verdict is Verdict.KEPT
    assert row.output_error is not None
    assert row.output_error <= 0.055
    for each in row.precisions:
        errors = {name: cost.error or 0.0 for name, cost in each.costs.items()}
        assert errors["fp32"] < errors["int8-weights"] < errors["int4-weights"]
        assert all(cost.microseconds is None for cost in each.costs.values())
        if each.precision == "int8-weights":
            assert each.reason == "int4-weights: costs more accuracy than the budget allows"


def test_layers_that_integers_leave_get_sixteen_bits(folder: Path):
    # By size, so that the clock of a machine without such instructions has no say.
    row = mixed_row(build(folder, goal="size", budget=0.009, precisions=["int8", "bf16"]))
    assert {each.precision for each in row.precisions} == {"int8", "bf16"}
    assert row.output_error is not None
    assert row.output_error <= 0.009
    for each in row.precisions:
        # 8 bits of a significand against about 8 of a range: of one order, and neither is nothing.
        assert 0 < (each.costs["bf16"].error or 0) < 0.05
