"""Operations on elements, counted by hand."""

from __future__ import annotations

import pytest
from tvm import te, tirx, topi

from hone.passes.lower import elementary
from hone.profiling.operations import CALL_OPERATIONS, Work, work_of
from hone.targets.half_dot import HalfDot
from hone.targets.half_intrinsics import pair_product, pair_sum

LENGTH = 7
X = te.placeholder((LENGTH,), "float32", name="x")


def work(result: te.Tensor, *inputs: te.Tensor) -> Work:
    return work_of(te.create_prim_func([*inputs, result]).body)


def elementwise(function) -> Work:
    return work(te.compute((LENGTH,), lambda i: function(X[i]), name="y"), X)


def test_each_element_counts():
    found = elementwise(lambda x: x * 2.0 + 1.0)
    assert found == Work(by_dtype={"float32": 2 * LENGTH}, products=LENGTH)
    assert (found.operations, found.dtype) == (2 * LENGTH, "float32")


def test_nothing_counts_where_nothing_is_computed():
    found = work(te.compute((LENGTH,), lambda i: X[(i * 3 + 1) % LENGTH], name="y"), X)
    assert (found.operations, found.dtype) == (0, None)


def test_common_part_counts_once():
    def square_of_sum(x):
        return (x + 1.0) * (x + 1.0)

    assert elementwise(square_of_sum).operations == 2 * LENGTH


def test_border_decided_by_indices_is_free_and_a_choice_by_elements_is_not():
    border = te.compute(
        (LENGTH,), lambda i: tirx.if_then_else(i < 3, X[i], tirx.const(0.0, "float32")), name="y"
    )
    assert work(border, X).operations == 0
    assert elementwise(lambda x: tirx.Select(x > 0.0, x, x * 0.5)).operations == 3 * LENGTH


def test_elementary_function_counts_the_same_wherever_it_stands():
    exp = elementwise(elementary.exp).operations / LENGTH
    assert 20 <= exp <= 40
    assert elementwise(elementary.sigmoid).operations / LENGTH == exp + 3
    assert elementwise(lambda x: x * elementary.sigmoid(x)).operations / LENGTH == exp + 4
    assert elementwise(lambda x: elementary.exp(x * 3.0 + 1.0)).operations / LENGTH == exp + 2


@pytest.mark.parametrize("function", [topi.exp, topi.sin, topi.erf])
def test_function_of_the_library_counts_as_a_fixed_cost(function):
    assert work(function(X), X).operations == CALL_OPERATIONS * LENGTH


def test_square_root_is_an_instruction():
    assert work(topi.sqrt(X), X).operations == LENGTH


def test_pair_of_bfloat16_is_two_multiply_adds():
    rows, words = (
        te.placeholder((3, 5), "int32", name="rows"),
        te.placeholder((5,), "int32", name="words"),
    )
    k = te.reduce_axis((0, 5), "k")
    dot = HalfDot.VDPBF16PS
    sums = te.compute(
        (3,), lambda i: pair_sum(dot)(pair_product(dot, rows[i, k], words[k]), axis=[k]), name="s"
    )
    assert work(sums, rows, words) == Work(by_dtype={"bfloat16": 3 * 5 * 4}, products=3 * 5 * 2)


def test_two_bfloat16_that_become_a_word_count_nothing():
    rows, words = (
        te.placeholder((3, 10), "uint16", name="rows"),
        te.placeholder((5,), "int32", name="words"),
    )
    k = te.reduce_axis((0, 5), "k")
    dot = HalfDot.VDPBF16PS

    def word(i, k):
        low, high = (tirx.Cast("uint32", rows[i, 2 * k + half]) for half in range(2))
        return tirx.reinterpret("int32", low | (high << tirx.const(16, "uint32")))

    sums = te.compute(
        (3,), lambda i: pair_sum(dot)(pair_product(dot, word(i, k), words[k]), axis=[k]), name="s"
    )
    assert work(sums, rows, words) == Work(by_dtype={"bfloat16": 3 * 5 * 4}, products=3 * 5 * 2)


def test_shift_or_union_of_other_bits_counts():
    bits = te.placeholder((LENGTH,), "uint32", name="bits")

    def operations(function) -> float:
        result = te.compute((LENGTH,), lambda i: function(bits[i]), name="y")
        return work(result, bits).operations

    assert operations(lambda x: x << tirx.const(16, "uint32")) == LENGTH
    assert operations(lambda x: x | (x << tirx.const(16, "uint32"))) == 2 * LENGTH


def test_arithmetic_on_levels_is_that_of_bytes_until_it_is_float():
    levels = te.placeholder((LENGTH,), "uint8", name="levels")
    k = te.reduce_axis((0, LENGTH), "k")
    sums = te.compute(
        (1,),
        lambda _: te.sum(levels[k].astype("int32") * levels[k].astype("int32"), axis=k),
        name="s",
    )
    assert work(sums, levels).by_dtype == {"int8": 2 * LENGTH}
    scaled = te.compute((LENGTH,), lambda i: levels[i].astype("float32") * 0.5, name="y")
    assert work(scaled, levels).by_dtype == {"float32": LENGTH}
