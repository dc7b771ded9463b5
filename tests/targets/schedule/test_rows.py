"""The row and column templates: what runs in parallel, what is a vector, what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import tvm
from tvm import te

from hone.passes.lower.normalize import _column_softmax, _row_softmax
from hone.passes.lower.reductions import SUM, reduce_rows
from hone.targets.schedule.cpu import schedule_function
from hone.targets.schedule.machine import Machine

MACHINE = Machine(lanes=8, accumulators=12, l1_bytes=1 << 15, l2_bytes=1 << 19, threads=2)


def _scheduled(make: object, shape: tuple[int, ...]) -> tuple[str, str, str]:
    x = te.placeholder(shape, "float32", "x")
    func = te.create_prim_func([x, make(x)])
    func, decision = schedule_function(func, MACHINE, kernel="k")
    return str(func), decision.rule, decision.reason


@pytest.mark.parametrize("extent", [37, 64, 197])
def test_partial_sums_are_vectors_whatever_the_extent(extent: int) -> None:
    text, rule, reason = _scheduled(partial(_row_softmax, logarithm=False, lanes=8), (3, extent))
    assert (rule, reason) == ("rows", "")
    assert text.count("T.vectorized(8)") >= 4  # two sums, each with its start


def test_rows_run_in_parallel_only_when_the_work_pays() -> None:
    make = partial(_row_softmax, logarithm=False, lanes=8)
    assert "T.parallel(" not in _scheduled(make, (4, 32))[0]
    assert "T.parallel(1024)" in _scheduled(make, (4, 256, 128))[0]


def test_columns_are_cut_into_strips_of_whole_vectors() -> None:
    text, rule, _ = _scheduled(partial(_column_softmax, axis=1, logarithm=False), (4, 128, 96))
    assert rule == "columns"
    assert "T.parallel(12)" in text  # 4 x 96 / (4 vectors of 8 lanes)
    assert "T.vectorized(8)" in text


def test_function_is_generic_when_its_output_does_not_begin_with_the_kept_axes() -> None:
    def transposed(x: te.Tensor) -> te.Tensor:
        sums = reduce_rows(lambda i, _, k: x[(*i, k)], [5, 7], 64, SUM, lanes=8)
        return te.compute((7, 5), lambda i, j: sums[j, i], name="out")

    _, rule, reason = _scheduled(transposed, (5, 7, 64))
    assert rule == "generic"
    assert reason == "rows: the output does not begin with the axes that are kept"


def test_schedule_keeps_what_the_function_computes() -> None:
    x = te.placeholder((3, 5), "float32", "x")
    func = te.create_prim_func([x, _row_softmax(x, logarithm=False, lanes=8)])
    before = func.script()
    schedule_function(func, MACHINE, kernel="k")
    tvm.ir.assert_structural_equal(func, tvm.script.from_source(before))
