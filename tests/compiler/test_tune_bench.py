from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T  # noqa: N812

from hone.targets.target import resolve
from hone.tuning.bench import Bench, Outcome
from hone.tuning.builder import Job, WrongResultError, compare, make_arguments

TARGET = json.dumps(resolve("host").llvm(1))


@T.prim_func(s_tir=True)
def double(a: T.Buffer((6, 10), "float32"), b: T.Buffer((6, 10), "float32")) -> None:
    for i, j in T.grid(6, 10):
        with T.sblock("double"):
            y, x = T.axis.remap("SS", [i, j])
            b[y, x] = a[y, x] * T.float32(2)


@T.prim_func(s_tir=True)
def triple(a: T.Buffer((6, 10), "float32"), b: T.Buffer((6, 10), "float32")) -> None:
    for i, j in T.grid(6, 10):
        with T.sblock("triple"):
            y, x = T.axis.remap("SS", [i, j])
            b[y, x] = a[y, x] * T.float32(3)


@T.prim_func(s_tir=True)
def crash(a: T.Buffer((6, 10), "float32"), b: T.Buffer((6, 10), "float32")) -> None:
    for i, j in T.grid(6, 10):
        with T.sblock("crash"):
            y, x = T.axis.remap("SS", [i, j])
            T.reads(a[y, x])
            T.writes(b[y, x])
            T.evaluate(T.call_extern("int32", "abort"))


@T.prim_func(s_tir=True)
def hang(a: T.Buffer((6, 10), "float32"), b: T.Buffer((6, 10), "float32")) -> None:
    for i, j in T.grid(6, 10):
        with T.sblock("hang"):
            y, x = T.axis.remap("SS", [i, j])
            T.reads(a[y, x])
            T.writes(b[y, x])
            T.evaluate(T.call_extern("int32", "pause"))


ARGUMENTS = (("float32", (6, 10)), ("float32", (6, 10)))


def job(func: tvm.tirx.PrimFunc, **changes: object) -> Job:
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    facts = {
        "module": tvm.ir.save_json(module),
        "target": TARGET,
        "arguments": ARGUMENTS,
        "best_s": None,
        "reference": None,
    }
    return Job(**(facts | changes))


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(workers=2, build_timeout_s=60, run_timeout_s=60)


def measure(bench: Bench, jobs: Sequence[Job], seconds: float = 120) -> dict[int, Outcome]:
    return {o.position: o for o in bench.measure(jobs, time.monotonic() + seconds)}


def test_candidates_are_timed_and_a_bad_one_loses_only_itself(bench: Bench) -> None:
    broken = job(double, module="{}")
    outcomes = measure(bench, [job(double), job(crash), broken, job(triple)])
    assert sorted(outcomes) == [0, 1, 2, 3]
    for good in (0, 3):
        assert outcomes[good].reason == ""
        assert all(0 < seconds < 1 for seconds in outcomes[good].seconds)
    assert outcomes[1].seconds == ()
    assert outcomes[1].reason == f"its process died ({signal.SIGABRT.name})"
    assert outcomes[2].seconds == ()
    assert outcomes[2].reason


def test_a_candidate_that_runs_too_long_is_killed_and_the_next_one_runs() -> None:
    impatient = Bench(workers=2, build_timeout_s=60, run_timeout_s=0.5)
    outcomes = measure(impatient, [job(hang), job(double)])
    assert outcomes[0].reason == "ran longer than 0.5 s"
    assert outcomes[1].seconds


def test_a_candidate_that_builds_too_long_is_killed() -> None:
    impatient = Bench(workers=1, build_timeout_s=0.0, run_timeout_s=60)
    assert measure(impatient, [job(double)])[0].reason == "built longer than 0 s"


def test_candidates_have_no_outcome_when_the_deadline_has_passed(bench: Bench) -> None:
    assert measure(bench, [job(double)], seconds=-1) == {}


def test_a_candidate_that_computes_something_else_fails(bench: Bench, tmp_path: Path) -> None:
    reference = str(tmp_path / "right.npz")
    assert measure(bench, [job(double, reference=reference, save_reference=True)])[0].seconds
    outcomes = measure(bench, [job(double, reference=reference), job(triple, reference=reference)])
    assert outcomes[0].reason == ""
    # Inputs are below 1, so the largest right result is just below 2.
    assert outcomes[1].reason.startswith("argument 1 differs by 0.9")


def test_a_hopeless_candidate_is_timed_once(bench: Bench) -> None:
    outcomes = measure(bench, [job(double, best_s=1e-12), job(double, best_s=1.0)])
    assert [len(outcomes[i].seconds) for i in (0, 1)] == [1, 3]


def test_compare_accepts_rounding_and_refuses_more() -> None:
    right = [np.array([1.0, -4.0, np.nan], "float32"), np.array([3, -7], "int8")]
    compare(right, [right[0] + np.float32(0.0039), right[1] + np.int8(1)])
    with pytest.raises(WrongResultError, match=r"argument 0 differs by 0\.0041 \(limit 0\.004\)"):
        compare(right, [right[0] + np.float32(0.0041), right[1]])
    with pytest.raises(WrongResultError, match=r"argument 1 differs by 2 \(limit 1\)"):
        compare(right, [right[0], right[1] + np.int8(2)])
    with pytest.raises(WrongResultError, match="argument 0 is not finite where it should be"):
        compare(right, [np.array([1.0, np.inf, np.nan], "float32"), right[1]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint8", "bool"])
def test_arguments_are_the_same_every_time(dtype: str) -> None:
    (first,), (second,) = (make_arguments([(dtype, (3, 5))]) for _ in range(2))
    assert str(first.dtype) == dtype
    assert first.numpy().tobytes() == second.numpy().tobytes()


def test_wide_integers_are_zero_because_they_may_be_indices() -> None:
    for tensor in make_arguments([("int64", (4,)), ("int32", (2, 3))]):
        assert not tensor.numpy().any()


def test_floats_have_no_subnormal_numbers() -> None:
    (tensor,) = make_arguments([("float32", (1000,))])
    assert 0.05 <= tensor.numpy().min() < tensor.numpy().max() < 1.0
