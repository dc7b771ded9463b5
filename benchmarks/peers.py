"""Compare hone with its peers: every reference network, each in one interleaved run.

``python benchmarks/peers.py [--only NAME] [--precision P] [--batch N] [--threads N]
[--json]``. Networks but
the trained digits have random weights, so this compares speed, not accuracy; hone compiles without
tuning. bf16: OpenVINO is allowed it too; onnxruntime has no kernels for it on processors and stays
fp32. int8: everybody is given the QDQ model that onnxruntime's quantizer makes.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from hone import driver, models, parity
from hone.bench import Bench, bench
from hone.importer import load
from hone.measure import Rounds

PEERS = ("onnxruntime", "openvino")
DIGITS = Path(__file__).parents[1] / "models" / "digits" / "digits.onnx"


def compare(
    name: str, folder: Path, *, precision: str, batch: int, threads: int, rounds: int
) -> Bench:
    """Measure one network in hone and in every peer that is installed."""
    network = folder / f"{name}.onnx"
    model = onnx.load(DIGITS) if name == "digits" else models.build(name)
    onnx.save(batched(model, batch), network)
    if precision == "int8":
        network = quantized(network)
    package = driver.compile(load(network), threads=threads, precision=precision)
    # The peers take the model that lies beside the package and has the hash that it names.
    path = folder / f"{name}.hone"
    package.save(path)
    installed = [peer for peer in PEERS if find_spec(peer)]
    return bench([path], vs=installed, threads=threads, rounds=Rounds(rounds=rounds))


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


def rows(name: str, result: Bench) -> list[dict[str, Any]]:
    """Return one row for each contender, as JSON data."""
    return [
        {
            "network": name,
            "name": entry.name if entry.name in PEERS else "hone",
            "precision": entry.precision,
            "threads": result.threads,
            "latency_ms": {
                "median": entry.latency.median_ms,
                "p90": entry.latency.p90_ms,
                "ci95": entry.latency.ci95_ms,
                "samples": entry.latency.samples,
            },
            "ratio": {
                peer: {"ratio": speedup.ratio, "ci95": speedup.ci95}
                for peer, speedup in entry.ratio.items()
            },
        }
        for entry in result.results
    ]


def show(table: list[dict[str, Any]]) -> None:
    """Print the rows of one network."""
    for row in table:
        latency, ratios = row["latency_ms"], row["ratio"]
        versus = "  ".join(f"{peer} {value['ratio']:.2f}x" for peer, value in ratios.items())
        print(
            f"{row['network']:12} {row['name']:12} {row['precision']:5} "
            f"{latency['median']:9.4f} ms ({latency['ci95'][0]:.4f} to {latency['ci95'][1]:.4f})  "
            f"{versus}",
            flush=True,
        )


def main() -> int:
    """Run the comparisons that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    names = ("digits", *(name for name in models.names() if name != "digits-cnn"))
    parser.add_argument("--only", choices=names, action="append", help="one network; repeatable")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    everything: list[dict[str, Any]] = []
    environment: dict[str, Any] = {}
    with TemporaryDirectory(prefix="hone-peers-") as folder:
        for name in arguments.only or names:
            result = compare(
                name,
                Path(folder),
                precision=arguments.precision,
                batch=arguments.batch,
                threads=arguments.threads,
                rounds=arguments.rounds,
            )
            environment = result.environment
            table = rows(name, result)
            everything += table
            if not arguments.json:
                show(table)
    if arguments.json:
        print(json.dumps({"results": everything, "environment": environment}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
