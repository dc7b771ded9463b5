"""The digits network in 16-bit floats: accuracy, size, selectors, and behind an int8 step."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest

import hone
from hone import driver, runtime
from hone.data import load as load_data
from hone.errors import UsageError
from hone.model import Model
from hone.steps import registry
from hone.steps.candidate import Candidate, Context
from hone.steps.options.half import Bf16Step, Fp16Step
from hone.steps.options.int8 import Int8Step
from hone.steps.options.prune import PruneStep
from hone.steps.options.section import StepSection
from hone.targets.target import resolve
from hone.verify import verify

FOLDER = files("hone.models") / "digits"
LAYERS = ["/conv1/Conv", "/conv2/Conv", "/conv3/Conv", "/fc/Gemm"]


@pytest.fixture(scope="module")
def model() -> Model:
    return hone.load(FOLDER / "digits.onnx")


def propose(model: Model, step: StepSection, precision: str = "fp32") -> Candidate | str:
    calibration = load_data(str(FOLDER / "calibration.npz"), model.signature, limit=64)
    context = Context(target=resolve("host"), threads=1, calibration=calibration)
    return registry.propose(model, precision, step, context)


def accuracy(package: hone.Package) -> float:
    data = np.load(FOLDER / "evaluation.npz")
    runner = runtime.load(package)
    right = [
        runner.run({"image": image[None]})["logits"].argmax() == label
        for image, label in zip(data["image"], data["labels"], strict=True)
    ]
    return float(np.mean(right))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_digits_keep_their_accuracy_at_half_the_weights(model: Model, precision: str) -> None:
    small = hone.compile(model, threads=1, precision=precision, goal="size")
    assert small.weights_bytes < 0.52 * model.origin.weights_bytes
    package = hone.compile(model, threads=1, precision=precision)
    assert package.manifest.precision == precision
    assert accuracy(package) >= accuracy(hone.compile(model, threads=1)) - 0.003
    assert verify(package).samples == 2


def test_digits_keep_their_accuracy_with_large_tiles(model: Model) -> None:
    step = Bf16Step(kind="bf16", winograd="4x4")
    package = hone.compile(model, threads=1, precision="bf16", half=step)
    # One of the 450 samples is 0.22 points.
    assert accuracy(package) >= accuracy(hone.compile(model, threads=1)) - 0.003


def test_skipped_layers_stay_in_float32(model: Model) -> None:
    candidate = propose(model, Bf16Step(kind="bf16", skip=["first", "op:Gemm"]))
    assert isinstance(candidate, Candidate)
    assert candidate.note == "2 layers in bf16"
    kept = "kept in float by the recipe"
    assert candidate.skipped == (("/conv1/Conv", kept), ("/fc/Gemm", kept))
    everything = propose(model, Bf16Step(kind="bf16", skip=["re:.*"]))
    assert everything.note == "no layer fits bf16"
    assert everything.model.module.same_as(model.module)
    with pytest.raises(UsageError, match="conv9"):
        propose(model, Bf16Step(kind="bf16", skip=["conv9"]))


def test_layers_that_int8_leaves_in_float_become_bf16(model: Model) -> None:
    integers = propose(model, Int8Step(kind="int8", skip=["/conv2/Conv", "/fc/Gemm"]))
    assert isinstance(integers, Candidate)
    both = propose(integers.model, Bf16Step(kind="bf16"), precision="int8")
    assert isinstance(both, Candidate)
    assert both.note == "2 layers in bf16"
    assert both.precision is None, "int8 stays the lowest"
    assembled = driver.assemble(
        both.model, target=resolve("host"), threads=1, precision="int8"
    ).package
    names = " ".join(assembled.manifest.kernels)
    assert "conv2d_half" in names
    assert "conv2d_int8" in names
    assert "dense_half" in names
    assert accuracy(assembled) >= 0.98


def test_what_is_in_16_bits_is_neither_quantized_nor_pruned(model: Model) -> None:
    half = propose(model, Fp16Step(kind="fp16"))
    assert isinstance(half, Candidate)
    refused = propose(half.model, Int8Step(kind="int8"), precision="fp16")
    assert refused == "int8 works on fp32, and the model is fp16 already"
    refused = propose(half.model, PruneStep(kind="prune", amount=0.5), precision="fp16")
    assert refused == "prune works on fp32, and the model is fp16 already"


def test_a_model_that_is_quantized_already_is_refused(tmp_path) -> None:
    quantized = pytest.importorskip("onnxruntime.quantization")

    class Samples(quantized.CalibrationDataReader):
        def __init__(self) -> None:
            images = np.load(FOLDER / "calibration.npz")["image"][:8]
            self.left = iter([{"image": image[None]} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    path = tmp_path / "qdq.onnx"
    quantized.quantize_static(FOLDER / "digits.onnx", path, Samples())
    with pytest.raises(UsageError) as error:
        hone.compile(hone.load(path), precision="bf16")
    assert "quantized already and keeps its own levels, not bf16" in str(error.value)
