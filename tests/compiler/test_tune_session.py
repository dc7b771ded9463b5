from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest

from hone.database import Database
from hone.targets.target import resolve
from hone.tuning import follow
from hone.tuning.session import Session, batch_size

HOST = resolve("host")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A session of 100 s without a kernel, of which 20 s are for the model."""
    return Session(
        tasks=[],
        database=Database(tmp_path, HOST, threads=1),
        target=HOST,
        threads=1,
        seed=0,
        started=time.monotonic(),
        budget_s=100.0,
        watchdog_s=45.0,
        log=lambda _text: None,
        model=tmp_path / "model.json",
    )


@pytest.fixture
def silent() -> Iterator[SimpleNamespace]:
    """A child that never says anything."""
    ours, theirs = Pipe()
    yield SimpleNamespace(link=ours)
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("elapsed_s", "late"), [(10, False), (81, False), (83, True), (97, True), (99, False)]
)
def test_a_search_is_late_when_it_eats_into_the_time_of_the_trial(
    session: Session, elapsed_s: float, late: bool
) -> None:
    assert session.trial_s == 20.0
    assert session.is_late(session.started + elapsed_s) is late
    session.take({"kind": "searched"})
    assert not session.is_late(session.started + elapsed_s)


def test_a_kernel_is_blamed_during_its_turn_and_not_between_turns(session: Session) -> None:
    session.tasks.append(SimpleNamespace(name="dense"))
    session.take({"kind": "turn", "task": 0})
    assert session.current == 0
    session.take({"kind": "between"})
    assert session.current is None


@pytest.mark.parametrize(("elapsed_s", "reason"), [(90.0, "late"), (101.0, "time")])
def test_a_child_is_left_when_it_is_late_or_the_time_is_over(
    session: Session, silent: SimpleNamespace, elapsed_s: float, reason: str
) -> None:
    session.started -= elapsed_s
    assert follow._follow(session, silent, None, lambda: None) == reason


def test_a_new_child_is_told_that_only_the_trial_is_left(session: Session, tmp_path: Path) -> None:
    assert session.request(tmp_path)["searched"] is False
    session.searched = True
    assert session.request(tmp_path)["searched"] is True


@pytest.mark.parametrize(
    ("budget_s", "tasks", "size"), [(60, 7, 9), (10, 40, 4), (600, 2, 16), (5, 0, 5)]
)
def test_batches_shrink_when_many_kernels_share_little_time(
    budget_s: float, tasks: int, size: int
) -> None:
    assert batch_size(budget_s, tasks) == size
