"""The digits network in int8, from ONNX to compiled code."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
import tvm
from tvm import relax

from hone import pipeline
from hone.calibrate import calibrate
from hone.data import Dataset
from hone.data import load as load_data
from hone.importer import load
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.dataflow import Dataflow
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.quantize.quantize_int8 import Quantization, quantize_int8
from hone.targets.target import resolve
from hone.weights import weights_bytes

FOLDER = files("hone.models") / "digits"
TARGET = resolve("host")


@pytest.fixture(scope="module")
def network() -> tuple[tvm.IRModule, Quantization, Dataset]:
    """The float module, its quantization, and the evaluation data."""
    model = load(FOLDER / "digits.onnx")
    prepared = model.with_module(apply(model.module, FoldBatchNorm(), ToNHWC()))
    calibration = load_data(str(FOLDER / "calibration.npz"), model.signature, limit=128)
    result = quantize_int8(prepared.module, calibrate(prepared, calibration, threads=1))
    evaluation = load_data(str(FOLDER / "evaluation.npz"), model.signature)
    return prepared.module, result, evaluation


def accuracy(module: tvm.IRModule, data: Dataset) -> float:
    lowered = pipeline.lower(module, TARGET, threads=1)
    scheduled = pipeline.schedule(lowered, TARGET, threads=1).module
    vm = relax.VirtualMachine(pipeline.build_executable(scheduled, TARGET, threads=1), tvm.cpu())
    rows = [
        vm["main"](*[tvm.runtime.tensor(x) for x in data.sample(i).values()]).numpy()
        for i in range(len(data))
    ]
    return float(np.mean(np.stack(rows).argmax(-1) == data.labels))


def test_top1_drops_by_at_most_0_3_points_when_quantized(network) -> None:
    module, result, data = network
    assert accuracy(module, data) - accuracy(result.module, data) <= 0.003


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
    before = weights_bytes(pipeline.lower(module, TARGET, threads=1))
    after = weights_bytes(pipeline.lower(result.module, TARGET, threads=1))
    # int8 for float32; a bias and a multiplier for each channel, where there was a bias only.
    assert 3.8 < before / after < 4.0
