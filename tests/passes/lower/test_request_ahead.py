"""Requests for what a later kernel reads."""

from __future__ import annotations

import tvm
from tvm.ir import assert_structural_equal
from tvm.script import tirx as T  # noqa: N812

from hone.passes.apply import apply
from hone.passes.lower.raw_kernels import RawKernels
from hone.passes.lower.request_ahead import RequestAhead, Turns, turns_of


@T.prim_func(s_tir=True)
def product(
    a: T.Buffer((6, 5), "float32"), b: T.Buffer((5, 8), "float32"), c: T.Buffer((6, 8), "float32")
):
    T.func_attr({"tirx.noalias": True})
    with T.sblock("root"):
        for i in T.parallel(3):
            for k in range(5):
                for j in T.unroll(2):
                    for lane in T.vectorized(8):
                        with T.sblock("sum"):
                            vi = T.axis.spatial(6, i * 2 + j)
                            vj, vk = T.axis.remap("SR", [lane, k])
                            c[vi, vj] = c[vi, vj] + a[vi, vk] * b[vk, vj]


@T.prim_func(s_tir=True)
def copy(a: T.Buffer((6,), "float32"), c: T.Buffer((6,), "float32")):
    with T.sblock("root"):
        for i in T.parallel(6):
            with T.sblock("copy"):
                vi = T.axis.spatial(6, i)
                c[vi] = a[vi]


def test_turns_are_those_of_the_loop_of_sums() -> None:
    assert turns_of(product) == Turns(number=15, operations=16, steps=5)


def test_a_copy_has_no_turns() -> None:
    assert turns_of(copy) is None


def test_each_turn_requests_a_line_and_the_caller_says_which() -> None:
    module = apply(tvm.IRModule({"product": product, "copy": copy}), RawKernels())
    after = apply(module, RequestAhead(["product"]))
    names = [parameter.name for parameter in after["product"].params]
    assert names == ["a", "b", "c", "ahead", "ahead_step"]
    text = after["product"].script()
    assert text.count("llvm.prefetch") == 1
    assert '* T.int64(5) + T.Cast("int64", k)) * ahead_step' in text
    assert_structural_equal(after["copy"], module["copy"])


def test_nothing_changes_where_no_kernel_is_named() -> None:
    module = apply(tvm.IRModule({"product": product}), RawKernels())
    assert_structural_equal(apply(module, RequestAhead([])), module)
