"""The digits network, quantized by onnxruntime, through hone: levels, accuracy, wrong scales."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import hone
from hone import assembling, divergence, driver, importer, models, parity, rounding, runtime
from hone.data import load as load_data
from hone.errors import AccuracyError, UsageError
from hone.importing.qdq import rewrite
from hone.model import Model
from hone.passes.quantize.match_qdq import match_qdq
from hone.reference import Reference
from hone.targets.target import resolve

FOLDER = files("hone.models") / "digits"
FORMS = [("QDQ", "QUInt8", True), ("QDQ", "QInt8", False), ("QOperator", "QUInt8", False)]


class Samples(CalibrationDataReader):
    """Calibration samples, one by one."""

    def __init__(self, name: str, samples: np.ndarray) -> None:
        self._feeds = iter([{name: sample} for sample in samples])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def quantized(
    model: onnx.ModelProto, samples: np.ndarray, folder: Path, form: tuple[str, str, bool]
) -> onnx.ModelProto:
    """Quantize by onnxruntime as its manual says: optimize first, which folds batch norm."""
    style, activations, per_channel = form
    source, folded, result = (str(folder / f"{n}.onnx") for n in ("source", "folded", "result"))
    onnx.save(model, source)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = folded
    onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
    quantize_static(
        folded,
        result,
        Samples(model.graph.input[0].name, samples),
        quant_format=getattr(QuantFormat, style),
        activation_type=getattr(QuantType, activations),
        weight_type=QuantType.QInt8,
        per_channel=per_channel,
    )
    return onnx.load(result)


@pytest.fixture(scope="module", params=FORMS, ids=["-".join(map(str, f)) for f in FORMS])
def digits(request, tmp_path_factory) -> Model:
    with as_file(FOLDER / "digits.onnx") as path:
        model = onnx.load(path)
    with as_file(FOLDER / "calibration.npz") as path:
        samples = np.load(path)["image"][:64, None]
    return importer.load(
        quantized(model, samples, tmp_path_factory.mktemp("digits"), request.param)
    )


def runner(model: Model) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return runtime.load(driver.assemble(model, target=resolve("host"), threads=1).package).run


def test_every_layer_is_integer_between_first_and_last_conversion(digits):
    result = match_qdq(digits.module)
    assert [str(q.kind) for q in result.quantized] == ["conv2d", "conv2d", "conv2d", "dense"]
    assert [q.output for q in result.quantized] == ["uint8"] * 4
    assert result.skipped == ()
    assert len(result.conversions) == 2


def test_top1_is_that_of_onnxruntime(digits):
    data = load_data(str(FOLDER / "evaluation.npz"), digits.signature)
    session = onnxruntime.InferenceSession(
        digits.source.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    run = runner(digits)
    samples = [data.sample(i) for i in range(len(data))]
    ours = np.stack([next(iter(run(s).values())) for s in samples]).argmax(-1)
    theirs = np.stack([session.run(None, s)[0] for s in samples]).argmax(-1)
    difference = np.mean(ours == data.labels) - np.mean(theirs == data.labels)
    assert abs(difference) <= 0.003
    assert np.mean(ours == theirs) > 0.99


def test_package_is_int8_with_the_golden_tolerance_of_int8(digits):
    package = hone.compile(digits, threads=1)
    assert package.manifest.precision == "int8"
    assert set(package.manifest.golden.tolerance.values()) == {assembling.GOLDEN_TOLERANCE["int8"]}
    # It is quantized already: no calibration data is asked for.
    assert hone.compile(digits, threads=1, precision="int8").manifest.precision == "int8"
    with pytest.raises(UsageError) as error:
        hone.compile(digits, threads=1, precision="int8", calibration="random:4")
    assert (
        str(error.value)
        .splitlines()[0]
        .endswith(
            "the model is quantized already and keeps its own levels, so that nothing is left to "
            "calibrate or to choose"
        )
    )


def scales(model: Model) -> list[int]:
    """Return the positions of dequantizations in a model's QDQ form, without those of biases."""
    proto = rewrite(model.source)
    integers = {t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT32}
    return [
        index
        for index, node in enumerate(proto.graph.node)
        if node.op_type == "DequantizeLinear" and node.input[0] not in integers
    ]


def scaled(model: Model, position: int, factor: float) -> onnx.ModelProto:
    """Return the model with one wrong scale, where levels become real values."""
    proto = onnx.ModelProto()
    proto.CopyFrom(rewrite(model.source))
    node = proto.graph.node[position]
    (scale,) = (t for t in proto.graph.initializer if t.name == node.input[1])
    wrong = numpy_helper.to_array(scale) * np.float32(factor)
    proto.graph.initializer.append(numpy_helper.from_array(wrong, "wrong"))
    node.input[1] = "wrong"
    return proto


def test_onnxruntime_with_its_integer_kernels_passes(digits):
    session = onnxruntime.InferenceSession(
        digits.source.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (name,) = (o.name for o in digits.signature.outputs)
    report = parity.check(digits, lambda feeds: {name: session.run(None, feeds)[0]})
    assert report.status == parity.Status.EQUAL


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_any_wrong_scale_is_more_than_rounding_explains(digits, factor):
    positions = scales(digits)
    assert len(positions) >= 9
    right, allowance = (
        Reference(digits.source, threads=1),
        rounding.Allowance(digits.source, threads=1),
    )
    for position in positions:
        wrong = Reference(scaled(digits, position, factor), threads=1)
        excess = []
        for seed in range(2):  # as many samples as a parity check takes
            inputs = parity.random_inputs(digits, seed)
            expected, given = right.run(inputs), wrong.run(inputs)
            (allowed,) = allowance.of(inputs, expected).values()
            (difference,) = (np.abs(given[name] - expected[name]).max() for name in expected)
            excess.append(difference / allowed)
        assert max(excess) > 1


def test_parity_fails_when_a_scale_is_wrong(digits):
    run = Reference(scaled(digits, scales(digits)[3], 1.25), threads=1).run
    with pytest.raises(AccuracyError, match="differs from onnxruntime"):
        parity.check(digits, run)


def test_first_layer_with_a_wrong_scale_is_named(digits):
    nodes = rewrite(digits.source).graph.node
    positions = scales(digits)
    readers = {position: [n.name for n in nodes if nodes[position].output[0] in n.input]
               for position in positions}  # fmt: skip
    position = next(p for p in positions if any("conv2" in name for name in readers[p]))
    wrong = importer.load(scaled(digits, position, 1.25))
    inputs = parity.random_inputs(digits)
    found = divergence.first_divergence(digits.with_module(wrong.module), inputs)
    assert found is not None
    assert "conv2" in found.layer or "onv1" in found.layer
    assert divergence.first_divergence(digits, inputs) is None


@pytest.mark.parametrize("name", ["mobilenetv2"])
def test_deep_network_passes_by_what_its_own_rounding_allows(name, tmp_path):
    samples = np.random.default_rng(0).standard_normal((2, 1, 3, 224, 224)).astype(np.float32)
    model = importer.load(quantized(models.build(name), samples, tmp_path, FORMS[0]))
    result = match_qdq(model.module)
    assert result.skipped == ()
    assert len(result.conversions) == 2
    assert parity.check(model, runner(model), samples=1).status == parity.Status.EQUAL


def test_allowance_is_two_levels_where_rounding_explains_less(digits):
    inputs = parity.random_inputs(digits)
    expected = Reference(digits.source, threads=1).run(inputs)
    allowed = rounding.Allowance(digits.source, threads=1).of(inputs, expected)
    size = rounding.level_sizes(rewrite(digits.source))["logits"]
    assert allowed["logits"] == pytest.approx(rounding.LEVELS * size, rel=1e-3)
