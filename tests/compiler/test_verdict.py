"""What becomes of a step, and the reason that the report gives."""

from __future__ import annotations

import pytest

from hone import recipe
from hone.measure import Speedup
from hone.report.schema import Verdict
from hone.verdict import Change, judge


def wants(goal: str = "latency", metric: str = "top1") -> recipe.Recipe:
    return recipe.parse(
        {
            "model": {"path": "x.onnx"},
            "goal": {"goal": goal, "max_accuracy_drop": 0.01},
            "data": {"metric": metric},
        }
    )


def change(**facts: object) -> Change:
    given = {"lost": 0.0, "weights_bytes": (100, 50), "speedup": None}
    return Change(**(given | facts))  # type: ignore[arg-type]


def speedup(ratio: float, low: float, high: float, rounds: int = 10) -> Speedup:
    return Speedup(ratio=ratio, ci95=(low, high), rounds=rounds)


@pytest.mark.parametrize(
    ("measured", "verdict", "reason"),
    [
        (speedup(1.5, 1.4, 1.6), Verdict.KEPT, "1.50 times as fast (95% 1.40 to 1.60)"),
        (
            speedup(1.01, 0.99, 1.03),
            Verdict.REVERTED,
            "not faster outside noise: 1.01 times as fast (95% 0.99 to 1.03)",
        ),
        (
            speedup(0.8, 0.7, 0.85),
            Verdict.REVERTED,
            "slower: 0.80 times as fast (95% 0.70 to 0.85)",
        ),
        (
            speedup(1.5, 1.02, 7.11),
            Verdict.REVERTED,
            "not shown to be faster, on a machine too busy to tell: "
            "1.50 times as fast (95% 1.02 to 7.11)",
        ),
        (
            speedup(1.5, 1.4, 1.6, rounds=5),
            Verdict.REVERTED,
            "not shown to be faster, on a machine too busy to tell: "
            "1.50 times as fast (95% 1.40 to 1.60)",
        ),
        (None, Verdict.NOT_MEASURED, "no device; weights 100 → 50 bytes"),
    ],
)
def test_latency_decides_by_what_was_shown(
    measured: Speedup | None, verdict: Verdict, reason: str
) -> None:
    assert judge(change(speedup=measured), wants()) == (verdict, reason)


def test_loss_beyond_the_budget_reverts_whatever_else_is_gained() -> None:
    gained = change(lost=0.02, speedup=speedup(3, 2.9, 3.1))
    assert judge(gained, wants()) == (
        Verdict.REVERTED,
        "loses 2.00 points of top-1, budget 1.00 points of top-1",
    )
    assert judge(gained, wants(metric="relative_error"))[1] == (
        "loses 0.02 relative output error, budget 0.01 relative output error"
    )


def test_size_and_memory_decide_by_bytes() -> None:
    assert judge(change(), wants("size")) == (Verdict.KEPT, "weights 100 → 50 bytes")
    same = change(weights_bytes=(100, 100))
    assert judge(same, wants("size"))[1] == "not smaller: weights 100 → 100 bytes"
    less = change(activations_bytes=(9, 8))
    assert judge(less, wants("memory")) == (Verdict.KEPT, "activations 9 → 8 bytes")
    more = change(activations_bytes=(8, 9))
    assert judge(more, wants("memory"))[1] == "no less memory: activations 8 → 9 bytes"
