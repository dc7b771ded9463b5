"""The reference networks as files, in the batch and precision of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from hone import models, parity
from hone.importer import load

DIGITS = Path(__file__).parents[1] / "models" / "digits" / "digits.onnx"
PEERS = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "bf16", "int8")
NAMES = ("digits", *(name for name in models.names() if name != "digits-cnn"))


def write(name: str, folder: Path, *, precision: str, batch: int) -> Path:
    """Write a network and return its path: a QDQ model for int8, float32 for everything else."""
    network = folder / f"{name}.onnx"
    model = onnx.load(DIGITS) if name == "digits" else models.build(name)
    onnx.save(batched(model, batch), network)
    return quantized(network) if precision == "int8" else network


def batched(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a network of batch 1 with another batch.

    Raises
    ------
    onnx.shape_inference.InferenceError
        The network has its batch in a constant.
    """
    if batch == 1:
        return model
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def quantized(network: Path) -> Path:
    """Return the QDQ form of a network, by onnxruntime's static quantizer on random inputs.

    Batch normalization is folded first, as the quantizer's manual says; else nobody could.
    """
    import onnxruntime
    from onnxruntime import quantization

    folded = network.with_suffix(".folded.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    onnxruntime.InferenceSession(network, options, ["CPUExecutionProvider"])
    inputs = [parity.random_inputs(load(network), seed=seed) for seed in range(8)]

    class Samples(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._left, None)

    qdq = network.with_suffix(".int8.onnx")
    quantization.quantize_static(
        folded,
        qdq,
        Samples(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return qdq
