"""Rounding to int32 in one instruction."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import te, tirx
from tvm_ffi import structural_walk

from hone import pipeline
from hone.passes.lower.round_to_int import RoundToInt
from hone.targets.features import missing
from hone.targets.target import resolve

LENGTH = 37  # whole vectors and a rest


def rounding(dtype: str = "int32") -> tirx.PrimFunc:
    x = te.placeholder((LENGTH,), "float32", name="x")
    y = te.compute((LENGTH,), lambda i: tirx.Cast(dtype, tirx.round(x[i])), name="y")
    return te.create_prim_func([x, y])


def operators(func: tirx.PrimFunc) -> set[str]:
    found: set[str] = set()
    structural_walk(
        func.body,
        (
            (
                tvm.ir.Call,
                lambda call: found.add(str(call.op.name)) if hasattr(call.op, "name") else None,
            ),
        ),
    )
    return found


def lowered(target: str, dtype: str = "int32") -> set[str]:
    func = rounding(dtype).with_attr("target", resolve(target).tvm_target(1))
    module = RoundToInt()(tvm.IRModule({"main": func}))
    return operators(module["main"])


def test_a_rounded_number_that_becomes_int32_is_one_operator_on_x86() -> None:
    assert "tirx.hone_round_to_int" in lowered("x86-64-v3")
    assert "tirx.round" not in lowered("x86-64-v3")


@pytest.mark.parametrize(("target", "dtype"), [("rpi4", "int32"), ("x86-64-v3", "int64")])
def test_other_processors_and_types_stay_as_they_are(target: str, dtype: str) -> None:
    assert "tirx.round" in lowered(target, dtype)


@pytest.mark.parametrize("name", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_ties_go_to_the_even_number(name: str) -> None:
    target = resolve(name)
    lacking = missing(target.features, target.arch)
    if lacking:
        pytest.skip(f"this machine lacks {', '.join(lacking)}")
    schedule = tvm.s_tir.Schedule(tvm.IRModule({"main": rounding()}))
    (loop,) = schedule.get_loops(schedule.get_sblock("y"))
    schedule.vectorize(schedule.split(loop, [None, 8])[1])
    built = tvm.compile(schedule.mod, target.tvm_target(1), tir_pipeline=pipeline.TIR_PIPELINE)
    x = np.concatenate([np.arange(-9, 9.5, 0.5), [2.0**30]])[:LENGTH].astype(np.float32)
    y = tvm.runtime.tensor(np.zeros(LENGTH, np.int32))
    built["main"](tvm.runtime.tensor(x), y)
    np.testing.assert_array_equal(y.numpy(), np.rint(x).astype(np.int32))
