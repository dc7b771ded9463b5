"""Networks in AMX tiles: in int8 equal, bit for bit, to those in vectors; in bfloat16 near them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from hone import driver, importer, pipeline, runtime
from hone.model import Model
from hone.steps import half
from hone.steps.candidate import Context
from hone.steps.options.half import Bf16Step
from hone.targets.half_dot import HalfDot, half_dot_of
from hone.targets.integer_dot import IntegerDot, integer_dot_of
from hone.targets.target import Target, resolve

SHAPE = (2, 16, 31, 29)
"""Large enough that the second layer runs on several threads."""


def network() -> onnx.ModelProto:
    """Return a float network of every kind of layer that tiles compute.

    3x3, strided, 1x1, a residual, two images whose width no tile divides, and a classifier.
    """
    rng = np.random.default_rng(5)
    nodes, weights = [], []

    def conv(name: str, source: str, filters: int, depth: int, taps: int, stride: int = 1) -> str:
        spread = np.sqrt(depth) * taps
        weight = (rng.normal(size=(filters, depth, taps, taps)) / spread).astype(np.float32)
        bias = rng.normal(size=filters).astype(np.float32) * 0.1
        weights.append(numpy_helper.from_array(weight, f"{name}_w"))
        weights.append(numpy_helper.from_array(bias, f"{name}_b"))
        nodes.append(
            helper.make_node(
                "Conv",
                [source, f"{name}_w", f"{name}_b"],
                [name],
                name,
                pads=[taps // 2] * 4,
                strides=[stride, stride],
            )
        )
        return name

    def relu(source: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [f"{source}_relu"], f"{source}_relu"))
        return f"{source}_relu"

    first = relu(conv("first", "image", 48, 16, 3))
    second = conv("second", first, 48, 48, 3)
    nodes.append(helper.make_node("Add", [second, first], ["joined"], "joined"))
    third = relu(conv("third", relu("joined"), 72, 48, 3, stride=2))
    fourth = relu(conv("fourth", third, 96, 72, 1))
    nodes.append(helper.make_node("GlobalAveragePool", [fourth], ["pooled"], "pooled"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], "flat"))
    matrix = (rng.normal(size=(96, 10)) / 10).astype(np.float32)
    weights.append(numpy_helper.from_array(matrix, "classifier_w"))
    nodes.append(helper.make_node("MatMul", ["flat", "classifier_w"], ["scores"], "classifier"))
    graph = helper.make_graph(
        nodes,
        "tiles",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, (SHAPE[0], 10))],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


class Samples(CalibrationDataReader):
    """A few random images."""

    def __init__(self, images: np.ndarray) -> None:
        self._feeds = iter([{"image": image} for image in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(6).normal(size=(4, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, images) -> Model:
    folder: Path = tmp_path_factory.mktemp("tiles")
    source, result = (str(folder / f"{name}.onnx") for name in ("source", "quantized"))
    onnx.save(network(), source)
    quantize_static(
        source,
        result,
        Samples(images),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return importer.load(onnx.load(result))


@pytest.fixture(scope="module")
def with_tiles() -> Target:
    host = resolve("host")
    if integer_dot_of(host) not in (IntegerDot.VPDPBUSD, IntegerDot.TDPBUSD):
        pytest.skip("this machine has no VNNI, which layers too small for tiles use")
    features = tuple(sorted({*host.features, "amx-int8", "amx-tile"}))
    return replace(host, features=features, tensor_instructions=("amx-int8",))


def run(model: Model, target: Target, images: np.ndarray) -> np.ndarray:
    runner = runtime.load(driver.assemble(model, target=target, threads=2).package)
    return np.stack([next(iter(runner.run({"image": image}).values())) for image in images])


def test_network_in_tiles_equals_the_one_in_vectors(
    amx, quantized, with_tiles, images, monkeypatch
) -> None:
    amx.pretend(monkeypatch)
    before = amx.counts()
    tiles = run(quantized, with_tiles, images)
    if before is not None:
        used = {name: n - before[name] for name, n in amx.counts().items()}
        assert used["tdpbusd"] > 0
        # Every thread that took tiles has given them back, and there was more than one.
        assert used["ldtilecfg"] == used["tilerelease"] > 4 * len(images)
    vectors = run(quantized, with_tiles.without("amx-tile"), images)
    np.testing.assert_array_equal(tiles, vectors)
    session = onnxruntime.InferenceSession(
        quantized.source.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    reference = np.stack([session.run(None, {"image": image})[0] for image in images])
    # Two requantizations in a row may each round a tie to the other side.
    assert np.abs(tiles - reference).max() < 0.05 * np.abs(reference).max()


@pytest.fixture(scope="module")
def with_half_tiles() -> Target:
    host = resolve("host")
    if half_dot_of(host) not in (HalfDot.VDPBF16PS, HalfDot.TDPBF16PS):
        pytest.skip("this machine has no AVX512-BF16, which layers too small for tiles use")
    features = tuple(sorted({*host.features, "amx-bf16", "amx-tile"}))
    return replace(host, features=features, tensor_instructions=("amx-bf16",))


def test_network_of_bfloat16_in_tiles_is_near_the_one_in_vectors(
    amx, with_half_tiles, images, monkeypatch
) -> None:
    amx.pretend(monkeypatch)
    before = amx.counts()
    model = importer.load(network())
    context = Context(target=with_half_tiles, threads=2, calibration=None)
    reduced = half.propose(model, Bf16Step(kind="bf16"), context).model
    tiles = run(reduced, with_half_tiles, images)
    if before is not None:
        used = {name: n - before[name] for name, n in amx.counts().items()}
        assert used["tdpbf16ps"] > 0
        assert used["tdpbusd"] == 0
        assert used["ldtilecfg"] == used["tilerelease"] > 4 * len(images)
    vectors = run(reduced, with_half_tiles.without("amx-bf16"), images)
    session = onnxruntime.InferenceSession(
        network().SerializeToString(), providers=["CPUExecutionProvider"]
    )
    reference = np.stack([session.run(None, {"image": image})[0] for image in images])
    # Sums in another order may round to the neighbouring bfloat16 in each of five layers: a few
    # units of 2**-9; what rounding itself costs against float32 is of the same size.
    largest = np.abs(reference).max()
    assert np.abs(tiles - vectors).max() < 2**-7 * largest
    assert np.abs(tiles - reference).max() < 2**-6 * largest
    assert np.abs(vectors - reference).max() < 2**-6 * largest


def test_layers_take_tiles_where_the_model_says_they_pay(quantized, with_tiles) -> None:
    lowered = pipeline.lower(quantized.module, with_tiles, threads=2)
    decisions = pipeline.schedule(lowered, with_tiles, threads=2).decisions
    assert not [decision.reason for decision in decisions if decision.reason]
    rules = [decision.rule for decision in decisions]
    assert rules.count("tiles") == 4
    plain = with_tiles.without("amx-tile")
    lowered = pipeline.lower(quantized.module, plain, threads=2)
    rules = [decision.rule for decision in pipeline.schedule(lowered, plain, threads=2).decisions]
    assert "tiles" not in rules


def test_code_for_sapphire_rapids_has_tile_products(quantized) -> None:
    target = resolve("sapphirerapids")
    scheduled = pipeline.schedule(
        pipeline.lower(quantized.module, target, threads=4), target, threads=4
    )
    executable = pipeline.build_executable(scheduled.module, target, threads=4)
    (library,) = (module for module in executable.mod.imports if module.kind == "llvm")
    words = {line.split()[0] for line in library.inspect_source("asm").splitlines() if line.strip()}
    assert {"ldtilecfg", "tdpbusd", "tilerelease"} <= words
