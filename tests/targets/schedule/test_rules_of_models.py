"""Which rule schedules the kernels of the reference networks, against a committed table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import hone
import hone.models
from hone import pipeline
from hone.targets.target import resolve

TABLE = Path(__file__).with_name("rules_of_models.txt")
TARGET = "x86-64-v3"


@pytest.mark.parametrize("name", hone.models.names())
def test_kernels_are_scheduled_as_the_table_says(name: str, request: pytest.FixtureRequest) -> None:
    target = resolve(TARGET)
    module = hone.load(hone.models.build(name)).module
    lowered = pipeline.lower(module, target, threads=2)
    decisions = pipeline.schedule(lowered, target, threads=2).decisions
    assert not [d for d in decisions if d.rule == "none" or d.reason]
    rules = Counter(d.rule for d in decisions)
    line = f"{name}: " + ", ".join(f"{rule} {count}" for rule, count in sorted(rules.items()))
    lines = {row.split(":")[0]: row for row in TABLE.read_text().splitlines()}
    if request.config.getoption("--regen"):
        lines[name] = line
        TABLE.write_text("".join(f"{lines[n]}\n" for n in hone.models.names() if n in lines))
    assert line == lines[name]
