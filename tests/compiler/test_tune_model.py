from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from hone.database import Database
from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.target import resolve
from hone.tuning import tasks, whole_model
from hone.tuning.confirm import RECORD, UNTUNED, OutOfTime
from hone.tuning.records import kernels, workload_module
from hone.tuning.running import ROUNDS, RUNS, plan
from hone.tuning.tasks import extract, untuned_model
from hone.tuning.whole_model import Candidates, RunningModel, apart

THREADS = 1
TARGET = resolve("host").tvm_target(THREADS)
ROWS, COLUMNS = 96, 80


def lowered() -> tvm.IRModule:
    """``exp(relu(x @ w) @ w)``: two equal kernels, and one more."""
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((ROWS, COLUMNS), "float32"))
    weight = relax.const(np.full((COLUMNS, COLUMNS), 0.01, "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            value = block.emit(relax.op.nn.relu(relax.op.matmul(x, weight)))
            value = block.emit(relax.op.nn.relu(relax.op.matmul(value, weight)))
            result = block.emit_output(relax.op.exp(value))
        block.emit_func_output(result)
    return relax.get_pipeline("zero")(block.get())


@pytest.fixture(scope="module")
def module() -> tvm.IRModule:
    return lowered()


@pytest.fixture(scope="module")
def model(module: tvm.IRModule) -> RunningModel:
    rule = ScheduleModule(Machine.of(resolve("host"), THREADS))
    return RunningModel(untuned_model(module, rule), TARGET, threads=THREADS)


def candidates(module: tvm.IRModule) -> Candidates:
    """The matmul as it is written, and a record that is none."""
    names = tuple(name for name in kernels(module) if "matmul" in name)
    assert len(names) == 2
    workload = workload_module(kernels(module)[names[0]])
    record = ms.database.TuningRecord(
        Schedule(workload).trace,
        ms.database.Workload(workload),
        [1.0],
        TARGET,
        ms.arg_info.ArgInfo.from_entry_func(workload),
    ).as_json()
    return Candidates(
        functions=names, module=tvm.ir.save_json(workload), records=(record, [[], [1.0], {}, []])
    )


def test_kernels_that_follow_one_another_are_not_timed_together() -> None:
    kernels = {"0": ["a"], "1": ["b", "c"], "2": ["d"], "3": ["e"]}
    assert apart(["a", "b", "d", "c", "e", "e"], kernels) == [["0", "2", "3"], ["1"]]
    assert apart(["a", "other", "b", "d"], kernels) == [["0", "1", "3"], ["2"]]
    assert apart([], {}) == []


def test_a_kernel_whose_operations_nobody_counts_is_a_task_too(
    module: tvm.IRModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> float:
        raise RuntimeError("Do not have a default for prim.Let")

    host = resolve("host")
    rule, database = ScheduleModule(Machine.of(host, 1)), Database(tmp_path, host, threads=1)
    counted = extract(module, database, rule, None)
    monkeypatch.setattr(tasks, "estimate_tir_flops", refuse)
    found = extract(module, database, rule, None)
    assert [task.name for task in found] == [task.name for task in counted]
    assert all(0 < a.estimate_s < b.estimate_s for a, b in zip(found, counted, strict=True))


def test_profile_gives_the_seconds_of_every_kernel_of_the_model(
    model: RunningModel, module: tvm.IRModule
) -> None:
    found = model.profile()
    assert set(found) == set(kernels(module))
    assert all(0 <= seconds < 1 for seconds in found.values())


def test_a_replaced_kernel_runs_in_its_version_of_the_model_only(
    model: RunningModel, module: tvm.IRModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(func: tirx.PrimFunc, *_: object) -> tirx.PrimFunc:
        loop = tirx.Var("again", "int32")
        zero, times = tirx.const(0, "int32"), tirx.const(50, "int32")
        return func.with_body(tirx.For(loop, zero, times, tirx.ForKind.SERIAL, func.body))

    monkeypatch.setattr(whole_model, "replay", slow)
    model.offer({"0": candidates(module)}, time.monotonic() + 60)
    measured = model.kernels({"0": 0})["0"]
    assert measured.slower(RECORD, over=UNTUNED)
    assert len(measured.quiet.seconds[RECORD]) == len(measured.quiet.seconds[UNTUNED])
    assert model.pair({}, {"0": 0}).slower(RECORD, over=UNTUNED)
    whole = model.whole({UNTUNED: {}, "slow": {"0": 0}})
    assert whole.slower("slow", over=UNTUNED)


def test_a_candidate_that_computes_something_else_is_seen_by_the_outputs(
    model: RunningModel, module: tvm.IRModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = candidates(module)
    one = replace(found, functions=found.functions[:1])  # the other one ends with exp
    model.offer({"0": one}, time.monotonic() + 60)
    assert model.right({"0": 0})

    def idle(func: tirx.PrimFunc, *_: object) -> tirx.PrimFunc:
        return func.with_body(tirx.Evaluate(tirx.const(0, "int32")))

    monkeypatch.setattr(whole_model, "replay", idle)
    model.offer({"0": one}, time.monotonic() + 60)
    assert not model.right({"0": 0})


def test_a_record_that_does_not_apply_is_left_out(
    model: RunningModel, module: tvm.IRModule
) -> None:
    model.offer({"0": candidates(module)}, time.monotonic() + 60)
    assert model.kernels({"0": 1}) == {}


def test_the_model_gives_up_when_the_time_is_over(
    model: RunningModel, module: tvm.IRModule
) -> None:
    model.offer({"0": candidates(module)}, time.monotonic())
    with pytest.raises(OutOfTime):
        model.kernels({"0": 0})
    with pytest.raises(OutOfTime):
        model.whole({UNTUNED: {}})


@pytest.mark.parametrize("run_s", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("contenders", [1, 2, 3])
def test_plan_fills_the_time_within_its_limits(run_s: float, contenders: int) -> None:
    rounds = plan(run_s, contenders, 2.0)
    assert ROUNDS[0] <= rounds.rounds <= ROUNDS[1]
    assert RUNS[0] <= rounds.runs - rounds.warmup <= RUNS[1]
    assert rounds.warmup >= 1
    total = contenders * rounds.rounds * rounds.runs * run_s
    assert total <= 2.0 or rounds.rounds == ROUNDS[0]
    assert math.isfinite(total)
