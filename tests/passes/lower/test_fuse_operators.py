"""Every call of a fused kernel is traced back to the layers that it computes."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import tvm
from tvm import relax

from hone.passes.lower.fuse_operators import (
    FuseOperators,
    _Origins,
    call_layers,
    kernel_layers,
)


def branches() -> tvm.IRModule:
    """Two equal dense layers with different weights on one input, then the product of both."""
    generator = np.random.default_rng(0)

    def weight(*shape: int) -> relax.Expr:
        return relax.const(generator.standard_normal(shape, dtype=np.float32))

    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((7, 5), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            results = []
            for name in ("query", "key"):
                product = block.emit(relax.op.matmul(x, weight(5, 7)), name_hint=f"{name}@matmul")
                total = block.emit(relax.op.add(product, weight(7)), name_hint=name)
                results.append(block.emit(relax.op.nn.relu(total), name_hint=f"{name}_relu"))
            both = block.emit(relax.op.matmul(*results), name_hint="both")
            parts = block.emit(relax.op.split(both, [2], 1), name_hint="parts")
            first = block.emit(relax.TupleGetItem(parts, 0), name_hint="first")
            result = block.emit_output(relax.op.sum(first, 1))
        block.emit_func_output(result)
    return relax.transform.LegalizeOps()(block.get())


def test_layers_of_every_call_are_listed_when_equal_groups_share_a_function():
    table = kernel_layers(FuseOperators()(branches()))
    shared = next(layers for layers in table.values() if "query@matmul" in layers)
    assert shared == (
        "query@matmul", "query", "query_relu", "key@matmul", "key", "key_relu",
    )  # fmt: skip


def test_calls_of_a_shared_function_are_told_apart():
    table = call_layers(FuseOperators()(branches()))
    shared = next(calls for calls in table.values() if len(calls) == 2)
    assert shared == (("query@matmul", "query", "query_relu"), ("key@matmul", "key", "key_relu"))


def test_no_layer_is_listed_twice_and_none_is_lost():
    table = kernel_layers(FuseOperators()(branches()))
    listed = [layer for layers in table.values() for layer in layers]
    assert len(listed) == len(set(listed))
    assert {"both", "parts", "key_relu"} <= set(listed)


def test_calls_are_told_apart_when_they_share_their_input():
    table = kernel_layers(FuseOperators()(branches()))
    assert not any("query" in layers and "both" in layers for layers in table.values())


def test_values_without_a_name_are_told_apart_by_numbers_not_by_trees_that_double():
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            value: relax.Expr = x
            for _ in range(64):
                value = block.emit(relax.op.add(value, value))
            result = block.emit_output(value)
        block.emit_func_output(result)
    func = block.get()["main"]
    unnamed = relax.Function(func.params, relax.SeqExpr([], x), func.ret_ty)

    origins = _Origins(unnamed)
    names: dict[str, Hashable] = {}
    for binding in func.body.blocks[0].bindings:
        names[str(binding.var.name)] = origins.name(binding, names)
    # A number each; the last binding only hands on what the one before it has.
    assert set(names.values()) == set(range(64))
