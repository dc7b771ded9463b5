from __future__ import annotations

import pytest

from hone.report import diff
from hone.report.diff import Change


def by_name(comparison) -> dict[str, diff.Difference]:
    return {row.name: row for row in comparison.rows}


def test_same_report_has_no_changes(report):
    comparison = diff.compare(report, report)
    measured = [row for row in comparison.rows if row.name != "another board"]
    assert {row.change for row in measured} == {Change.SAME}
    assert comparison.warnings == ()
    assert comparison.slower(0.0) == []
    assert by_name(comparison)["another board"].change is Change.NOT_MEASURED


@pytest.mark.parametrize(
    ("median", "change_"),
    [(1.019, Change.SAME), (1.03, Change.SLOWER), (0.981, Change.SAME), (0.97, Change.FASTER)],
)
def test_change_is_judged_by_the_intervals(report, change, timed, median, change_):
    comparison = diff.compare(report, change({0: timed(median)}))
    assert by_name(comparison)["baseline"].change is change_


def test_slower_takes_the_limit_into_account(report, change, timed):
    comparison = diff.compare(report, change({0: timed(1.05)}))
    assert [row.name for row in comparison.slower(0.03)] == ["baseline"]
    assert comparison.slower(0.06) == []
    assert comparison.rows[0].slowdown == pytest.approx(0.05)


def test_slower_ignores_steps_that_were_not_shipped(report, change, timed):
    comparison = diff.compare(report, change({3: timed(0.9)}))
    assert by_name(comparison)["split conv1 into 2 by channels"].change is Change.SLOWER
    assert comparison.slower(0.0) == []


def test_final_packages_are_compared_whatever_their_steps_are_called(report, change, timed):
    new = change({4: {"name": "int8 of all layers", **timed(0.5)}})
    rows = by_name(diff.compare(report, new))
    assert rows["int8"].change is Change.REMOVED
    assert rows["int8 of all layers"].change is Change.ADDED
    assert rows[diff.FINAL].change is Change.SLOWER


def test_warns_when_the_reports_are_not_comparable(report, change):
    comparison = diff.compare(
        report, change(threads=4, environment=report.environment | {"cpu": "EPYC"})
    )
    assert comparison.warnings == ("threads differs: 2 and 4", "cpu differs: Xeon and EPYC")


def test_cells_show_both_values_where_they_differ(report, change, timed):
    new = change({0: {**timed(1.05), "accuracy": 0.97}})
    assert diff.cells(diff.compare(report, new).rows[0]) == (
        "baseline",
        "slower",
        "1.00 (0.99 to 1.01)",
        "1.05 (1.04 to 1.06)",
        "+5.0%",
        "98.00% -> 97.00%",
        "400 kB",
    )


def test_json_holds_old_and_new(report, change):
    data = diff.compare(report, change(steps=[report.steps[0].model_dump(mode="json")])).to_json()
    assert data["schema"] == "hone.report-diff/1"
    assert [row["change"] for row in data["rows"]][:2] == ["same", "removed"]
    assert data["rows"][1]["new"] is None
    assert data["rows"][0]["old"]["latency_ms"]["median"] == 1.0


def mixed(**precisions: str) -> dict[str, object]:
    rows = [
        {"layer": layer, "precision": precision, "costs": {}, "reason": f"{layer} is slow"}
        for layer, precision in precisions.items()
    ]
    return {"settings": {"kind": "mixed"}, "precisions": rows}


def test_layers_with_another_precision_are_listed(change):
    old = change({4: mixed(conv1="int8", conv2="int8", fc="fp32")})
    new = change({4: mixed(conv1="int8", conv2="fp32", fc="int8")})
    assert diff.compare(old, old).precisions == ()
    changes = diff.compare(old, new).precisions
    assert [diff.precision_cells(each) for each in changes] == [
        ("conv2", "int8", "fp32", "conv2 is slow"),
        ("fc", "fp32", "int8", "fc is slow"),
    ]
    assert diff.compare(old, new).to_json()["precisions"][0] == {
        "layer": "conv2", "old": "int8", "new": "fp32", "reason": "conv2 is slow",
    }  # fmt: skip


def test_layer_that_no_step_names_counts_as_float(report, change):
    # In the sample the int8 step quantizes conv1 and fc.
    before = change({4: {"settings": {"kind": "int8"}}})
    new = change({4: mixed(conv1="fp32", extra="int8")})
    found = [(each.layer, each.old, each.new) for each in diff.compare(before, new).precisions]
    assert found == [("conv1", "int8", "fp32"), ("extra", "fp32", "int8"), ("fc", "int8", "fp32")]


def test_precisions_of_a_reverted_step_do_not_count(report, change):
    assert diff.compare(report, change({3: mixed(conv1="int8")})).precisions == ()
