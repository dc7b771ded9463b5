"""Gelu as exporters write it: what is found, what is left alone, and what the kernel computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from scipy.special import ndtr
from tvm import relax

from hone import pipeline
from hone.passes.lower.fuse_gelu import FuseGelu
from hone.targets.target import resolve

op = relax.op
RunOp = Callable[..., tuple[np.ndarray, list[str]]]
Make = Callable[[Callable[[relax.Expr], relax.Var], relax.Expr], relax.Expr]


def number(value: float) -> relax.Expr:
    return relax.const(value, "float32")


def module_of(make: Make, dtype: str = "float32") -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3, 37), dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(make(builder.emit, x))
        builder.emit_func_output(result)
    return builder.get()


def shifted(
    emit: Callable[[relax.Expr], relax.Var], x: relax.Expr, scale: float = 0.5
) -> relax.Var:
    erf = emit(op.erf(emit(op.multiply(x, number(math.sqrt(scale))))))
    return emit(op.add(number(1.0), erf))


def divided(emit: Callable[[relax.Expr], relax.Var], x: relax.Expr) -> relax.Expr:
    erf = emit(op.erf(emit(op.divide(x, number(math.sqrt(2.0))))))
    product = emit(op.multiply(x, emit(op.add(erf, number(1.0)))))
    return op.multiply(product, number(0.5))


FOUND: dict[str, Make] = {
    "divided, half last": divided,
    "half first": lambda emit, x: op.multiply(emit(op.multiply(x, number(0.5))), shifted(emit, x)),
    "half of the sum": lambda emit, x: op.multiply(
        x, emit(op.multiply(number(0.5), shifted(emit, x)))
    ),
    "divided by 2": lambda emit, x: op.divide(emit(op.multiply(shifted(emit, x), x)), number(2.0)),
}


@pytest.mark.parametrize("form", FOUND)
def test_gelu_is_found_in_every_form(form: str) -> None:
    expected = module_of(lambda _emit, x: op.nn.gelu(x))
    tvm.ir.assert_structural_equal(FuseGelu()(module_of(FOUND[form])), expected)


def test_gelu_times_a_number_keeps_the_number() -> None:
    def make(emit: Callable[[relax.Expr], relax.Var], x: relax.Expr) -> relax.Expr:
        return op.multiply(emit(op.multiply(x, shifted(emit, x))), number(3.0))

    expected = module_of(lambda emit, x: op.multiply(emit(op.nn.gelu(x)), number(6.0)))
    tvm.ir.assert_structural_equal(FuseGelu()(module_of(make)), expected)


def test_gelu_without_the_half_that_something_else_reads_too_stays_there() -> None:
    def make(emit: Callable[[relax.Expr], relax.Var], x: relax.Expr) -> relax.Expr:
        double = emit(op.multiply(x, shifted(emit, x)))
        return op.add(emit(op.multiply(double, number(0.5))), double)

    def expected(emit: Callable[[relax.Expr], relax.Var], x: relax.Expr) -> relax.Expr:
        double = emit(op.multiply(emit(op.nn.gelu(x)), number(2.0)))
        return op.add(emit(op.multiply(double, number(0.5))), double)

    tvm.ir.assert_structural_equal(FuseGelu()(module_of(make)), module_of(expected))


REJECTED: dict[str, Make] = {
    "another scale": lambda emit, x: op.multiply(
        emit(op.multiply(x, shifted(emit, x, 0.6))), number(0.5)
    ),
    "another factor": lambda emit, x: op.multiply(
        emit(op.multiply(emit(op.abs(x)), shifted(emit, x))), number(0.5)
    ),
    "another constant": lambda emit, x: op.multiply(
        x,
        emit(op.add(emit(op.erf(emit(op.multiply(x, number(math.sqrt(0.5)))))), number(2.0))),
    ),
    "three factors": lambda emit, x: op.multiply(
        emit(op.multiply(x, emit(op.abs(x)))), shifted(emit, x)
    ),
    "a sum alone": lambda emit, x: shifted(emit, x),
}


@pytest.mark.parametrize("form", REJECTED)
def test_what_is_no_gelu_stays_as_it_is(form: str) -> None:
    before = module_of(lambda emit, x: emit(REJECTED[form](emit, x)))
    assert FuseGelu()(before)["main"].same_as(before["main"])


def test_gelu_of_other_floats_stays_as_it_is() -> None:
    def make(emit: Callable[[relax.Expr], relax.Var], x: relax.Expr) -> relax.Expr:
        root, one, half = (relax.const(v, "float16") for v in (math.sqrt(0.5), 1.0, 0.5))
        erf = emit(op.erf(emit(op.multiply(x, root))))
        return op.multiply(emit(op.multiply(x, emit(op.add(erf, one)))), half)

    before = module_of(make, "float16")
    assert FuseGelu()(before)["main"].same_as(before["main"])


def test_gelu_is_within_a_rounding_of_float64(run_op: RunOp, rng: np.random.Generator) -> None:
    # 37 columns are no whole number of vectors.
    x = np.concatenate([np.linspace(-14.5, 14.5, 20017), rng.normal(size=20016)]).astype("float32")
    x = x[: x.size // 37 * 37].reshape(-1, 37)

    def make(x: relax.Expr) -> relax.Expr:
        erf = op.erf(op.multiply(x, number(math.sqrt(0.5))))
        return op.multiply(op.multiply(x, op.add(erf, number(1.0))), number(0.5))

    actual, _ = run_op(make, x)
    wide = x.astype("float64")
    exact = wide * ndtr(wide)
    assert np.abs(actual - exact).max(where=np.abs(x) <= 4, initial=0) <= 3.5e-7
    # Beyond, half a unit of the result's last place is more than the polynomial's error.
    np.testing.assert_allclose(actual, exact, rtol=1.5e-7, atol=3.5e-7)


def test_a_gelu_of_its_own_is_shared_by_threads() -> None:
    # Some 27 operations for an element: 65 536 elements take long enough for two threads.
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((128, 512), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(op.nn.gelu(x))
        builder.emit_func_output(result)
    target = resolve("x86-64-v4")
    lowered = pipeline.lower(builder.get(), target, threads=2)
    scheduled = pipeline.schedule(lowered, target, threads=2).module
    assert "T.parallel" in scheduled.script()
