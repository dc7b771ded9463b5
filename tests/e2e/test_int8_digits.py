"""The digits network in int8, from ONNX to compiled code."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from hone import pipeline
from hone.calibrate import calibrate
from hone.data import Dataset
from hone.data import load as load_data
from hone.errors import UsageError
from hone.importer import load
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.dataflow import Dataflow
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.quantize.quantize_int8 import Quantization, quantize_int8
from hone.steps import int8
from hone.steps.candidate import Context
from hone.steps.options.int8 import Int8Step
from hone.targets.target import resolve
from hone.weights import weights_bytes

FOLDER = files("hone.models") / "digits"
TARGET = resolve("host")
CONVOLUTIONS = ["/conv1/Conv", "/conv2/Conv", "/conv3/Conv", "/fc/Gemm"]


@pytest.fixture(scope="module")
def network() -> tuple[tvm.IRModule, Quantization, Dataset]:
    """The float module, its quantization, and the evaluation data."""
    model = load(FOLDER / "digits.onnx")
    prepared = model.with_module(apply(model.module, FoldBatchNorm(), ToNHWC()))
    calibration = load_data(str(FOLDER / "calibration.npz"), model.signature, limit=128)
    result = quantize_int8(prepared.module, calibrate(prepared, calibration, threads=1))
    evaluation = load_data(str(FOLDER / "evaluation.npz"), model.signature)
    return prepared.module, result, evaluation


@pytest.fixture(scope="module")
def float_accuracy(network) -> float:
    module, _, data = network
    return accuracy(module, data)


def accuracy(module: tvm.IRModule, data: Dataset) -> float:
    lowered = pipeline.lower(module, TARGET, threads=1)
    scheduled = pipeline.schedule(lowered, TARGET, threads=1).module
    vm = relax.VirtualMachine(pipeline.build_executable(scheduled, TARGET, threads=1), tvm.cpu())
    rows = [
        vm["main"](*[tvm.runtime.tensor(x) for x in data.sample(i).values()]).numpy()
        for i in range(len(data))
    ]
    return float(np.mean(np.stack(rows).argmax(-1) == data.labels))


def test_top1_drops_by_at_most_0_3_points_when_quantized(network, float_accuracy) -> None:
    _, result, data = network
    assert float_accuracy - accuracy(result.module, data) <= 0.003


HELPERS = [
    {"observer": "moving_average", "equalize": "weights"},
    {"observer": "percentile"},
    {"observer": "entropy"},
    {"observer": "mse", "bias_correction": True},
    {"equalize": "activations", "rounding": "adaptive", "rounding_steps": 200},
    {"recover": {"epochs": 4}},
]


@pytest.mark.parametrize("options", HELPERS, ids=lambda o: Int8Step(kind="int8", **o).title)
def test_top1_drops_by_at_most_0_3_points_with_every_helper(
    network, float_accuracy, options: dict[str, object], tmp_path: Path
) -> None:
    *_, data = network
    model = load(FOLDER / "digits.onnx")
    calibration = load_data(str(FOLDER / "calibration.npz"), model.signature, limit=128)
    context = Context(
        target=TARGET,
        threads=1,
        teacher=model,
        calibration=calibration,
        cache=tmp_path,
        error_samples=4,
    )
    step = Int8Step.model_validate({"kind": "int8", **options})
    candidate = int8.propose(model, step, context)
    assert float_accuracy - accuracy(candidate.model.module, data) <= 0.003
    # Eight bits with ranges from data: 25 dB or better at every layer of this network.
    assert [layer for layer, _ in candidate.errors] == CONVOLUTIONS
    assert all(sqnr is not None and sqnr > 25.0 for _, sqnr in candidate.errors)


def test_selected_layers_stay_float_and_the_others_do_not(network) -> None:
    model = load(FOLDER / "digits.onnx")
    calibration = load_data(str(FOLDER / "calibration.npz"), model.signature, limit=4)
    step = Int8Step(kind="int8", skip=["first", "op:Gemm"])
    context = Context(target=TARGET, threads=1, calibration=calibration, error_samples=2)
    candidate = int8.propose(model, step, context)
    assert [layer for layer, _ in candidate.errors] == CONVOLUTIONS[1:3]
    assert dict(candidate.skipped) == dict.fromkeys(
        [CONVOLUTIONS[0], CONVOLUTIONS[3]], "kept in float by request"
    )


def test_error_when_all_selected_layers_are_folded_away() -> None:
    model = load(FOLDER / "digits.onnx")
    calibration = load_data(str(FOLDER / "calibration.npz"), model.signature, limit=1)
    step = Int8Step(kind="int8", skip=["op:BatchNormalization"])
    with pytest.raises(UsageError) as error:
        int8.propose(model, step, Context(target=TARGET, threads=1, calibration=calibration))
    assert str(error.value).startswith(
        "skip: these layers become part of others before quantization: "
    )


def test_only_the_input_is_converted_when_quantized(network) -> None:
    _, result, _ = network
    assert result.skipped == ()
    assert [q.kind for q in result.quantized] == ["conv2d", "conv2d", "conv2d", "dense"]
    floats = [
        b.var for b in Dataflow(result.module["main"]).bindings if b.var.ty.dtype == "float32"
    ]
    # The layout change of the input, and the logits.
    assert len(floats) == 2
    assert len(result.conversions) == 1


def test_stored_weights_shrink_nearly_to_a_quarter_when_quantized(network) -> None:
    module, result, _ = network
    before = weights_bytes(pipeline.lower(module, TARGET, threads=1, compact=True))
    after = weights_bytes(pipeline.lower(result.module, TARGET, threads=1))
    # int8 for float32; a bias and a multiplier for each channel, where there was a bias only.
    assert 3.8 < before / after < 4.0
