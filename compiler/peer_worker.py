"""The child process of a peer: ``python -m hone.peer_worker NAME FOLDER THREADS PRECISION``.

Reads JSON lines from stdin and answers with JSON lines on stdout: first
``{"inputs": [names]}`` → ``{"version": …}``, then ``{"runs": n}`` → ``{"seconds": […]}``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .measure import InProcess

_OPENVINO_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def _onnxruntime(
    path: Path, feeds: dict[str, np.ndarray], threads: int, _precision: str
) -> tuple[Callable[[], object], str]:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds), "fp32"


def _openvino(
    path: Path, feeds: dict[str, np.ndarray], threads: int, precision: str
) -> tuple[Callable[[], object], str]:
    import openvino

    # Without the hint OpenVINO computes in bf16 where the processor can.
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _OPENVINO_HINTS[precision],
    }
    model = openvino.compile_model(str(path), "CPU", config)
    request = model.create_infer_request()
    request.set_tensors({name: openvino.Tensor(array) for name, array in feeds.items()})
    # The hint that it reports is the one that it follows on this processor.
    followed = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    names = {hint: name for name, hint in _OPENVINO_HINTS.items()}
    return request.infer, names[followed]


_PR_SET_PDEATHSIG = 1  # linux/prctl.h

ENGINES: dict[str, Callable[..., tuple[Callable[[], object], str]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def _say(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _die_with_parent() -> None:
    """Ask the kernel to end this process with its parent: a stopped one would not notice."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(name: str, folder: str, threads: int, precision: str) -> int:
    """Serve one model until stdin ends; return the exit status."""
    _die_with_parent()
    # Engines write banners to stdout: the protocol keeps the real one for itself.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    names = json.loads(sys.stdin.readline())["inputs"]
    feeds = {n: np.load(Path(folder, f"{i}.npy")) for i, n in enumerate(names)}
    try:
        run, followed = ENGINES[name](Path(folder, "model.onnx"), feeds, threads, precision)
        contender = InProcess(run)
        contender.block(1)  # some refuse a model only here
    except Exception as error:  # noqa: BLE001 - any engine's own error type; the parent raises it
        _say(channel, {"error": f"{type(error).__name__}: {error}"})
        return 1
    _say(channel, {"version": version(name), "precision": followed})
    for line in sys.stdin:
        _say(channel, {"seconds": contender.block(json.loads(line)["runs"])})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
