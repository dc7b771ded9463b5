"""A report as a build wrote it; that this old file stays readable is a test of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hone.report.schema import Report

SAMPLE = Path(__file__).with_name("sample.json")


@pytest.fixture
def sample() -> dict[str, Any]:
    return json.loads(SAMPLE.read_text(encoding="utf-8"))


@pytest.fixture
def report() -> Report:
    return Report.read(SAMPLE)


@pytest.fixture
def change(sample) -> Callable[..., Report]:
    """Return the sample with some of its rows' values changed, by the row's number."""

    def change(rows: dict[int, dict[str, Any]] | None = None, **values: Any) -> Report:
        for number, changes in (rows or {}).items():
            sample["steps"][number] |= changes
        return Report.model_validate_json(json.dumps(sample | values))

    return change


def latency(median: float, half: float = 0.01) -> dict[str, Any]:
    return {
        "median": median,
        "p90": median * 1.1,
        "ci95": [median - half, median + half],
        "samples": 70,
    }


@pytest.fixture
def timed() -> Callable[..., dict[str, Any]]:
    """Return a row's ``latency_ms``."""
    return lambda median, half=0.01: {"latency_ms": latency(median, half)}
