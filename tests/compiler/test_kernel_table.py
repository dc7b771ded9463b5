"""Every ONNX node is listed at the kernel that computes it, absorbed ones included."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper

from hone import pipeline
from hone.calibrate import calibrate
from hone.data import Dataset
from hone.importer import load
from hone.kernel_table import converting_kernels, kernel_table, rebound
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.quantize.match_qdq import match_qdq
from hone.passes.quantize.quantize_int8 import quantize_int8
from hone.targets.target import resolve

FOLDER = files("hone.models") / "digits"
TARGET = resolve("x86-64-v3")


def table(model: Model, computed: tvm.IRModule, merged: dict[str, str]) -> dict[str, set[str]]:
    lowered = pipeline.lower(computed, TARGET, threads=1)
    found = kernel_table(model, computed, lowered, merged)
    return {kernel: set(layers) for kernel, layers in found.items()}


def together(kernels: dict[str, set[str]], *layers: str) -> bool:
    return any(set(layers) <= listed for listed in kernels.values())


@pytest.fixture(scope="module")
def digits() -> Model:
    return load(FOLDER / "digits.onnx")


@pytest.fixture(scope="module")
def prepared(digits: Model) -> Model:
    return digits.with_module(apply(digits.module, FoldBatchNorm(), ToNHWC()))


@pytest.fixture(scope="module")
def samples(digits: Model) -> Dataset:
    spec = digits.signature.inputs[0]
    values = np.random.default_rng(0).normal(size=(2, *spec.shape)).astype(np.float32)
    return Dataset(inputs={spec.name: values}, labels=None, source="seeded")


def test_float_kernels_name_every_node_with_batch_norm_where_it_was_folded(digits: Model):
    kernels = table(digits, digits.module, {})
    assert set().union(*kernels.values()) == {layer.id for layer in digits.layers}
    assert together(kernels, "/conv2/Conv", "/bn2/BatchNormalization", "/relu2/Relu")


@pytest.mark.parametrize("keep_float", [(), ("/conv2/Conv",), ("/fc/Gemm", "/conv3/Conv")])
def test_integer_kernels_name_every_node(digits, prepared, samples, keep_float):
    ranges = calibrate(prepared, samples, threads=1)
    result = quantize_int8(prepared.module, ranges, keep_float=keep_float)
    model = rebound(digits, digits.with_module(result.module), result.merged)
    kernels = table(model, result.module, {})
    assert set().union(*kernels.values()) == {layer.id for layer in digits.layers}
    for number in (1, 2, 3):
        names = f"/conv{number}/Conv", f"/bn{number}/BatchNormalization", f"/relu{number}/Relu"
        assert together(kernels, *names)


def test_layers_keep_their_ids_when_they_are_bound_to_what_computes_them(digits, prepared):
    model = rebound(digits, prepared, {})
    assert [layer.id for layer in model.layers] == [layer.id for layer in digits.layers]
    bindings = {layer.id: layer.binding for layer in model.layers}
    assert bindings["/bn1/BatchNormalization"] == "/conv1/Conv"
    assert bindings["/relu1/Relu"] == "/relu1/Relu"


def quantized_block() -> onnx.ModelProto:
    """Build two quantized convolutions and their sum with the quantized input, as exporters do."""
    rng = np.random.default_rng(1)
    initializers: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(value, name))
        return name

    def node(op: str, inputs: list[str], name: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def through_levels(value: str, name: str, scale: float) -> str:
        arguments = [
            constant(f"{name}_scale", np.float32(scale)),
            constant(f"{name}_zero", np.uint8(128)),
        ]
        levels = node("QuantizeLinear", [value, *arguments], f"{name}_q")
        return node("DequantizeLinear", [levels, *arguments], f"{name}_dq")

    def conv(value: str, name: str) -> str:
        levels = rng.integers(-127, 128, (4, 4, 3, 3)).astype(np.int8)
        arguments = [
            constant(f"{name}_w", levels),
            constant(f"{name}_ws", np.float32(0.01)),
            constant(f"{name}_wz", np.int8(0)),
        ]
        weight = node("DequantizeLinear", arguments, f"{name}_wdq")
        return node("Conv", [value, weight], name, pads=[1, 1, 1, 1])

    data = through_levels("x", "x", 0.02)
    first = through_levels(node("Relu", [conv(data, "conv1")], "relu1"), "relu1", 0.05)
    second = through_levels(conv(first, "conv2"), "conv2", 0.05)
    total = through_levels(node("Add", [second, data], "sum"), "sum", 0.1)
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 5, 5])],
        [helper.make_tensor_value_info(total, TensorProto.FLOAT, [1, 4, 5, 5])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_kernels_of_a_quantized_model_name_every_node():
    model = load(quantized_block())
    result = match_qdq(model.module)
    kernels = table(model, result.module, result.merged)
    assert set().union(*kernels.values()) == {layer.id for layer in model.layers}
    assert together(kernels, "conv1", "relu1")
    assert together(kernels, "conv2", "conv2_q")


def test_kernels_that_convert_name_the_tensor(digits, prepared, samples):
    ranges = calibrate(prepared, samples, threads=1)
    result = quantize_int8(prepared.module, ranges, keep_float=["/conv2/Conv"])
    model = rebound(digits, digits.with_module(result.module), result.merged)
    lowered = pipeline.lower(result.module, TARGET, threads=1)
    converts = converting_kernels(model, result.module, lowered)
    texts = {text for each in converts.values() for text in each}
    assert "quantize image" in texts
    assert len(texts) == len(result.conversions)


def test_layer_whose_result_is_the_networks_is_listed_where_it_is_computed():
    rng = np.random.default_rng(2)
    weight = numpy_helper.from_array(rng.normal(size=(8, 4, 3, 3)).astype(np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["y"], name="first", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["y"], ["z"], name="last"),
        ],
        "tail",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 5])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 8, 6, 5])],
        [weight],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    kernels = table(model, model.module, {})
    assert together(kernels, "first", "last")
    assert [kernel for kernel, layers in kernels.items() if not layers] == ["transpose"]
