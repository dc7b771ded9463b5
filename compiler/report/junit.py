"""The report as JUnit XML: one test case for each step and for each gate."""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree

from hone.report import numbers
from hone.report.schema import Report, Verdict


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Something that the final package must hold.

    Parameters
    ----------
    name : str
        What must hold.
    problem : str
        What does not, with both numbers; empty when it holds.
    unknown : str
        Why it could not be judged; empty when it was.
    """

    name: str
    problem: str = ""
    unknown: str = ""


def gates(report: Report) -> list[Gate]:
    """Judge the final package against the baseline."""
    return [_accuracy(report), _goal(report)]


def render(report: Report) -> str:
    """Return the XML.

    A reverted step is *skipped*, not failed: reverting is what hone is for. A gate that does not
    hold is a failure.
    """
    suite = ElementTree.Element("testsuite", name=f"hone {report.name}", timestamp=report.created)
    for row in report.steps:
        case = ElementTree.SubElement(
            suite, "testcase", classname="hone.step", name=_clean(row.name)
        )
        if row.seconds is not None:
            case.set("time", f"{row.seconds:.3f}")
        if row.verdict in {Verdict.REVERTED, Verdict.NOT_MEASURED}:
            why = f"{row.verdict.value}: {row.reason}" if row.reason else row.verdict.value
            ElementTree.SubElement(case, "skipped", message=_clean(why))
        figures = (
            f"{numbers.quality_heading(report)} {numbers.quality(report, row)}, "
            f"weights {numbers.size(row.weights_bytes)}, "
            f"median ms {numbers.timing(row.latency_ms)}"
        )
        ElementTree.SubElement(case, "system-out").text = figures
    for gate in gates(report):
        case = ElementTree.SubElement(suite, "testcase", classname="hone.gate", name=gate.name)
        if gate.problem:
            ElementTree.SubElement(case, "failure", message=gate.problem)
        elif gate.unknown:
            ElementTree.SubElement(case, "skipped", message=gate.unknown)
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    suite.set("errors", "0")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"


def _accuracy(report: Report) -> Gate:
    allowed = _setting(report, "max_accuracy_drop", 0.0)
    name = f"accuracy within {numbers.percentage(allowed)} of the baseline"
    if report.metric == "relative_error":
        name = f"output error at most {allowed:g}"
        error = report.final.output_error
        if error is None:
            return Gate(name=name, unknown="the output error was not measured")
        return Gate(name=name, problem=f"it is {error:.3g}" if error > allowed else "")
    before, after = report.baseline.accuracy, report.final.accuracy
    if before is None or after is None:
        return Gate(name=name, unknown="the accuracy was not measured")
    # Accuracies are counts over a test set: the last bit of their difference means nothing.
    if before - after > allowed + 1e-9:
        figures = f"{numbers.percentage(before)} became {numbers.percentage(after)}"
        return Gate(name=name, problem=figures)
    return Gate(name=name)


def _goal(report: Report) -> Gate:
    goal = report.recipe.get("goal")
    if isinstance(goal, dict) and goal.get("goal") == "size":
        name = "weights not larger than the baseline's"
        old, new = report.baseline.weights_bytes, report.final.weights_bytes
        if old is None or new is None:
            return Gate(name=name, unknown="the size was not measured")
        return Gate(
            name=name,
            problem=f"{numbers.size(old)} became {numbers.size(new)}" if new > old else "",
        )
    name = "not slower than the baseline outside noise"
    before, after = report.baseline.latency_ms, report.final.latency_ms
    if before is None or after is None:
        return Gate(name=name, unknown="the latency was not measured")
    slower = after.ci95[0] > before.ci95[1]
    figures = f"{numbers.timing(before)} ms became {numbers.timing(after)} ms"
    return Gate(name=name, problem=figures if slower else "")


def _setting(report: Report, key: str, default: float) -> float:
    goal = report.recipe.get("goal")
    value = goal.get(key) if isinstance(goal, dict) else None
    return float(value) if isinstance(value, int | float) else default


def _clean(text: str) -> str:
    # XML 1.0 has no way to write most control characters, escaped or not.
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
