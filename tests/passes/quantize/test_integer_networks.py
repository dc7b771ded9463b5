"""Networks that are int8 from end to end: no float between the first and the last conversion.

Small networks in the pattern of real ones, by hone's own quantization and as onnxruntime's
quantizer writes them; what counts is which operators there are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from tvm import relax

from hone import importer, pipeline
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.dataflow import Dataflow
from hone.passes.quantize.match_qdq import match_qdq
from hone.passes.quantize.observe_tensors import STATISTICS, ObserveTensors
from hone.passes.quantize.observer import Range
from hone.passes.quantize.quantize_int8 import Quantization, observed_tensors, quantize_int8
from hone.passes.quantize.slice_splits import SliceSplits
from hone.steps.candidate import prepared
from hone.targets.target import resolve

TARGET = resolve("host")


class Net:
    """Writes a float model node by node."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.channels = {"x": 3}

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, op: str, *inputs: str, channels: int = 0, outputs: int = 1, **attrs: Any) -> Any:
        name = f"{op.lower()}{len(self.nodes)}"
        results = [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), results, name=name, **attrs))
        self.channels.update(dict.fromkeys(results, channels or self.channels[inputs[0]]))
        return results[0] if outputs == 1 else results

    def conv(self, x: str, filters: int, taps: int = 3, stride: int = 1, groups: int = 1) -> str:
        depth = self.channels[x] // groups
        weight = self.rng.standard_normal((filters, depth, taps, taps)) * (depth * taps**2) ** -0.5
        bias = self.constant(self.rng.standard_normal(filters) * 0.2)
        return self.node(
            "Conv", x, self.constant(weight), bias, channels=filters, group=groups,
            strides=[stride] * 2, pads=[taps // 2] * 4, kernel_shape=[taps] * 2,
        )  # fmt: skip

    def head(self, x: str) -> str:
        x = self.node("Flatten", self.node("GlobalAveragePool", x))
        weight = self.rng.standard_normal((self.channels[x], 5))
        return self.node("Gemm", x, self.constant(weight), self.constant(np.zeros(5)))

    def model(self, output: str) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", 1, (1, 3, 16, 16))
        graph = helper.make_graph(
            self.nodes, "net", [x], [onnx.ValueInfoProto(name=output)], self.constants
        )
        opsets = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def residual(net: Net) -> str:
    x = net.node("Relu", net.conv("x", 8, 7, stride=2))
    x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    y = net.conv(net.node("Relu", net.conv(x, 8)), 8)
    return net.head(net.node("Relu", net.node("Add", y, x)))


def inverted_residual(net: Net) -> str:
    def relu6(x: str) -> str:
        return net.node("Clip", x, net.constant(0.0), net.constant(6.0))

    x = relu6(net.conv("x", 8, stride=2))
    y = relu6(net.conv(relu6(net.conv(x, 24, 1)), 24, groups=24))
    return net.head(net.node("Add", x, net.conv(y, 8, 1)))


def unet(net: Net) -> str:
    skip = net.node("Relu", net.conv("x", 8))
    x = net.node("MaxPool", skip, kernel_shape=[2, 2], strides=[2, 2])
    x = net.node("Relu", net.conv(x, 16))
    weight = net.constant(net.rng.standard_normal((16, 8, 2, 2)) * 0.25)
    up = net.node("ConvTranspose", x, weight, channels=8, strides=[2, 2], kernel_shape=[2, 2])
    x = net.node("Concat", skip, up, channels=16, axis=1)
    return net.conv(net.node("Relu", net.conv(x, 8)), 2, 1)


def resized(net: Net) -> str:
    x = net.node("Relu", net.conv("x", 8, stride=2))
    scales = net.constant([1, 1, 2, 2])
    x = net.node(
        "Resize", x, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )  # fmt: skip
    return net.conv(x, 2)


def squeezed(net: Net) -> str:
    def silu(x: str) -> str:
        return net.node("Mul", x, net.node("Sigmoid", x))

    x = silu(net.conv("x", 8, stride=2))
    y = silu(net.conv(silu(net.conv(x, 24, 1)), 24, 5, groups=24))
    gate = net.conv(silu(net.conv(net.node("GlobalAveragePool", y), 4, 1)), 24, 1)
    y = net.conv(net.node("Mul", y, net.node("Sigmoid", gate)), 8, 1)
    return net.head(silu(net.node("Add", x, y)))


def hard(net: Net) -> str:
    """MobileNetV3: hard swish, hard sigmoid."""
    x = net.node("HardSwish", net.conv("x", 8, stride=2))
    gate = net.conv(net.node("Relu", net.conv(net.node("GlobalAveragePool", x), 4, 1)), 8, 1)
    gate = net.node("HardSigmoid", gate, alpha=1 / 6, beta=0.5)
    return net.head(net.node("HardSwish", net.conv(net.node("Mul", x, gate), 16, 1)))


def shuffled(net: Net) -> str:
    """ShuffleNet, with the groups of its first version."""
    x = net.node("Relu", net.conv("x", 8, stride=2))
    sizes = net.constant([4, 4], np.int64)
    left, right = net.node("Split", x, sizes, channels=4, outputs=2, axis=1)
    right = net.node("Relu", net.conv(net.conv(right, 4, groups=4), 4, 1, groups=2))
    x = net.node("Concat", left, right, channels=8, axis=1)
    x = net.node("Reshape", x, net.constant([1, 2, 4, 8, 8], np.int64))
    x = net.node("Transpose", x, perm=[0, 2, 1, 3, 4])
    x = net.node("Reshape", x, net.constant([1, 8, 8, 8], np.int64), channels=8)
    return net.head(net.node("Relu", net.conv(x, 8, 1)))


NETWORKS = [residual, inverted_residual, unet, resized, squeezed, hard, shuffled]
Build = Callable[[Net], str]


def of_float(module: tvm.IRModule) -> list[str]:
    """Return what computes in float, but for conversions and what the network returns."""
    graph = Dataflow(module["main"])
    last: set[relax.Expr] = set(graph.outputs)
    found = []
    for binding in reversed(graph.bindings):
        call = binding.value
        if not isinstance(call, relax.Call) or str(binding.var.ty.dtype) != "float32":
            continue
        name = str(call.op.name)
        moves = name in ("relax.permute_dims", "relax.reshape")
        if binding.var in last:
            # The last layer's sums are its real values; moving them is no arithmetic.
            last.update(x for x in call.args if moves and isinstance(x, relax.Var))
        elif name not in ("hone.quantize", "hone.dequantize") and not (
            moves and call.args[0].same_as(module["main"].params[0])
        ):
            found.append(name)
    return found


def run(module: tvm.IRModule, x: np.ndarray) -> list[np.ndarray]:
    scheduled = pipeline.schedule(
        pipeline.lower(module, TARGET, threads=2), TARGET, threads=2
    ).module
    vm = relax.VirtualMachine(pipeline.build_executable(scheduled, TARGET, threads=2), tvm.cpu())
    result = vm["main"](tvm.runtime.tensor(x))
    return [r.numpy() for r in ([result] if isinstance(result, tvm.runtime.Tensor) else result)]


def own(model: onnx.ModelProto, x: np.ndarray) -> Quantization:
    """Quantize by hone, with the ranges of one sample."""
    module = apply(prepared(importer.load(model)), SliceSplits(), ToNHWC())
    names = observed_tensors(module)
    results = run(apply(module, ObserveTensors(tensors=names)), x)
    ranges = {
        name: Range(
            minimum=float(results[STATISTICS * i].min()),
            maximum=float(results[STATISTICS * i + 1].max()),
        )
        for i, name in enumerate(names)
    }
    return quantize_int8(module, ranges)


def sample() -> np.ndarray:
    return np.random.default_rng(8).standard_normal((1, 3, 16, 16)).astype(np.float32)


def reference(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_own_quantization_leaves_no_float_inside(build: Build) -> None:
    net = Net()
    model = net.model(build(net))
    x = sample()
    result = own(model, x)
    assert result.skipped == ()
    assert of_float(result.module) == []
    assert len(result.conversions) == 1
    want, got = reference(model, x), run(result.module, x)[0]
    # Ten layers at most, each of half a percent.
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


class Samples(CalibrationDataReader):
    def __init__(self) -> None:
        self._left = [{"x": sample()}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._left.pop() if self._left else None


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_model_of_the_quantizer_has_no_float_inside(
    build: Build, symmetric: bool, tmp_path: Path
) -> None:
    net = Net()
    onnx.save(net.model(build(net)), tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Samples(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        per_channel=symmetric,
        extra_options={"WeightSymmetric": symmetric},
    )
    model = onnx.load(tmp_path / "int8.onnx")
    imported = importer.load(model)
    result = match_qdq(imported.module)
    assert result.skipped == ()
    assert of_float(result.module) == []
    x = sample()
    want, got = reference(model, x), run(imported.module, x)[0]
    # A level more or less here and there, where float rounding decided.
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
