"""A block of GPT-2 as exporters write it, end to end: its attention is one kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

import hone
from hone import pipeline
from hone.targets.target import Target

TOKENS, HEADS, WIDTH, INNER = 21, 3, 48, 80
DEPTH = WIDTH // HEADS


class Graph:
    """Collects nodes and seeded weights."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(11)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, *shape: int) -> str:
        return self.array((self.rng.standard_normal(shape) / np.sqrt(shape[0])).astype("float32"))

    def array(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"n{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names


def triangle(g: Graph) -> str:
    """Return what `torch.tril(torch.ones(n, n))` is exported as, without a constant of n by n."""
    size = g.array(np.array([1, 1, TOKENS, TOKENS], np.int64))
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    ones = g("ConstantOfShape", size, value=one)
    return g("Cast", g("Trilu", ones, upper=0), to=TensorProto.BOOL)


def block(masked: bool) -> Any:
    g = Graph()
    split = g.array(np.full(3, WIDTH, np.int64))
    heads = g.array(np.array([0, 0, HEADS, DEPTH], np.int64))
    flat = g.array(np.array([0, 0, WIDTH], np.int64))
    normed = g("LayerNormalization", "x", g.weight(WIDTH), g.weight(WIDTH), axis=-1)
    packed = g("Add", g("MatMul", normed, g.weight(WIDTH, 3 * WIDTH)), g.weight(3 * WIDTH))
    query, key, value = g("Split", packed, split, outputs=3, axis=-1)
    query, value = (
        g("Transpose", g("Reshape", x, heads), perm=[0, 2, 1, 3]) for x in (query, value)
    )
    key = g("Transpose", g("Reshape", key, heads), perm=[0, 2, 3, 1])
    scores = g("Div", g("MatMul", query, key), g.array(np.sqrt(np.float32(DEPTH))))
    least = g.array(np.finfo(np.float32).min)
    scores = g("Where", triangle(g), scores, least)
    if masked:
        rest = g("Sub", g.array(np.float32(1)), g("Cast", "mask", to=TensorProto.FLOAT))
        bias = g("Mul", g("Unsqueeze", rest, g.array(np.array([1, 2], np.int64))), least)
        scores = g("Add", scores, bias)
    result = g("MatMul", g("Softmax", scores, axis=-1), value)
    result = g("Reshape", g("Transpose", result, perm=[0, 2, 1, 3]), flat)
    x = g("Add", "x", g("MatMul", result, g.weight(WIDTH, WIDTH)))
    normed = g("LayerNormalization", x, g.weight(WIDTH), g.weight(WIDTH), axis=-1)
    inner = g("Gelu", g("MatMul", normed, g.weight(WIDTH, INNER)), approximate="tanh")
    g.nodes.append(helper.make_node("Add", [x, g("MatMul", inner, g.weight(INNER, WIDTH))], ["y"]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, TOKENS, WIDTH])]
    if masked:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.INT64, [2, TOKENS]))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, TOKENS, WIDTH])
    graph = helper.make_graph(g.nodes, "block", inputs, [output], g.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "causal and padded"])
def test_a_block_of_gpt2_agrees_with_onnxruntime(target: Target, masked: bool) -> None:
    proto = block(masked)
    rng = np.random.default_rng(12)
    feeds = {"x": rng.standard_normal((2, TOKENS, WIDTH)).astype("float32")}
    if masked:
        # Padded on the left: the first rows see only padding.
        feeds["mask"] = (np.arange(TOKENS) >= np.array([[0], [4]])).astype(np.int64)
    model = hone.load(proto)
    scheduled = pipeline.schedule(
        pipeline.lower(model.module, target, threads=2), target, threads=2
    )
    rules = [decision.rule for decision in scheduled.decisions]
    assert rules.count("attention") == 1
    assert "batch_matmul" not in rules
    executable = pipeline.build_executable(scheduled.module, target, threads=2)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    given = [tvm.runtime.tensor(feeds[spec.name]) for spec in model.signature.inputs]
    actual = machine["main"](*given).numpy()
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (exact,) = session.run(None, feeds)
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-4)
