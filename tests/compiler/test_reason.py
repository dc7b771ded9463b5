from __future__ import annotations

import pytest

from hone.tuning.reason import reason_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no such loop"), "no such loop"),
        (RuntimeError("\n  Check failed: a == b\nStack trace:\n  0: main"), "Check failed: a == b"),
        (RuntimeError("ScheduleError: An error\n# from tvm\nError message: It is"), "It is"),
        (KeyError(), "KeyError"),
    ],
    ids=["plain", "first line", "schedule error", "empty"],
)
def test_reason_is_one_line(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason
