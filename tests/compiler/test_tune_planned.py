"""Versions of a model that run as its package does, and clocks for them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import tvm

from hone import pipeline, runtime
from hone.driver import assemble
from hone.importer import load
from hone.measure import Rounds
from hone.models import digits
from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.target import resolve
from hone.tuning import versions as loading
from hone.tuning.confirm import OutOfTime
from hone.tuning.pinning import threads_of_process, workers
from hone.tuning.running import compare, differing, interleave, probe
from hone.tuning.versions import (
    MachineVersions,
    PlannedVersion,
    PlannedVersions,
    Version,
    Versions,
)

HOST = resolve("host")
THREADS = 2
MODEL = Path(digits.__file__).parent / "digits.onnx"


def scheduled(module: tvm.IRModule) -> tvm.IRModule:
    return ScheduleModule(Machine.of(HOST, THREADS))(pipeline.lower(module, HOST, threads=THREADS))


def loaded(found: Versions, module: tvm.IRModule) -> Version:
    program = found.program(module)
    assert program is not None
    return found.load(program, [found.compile(program.functions)])


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    (spec,) = load(MODEL).signature.inputs
    return np.random.default_rng(1).random(spec.shape, dtype=np.float32)


@pytest.fixture(scope="module")
def planned(image: np.ndarray) -> tuple[PlannedVersions, PlannedVersion]:
    found = PlannedVersions(HOST.tvm_target(THREADS), THREADS, [image])
    version = loaded(found, scheduled(load(MODEL).module))
    assert isinstance(version, PlannedVersion)
    return found, version


def test_a_planned_version_computes_what_the_package_does(
    planned: tuple[PlannedVersions, PlannedVersion], image: np.ndarray
) -> None:
    _, version = planned
    model = load(MODEL)
    package = runtime.load(assemble(model, target=HOST, threads=THREADS).package, threads=THREADS)
    (name,) = (spec.name for spec in model.signature.inputs)
    (expected,) = package.run({name: image}).values()
    for _ in range(3):
        (answer,) = version.outputs()
        np.testing.assert_array_equal(answer, expected)


def test_every_call_has_a_clock_and_the_run_has_them_all(
    planned: tuple[PlannedVersions, PlannedVersion],
) -> None:
    _, version = planned
    rounds = Rounds(rounds=1, runs=5, warmup=2)
    assert version.watch(rounds).shape == (3, len(version.calls))
    assert (version.watch(rounds) > 0).all()
    assert version.clock(rounds).shape == (3,)
    assert 0 < probe(version) < 1


def test_the_threads_of_runs_have_a_name_to_be_pinned_by(
    planned: tuple[PlannedVersions, PlannedVersion],
) -> None:
    planned[1].run()
    found = workers("hone")
    assert found[0] == threads_of_process()[0]
    assert set(found) <= set(threads_of_process())
    assert workers("nobody") == found[:1]


def test_memory_moves_between_rounds_and_what_no_version_needs_is_forgotten(
    image: np.ndarray,
) -> None:
    found = PlannedVersions(HOST.tvm_target(1), 1, [image])
    module = scheduled(load(MODEL).module)
    one, other = loaded(found, module), loaded(found, module)
    found.move([one, other])
    found.keep([one])
    found.move([one])
    one.run()
    found.keep([])
    with pytest.raises(KeyError):
        found.move([other])


def test_calls_that_differ_come_with_the_ones_behind_them() -> None:
    class Code:
        def __init__(self, *codes: object) -> None:
            self.codes = list(codes)

    def columns(one: Code, other: Code) -> tuple[list[int], list[int]]:
        return differing(one, other)  # type: ignore[arg-type]

    assert columns(Code(1, 2, 3), Code(1, 2, 3)) == ([], [])
    assert columns(Code(1, 2, 3, 4), Code(1, 9, 3, 4)) == ([1, 2], [1, 2])
    assert columns(Code(1, 2, 3), Code(1, 2, 9)) == ([2], [2])
    assert columns(Code(1, 2, 3, 4), Code(1, 8, 9, 3, 4)) == ([1, 2], [1, 2, 3])
    assert columns(Code(1, 2, 3, 4), Code(1, 3, 4)) == ([1, 2], [1])


def test_a_comparison_ends_when_it_is_settled_and_moves_before_each_round() -> None:
    moved = []
    took = interleave(
        {"a": lambda _: np.array([1.0]), "b": lambda _: np.array([2.0])},
        1e-5,
        time.monotonic() + 60,
        move=lambda: moved.append(1),
        settled=lambda samples: len(samples["a"]) >= 8,
    )
    assert len(took["a"]) == len(took["b"]) == len(moved) == 8


def test_a_comparison_that_does_not_fit_is_not_begun() -> None:
    with pytest.raises(OutOfTime):
        interleave({"a": lambda _: np.array([1.0])}, 1.0, time.monotonic() + 1)


def test_the_same_version_is_neither_faster_nor_slower_call_by_call(
    planned: tuple[PlannedVersions, PlannedVersion],
) -> None:
    found, version = planned
    columns = list(range(len(version.calls)))
    seen = compare(
        found,
        {"one": version, "same": version},
        1e-4,
        time.monotonic() + 30,
        columns={"one": columns, "same": columns},
    )
    assert seen.quiet.seconds["one"].shape == seen.quiet.seconds["same"].shape
    assert len(seen.quiet.seconds["one"]) >= 3


def test_a_model_without_a_plan_runs_in_the_virtual_machine(
    image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "is_walkable", lambda *_: False)
    module = scheduled(load(MODEL).module)
    found = loading.versions(module, HOST.tvm_target(1), 1, [tvm.runtime.tensor(image)])
    assert isinstance(found, MachineVersions)
    version = loaded(found, module)
    found.move([version])
    version.run()
    found.keep([])
    assert version.watch(Rounds(rounds=1, runs=4, warmup=1)).shape[1] == len(version.calls) > 0
    assert len(version.codes) == len(version.calls)
    assert [array.shape for array in version.outputs()] == [(1, 10)]
    assert 0 < probe(version) < 1
