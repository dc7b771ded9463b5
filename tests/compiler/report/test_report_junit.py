from __future__ import annotations

from xml.etree import ElementTree

import junitparser
import pytest

from hone.report import junit


def parse(report) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(junit.render(report))
    return {case.get("name"): case for case in root.iter("testcase")}


def failures(report) -> dict[str, str]:
    return {
        name: failure.get("message")
        for name, case in parse(report).items()
        if (failure := case.find("failure")) is not None
    }


def test_junit_has_a_case_for_each_step_and_gate(report):
    assert list(parse(report)) == [
        *(row.name for row in report.steps),
        "accuracy within 0.50% of the baseline",
        "not slower than the baseline outside noise",
    ]
    assert failures(report) == {}


def test_junit_is_read_by_an_independent_parser(report):
    (suite,) = junitparser.JUnitXml.fromstring(junit.render(report).encode())
    assert (suite.name, suite.tests, suite.failures, suite.skipped) == ("hone net", 8, 0, 2)


def test_reverted_and_unmeasured_steps_are_skipped_with_their_reason(report):
    cases = parse(report)
    reverted = cases["split conv1 into 2 by channels"].find("skipped")
    assert reverted.get("message") == "reverted: 4% slower"
    assert cases["another board"].find("skipped").get("message") == "not measured: no device"
    assert cases["int8"].find("skipped") is None


def test_accuracy_gate_fails_when_too_much_was_lost(change):
    assert failures(change({4: {"accuracy": 0.97}})) == {
        "accuracy within 0.50% of the baseline": "98.00% became 97.00%"
    }


def test_accuracy_gate_holds_at_exactly_the_limit(change):
    assert failures(change({4: {"accuracy": 0.975}})) == {}


def test_latency_gate_fails_only_outside_noise(change, timed):
    assert failures(change({4: timed(1.015)})) == {}
    assert failures(change({4: timed(1.03)})) == {
        "not slower than the baseline outside noise": (
            "1.00 (0.99 to 1.01) ms became 1.03 (1.02 to 1.04) ms"
        )
    }


def test_size_gate_stands_in_when_the_goal_is_size(change):
    goal = {"goal": {"goal": "size", "max_accuracy_drop": 0.01}}
    assert failures(change({4: {"weights_bytes": 500_000}}, recipe=goal)) == {
        "weights not larger than the baseline's": "400 kB became 500 kB"
    }


def test_error_gate_stands_in_for_networks_without_accuracy(change):
    assert failures(change({4: {"output_error": 0.02}}, metric="relative_error")) == {
        "output error at most 0.005": "it is 0.02"
    }


@pytest.mark.parametrize("key", ["accuracy", "latency_ms"])
def test_gate_is_skipped_when_it_was_not_measured(change, key):
    report = change({0: {key: None}})
    assert failures(report) == {}
    assert any(gate.unknown for gate in junit.gates(report))


def test_names_that_xml_cannot_hold_are_written_all_the_same(change):
    report = change({0: {"name": 'a<b>&"\x00\x1b'}})
    assert 'a<b>&"??' in parse(report)
