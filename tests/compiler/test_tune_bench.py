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
from hone.tuning.bench import REFERENCE, Bench, Outcome
from hone.tuning.builder import Job, WrongResultError, build, compare, make_arguments
from hone.tuning.sampling import Sampler, copies

HOST = resolve("host").tvm_target(1)
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
def slow(a: T.Buffer((6, 10), "float32"), b: T.Buffer((6, 10), "float32")) -> None:
    for i, j, k in T.grid(6, 10, 20000):
        with T.sblock("slow"):
            y, x, z = T.axis.remap("SSR", [i, j, k])
            with T.init():
                b[y, x] = a[y, x] * T.float32(2)
            b[y, x] = T.max(b[y, x], a[y, x] * T.float32(2) - T.sin(T.Cast("float32", z) + 2.0))


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
        "reference": None,
    }
    return Job(**(facts | changes))


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(workers=2, build_timeout_s=60, run_timeout_s=60)


def measure(
    bench: Bench, jobs: Sequence[Job], seconds: float = 120, reference: Job | None = None
) -> dict[int, Outcome]:
    outcomes = bench.measure(jobs, time.monotonic() + seconds, reference=reference)
    return {outcome.position: outcome for outcome in outcomes}


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
    untuned = job(double, reference=reference, save_reference=True)
    jobs = [job(double, reference=reference), job(triple, reference=reference)]
    outcomes = measure(bench, jobs, reference=untuned)
    assert outcomes[0].reason == ""
    # Inputs are below 1, so the largest right result is just below 2.
    assert outcomes[1].reason.startswith("argument 1 differs by 0.9")


def test_times_are_ratios_to_the_untuned_kernel_of_the_same_round(bench: Bench) -> None:
    outcomes = measure(bench, [job(double), job(slow)], reference=job(double))
    assert sorted(outcomes) == [REFERENCE, 0, 1]
    assert len(outcomes[0].ratios) == len(outcomes[0].seconds) == 3
    assert outcomes[0].ratios == tuple(sorted(outcomes[0].ratios))
    # Hopeless: its warm run says enough.
    assert len(outcomes[1].ratios) == len(outcomes[1].seconds) == 1
    assert outcomes[1].ratios[0] > 3


def test_candidates_are_timed_alone_when_the_untuned_kernel_dies(
    bench: Bench, tmp_path: Path
) -> None:
    reference = str(tmp_path / "right.npz")
    outcomes = measure(
        bench,
        [job(double, reference=reference)],
        reference=job(crash, reference=reference, save_reference=True),
    )
    assert outcomes[REFERENCE].reason == f"its process died ({signal.SIGABRT.name})"
    assert outcomes[0].seconds
    assert outcomes[0].ratios == ()


def test_weights_are_copied_until_they_take_what_those_of_the_network_do() -> None:
    assert copies(0, 1000) == copies(100, 0) == copies(1000, 10) == 1
    assert copies(100, 1000) == 10
    assert copies(100, 1001) == 11
    assert copies(1, 1 << 30) == 16


def test_a_sampler_runs_on_every_copy_of_the_weights_in_turn() -> None:
    library = build(tvm.IRModule({"main": double.with_attr("global_symbol", "main")}), HOST)
    arguments = make_arguments(ARGUMENTS)
    sampler = Sampler(library, arguments, weights=[0], cold_bytes=700)
    sets = sampler._sets
    assert len(sets) == 3  # 240 bytes each
    assert all(used[1] is arguments[1] for used in sets)
    assert len({id(used[0]) for used in sets}) == 3
    assert sampler.warm_up() > 0
    assert 0 < sampler.sample() < 1


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
