"""Other inference engines, each in a process of its own, timed by the same protocol.

A peer's thread pool and hone's would get into each other's way in one process: both set
affinities and both spin.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .errors import ToolchainError, UsageError

if TYPE_CHECKING:
    import onnx

NAMES = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class PeerInfo:
    """What a peer says of itself.

    Parameters
    ----------
    name, version : str
        The engine.
    threads : int
        Threads of one run.
    precision : str
        Precision that its float layers may compute in: what was asked for where it has kernels of
        it, else fp32.
    """

    name: str
    version: str
    threads: int
    precision: str


def peer_precision(*precisions: str) -> str:
    """Return what peers may compute float layers in, beside packages of these precisions.

    What hone may do, a peer may do too: 16-bit floats where any of the packages has them, else
    fp32; an int8 model's levels are in its graph, not asked for by a hint.
    """
    halves = [name for name in PRECISIONS[1:] if name in precisions]
    return halves[0] if halves else PRECISIONS[0]


class Peer:
    """An ONNX model in another engine, in a child process; a context manager and a contender.

    Parameters
    ----------
    name : str
        ``onnxruntime`` or ``openvino``.
    model : onnx.ModelProto
        With static shapes.
    inputs : mapping of str to array
        One sample.
    threads : int
        Threads of one run.
    precision : {"fp32", "bf16", "fp16"}
        Of the float layers. OpenVINO takes it as a hint and follows it where the processor can;
        onnxruntime has no kernels of 16-bit floats for processors and stays fp32.

    Raises
    ------
    UsageError
        The engine or the precision is unknown.
    ToolchainError
        The engine is not installed, or refuses the model (exit 6).
    """

    def __init__(
        self,
        name: str,
        model: onnx.ModelProto,
        inputs: Mapping[str, np.ndarray],
        *,
        threads: int,
        precision: str = "fp32",
    ) -> None:
        if name not in NAMES:
            raise UsageError(f"unknown peer {name!r}", hint=f"one of {', '.join(NAMES)}")
        if precision not in PRECISIONS:
            raise UsageError(
                f"peers do not run in {precision!r}", hint=f"one of {', '.join(PRECISIONS)}"
            )
        self._folder = TemporaryDirectory(prefix="hone-peer-")
        model_path = Path(self._folder.name, "model.onnx")
        model_path.write_bytes(model.SerializeToString())
        for position, array in enumerate(inputs.values()):
            np.save(Path(self._folder.name, f"{position}.npy"), array)
        environment = dict(os.environ, ORT_DISABLE_TELEMETRY="1", OMP_NUM_THREADS=str(threads))
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hone.peer_worker"),
                *(name, self._folder.name, str(threads), precision),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is this process's to answer
        )
        try:
            self._tell({"inputs": list(inputs)})
            answer = self._answer(name)
        except BaseException:
            self.close()
            raise
        self.info = PeerInfo(
            name=name,
            version=answer["version"],
            threads=threads,
            precision=answer["precision"],
        )

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def _tell(self, message: dict[str, Any]) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the worker was started without a pipe")
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _answer(self, name: str) -> dict[str, Any]:
        if self._process.stdout is None:
            raise RuntimeError("the worker was started without a pipe")
        line = self._process.stdout.readline()
        if not line:
            raise ToolchainError(
                f"the {name} process ended with status {self._process.wait()}",
                hint="its message stands above; `hone doctor` says what is installed",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            extra = "compare" if name == "openvino" else None
            raise ToolchainError(
                f"{name}: {answer['error']}",
                hint=f"pip install 'hone-compiler[{extra}]'" if extra else None,
            )
        return answer

    def block(self, runs: int) -> list[float]:
        """Run ``runs`` times in the child and return the seconds of each.

        Between its blocks the child is stopped: a peer's threads spin for long after a run, and
        whoever is measured next would share the cores with them.
        """
        self._process.send_signal(signal.SIGCONT)
        self._tell({"runs": runs})
        seconds = list(self._answer(self.info.name)["seconds"])
        self._process.send_signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        """End the child process."""
        self._process.send_signal(signal.SIGCONT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
