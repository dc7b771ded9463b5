"""Who hands tensors to whom."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax

from hone.mixed.tensor_graph import INPUT, OUTPUT, Edge, tensor_graph

Emit = Callable[[relax.Expr, str], relax.Var]
SHAPE = (1, 5, 5, 4)


def network(body: Callable[[relax.Var, Emit], relax.Expr]) -> tvm.IRModule:
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            value = body(x, lambda expr, name: block.emit(expr, name))
            out = block.emit_output(value, name_hint="y")
        block.emit_func_output(out)
    return block.get()


def conv(data: relax.Expr, seed: int) -> relax.Expr:
    weight = np.random.default_rng(seed).normal(size=(4, 3, 3, 4)).astype(np.float32)
    return relax.op.nn.conv2d(
        data, relax.const(weight), padding=1, data_layout="NHWC", kernel_layout="OHWI"
    )


def pairs(edges: tuple[Edge, ...]) -> set[tuple[str, str]]:
    return {(edge.left, edge.right) for edge in edges}


def test_activation_and_pooling_belong_to_the_layer_before_them():
    def body(x, emit):
        a = emit(relax.op.nn.relu(emit(conv(x, 0), "a")), "relu")
        pooled = emit(relax.op.nn.max_pool2d(a, (2, 2), (2, 2), layout="NHWC"), "pool")
        return emit(conv(pooled, 1), "b")

    graph = tensor_graph(network(body), ["a", "b"])
    assert graph.layers == ("a", "b")
    assert pairs(graph.edges) == {(INPUT, "a"), ("a", "b"), ("b", OUTPUT)}
    # What is read by b is the pooled tensor of 1 x 2 x 2 x 4.
    assert next(e.elements for e in graph.edges if e.right == "b") == 16


def test_sum_of_a_residual_stands_between_its_layers():
    def body(x, emit):
        a = emit(relax.op.nn.relu(emit(conv(x, 0), "a")), "relu")
        b = emit(conv(a, 1), "b")
        total = emit(relax.op.nn.relu(emit(relax.op.add(b, a), "sum")), "relu2")
        return emit(conv(total, 2), "c")

    graph = tensor_graph(network(body), ["a", "b", "c"])
    assert graph.free == ("sum@sum",)
    assert pairs(graph.edges) == {
        (INPUT, "a"),
        ("a", "b"),
        ("a", "sum@sum"),
        ("b", "sum@sum"),
        ("sum@sum", "c"),
        ("c", OUTPUT),
    }
    # The tensor of a has two readers, who share its conversion.
    assert [e.elements for e in graph.edges if e.left == "a"] == [50, 50]


def test_operator_without_an_integer_form_is_fixed_to_float():
    def body(x, emit):
        a = emit(relax.op.nn.softmax(emit(conv(x, 0), "a")), "softmax")
        return emit(conv(a, 1), "b")

    graph = tensor_graph(network(body), ["a", "b"])
    assert "softmax@float" in graph.fixed
    assert {("a", "softmax@float"), ("softmax@float", "b")} <= pairs(graph.edges)


def test_function_belongs_to_the_layer_before_it_and_a_product_stands_between_layers():
    def body(x, emit):
        a = emit(relax.op.nn.gelu(emit(conv(x, 0), "a")), "gelu")
        b = emit(relax.op.sigmoid(emit(conv(a, 1), "b")), "gate")
        return emit(conv(emit(relax.op.multiply(a, b), "product"), 2), "c")

    graph = tensor_graph(network(body), ["a", "b", "c"])
    assert graph.free == ("product@sum",)
    assert pairs(graph.edges) == {
        (INPUT, "a"),
        ("a", "b"),
        ("a", "product@sum"),
        ("b", "product@sum"),
        ("product@sum", "c"),
        ("c", OUTPUT),
    }
