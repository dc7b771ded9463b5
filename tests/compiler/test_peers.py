"""Peers run in a process of their own and end with it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from hone import models
from hone.errors import ToolchainError, UsageError
from hone.peers import Peer
from hone.targets import features


@pytest.fixture(scope="module")
def mlp() -> onnx.ModelProto:
    return models.build("mlp")


@pytest.fixture(scope="module")
def inputs(mlp: onnx.ModelProto) -> dict[str, np.ndarray]:
    (spec,) = mlp.graph.input
    shape = [d.dim_value for d in spec.type.tensor_type.shape.dim]
    return {spec.name: np.ones(shape, "float32")}


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_peer_times_each_run_in_seconds(
    name: str, mlp: onnx.ModelProto, inputs: dict[str, np.ndarray]
) -> None:
    pytest.importorskip(name)
    with Peer(name, mlp, inputs, threads=1) as peer:
        first, second = peer.block(4), peer.block(2)
        assert peer.info.name == name
        assert peer.info.threads == 1
        assert peer.info.precision == "fp32"
        assert peer.info.version[0].isdigit()
    assert len(first) == 4
    assert len(second) == 2
    assert all(0 < seconds < 10 for seconds in first + second)


def test_a_peer_says_which_precision_it_follows(
    mlp: onnx.ModelProto, inputs: dict[str, np.ndarray]
) -> None:
    with Peer("onnxruntime", mlp, inputs, threads=1, precision="bf16") as peer:
        assert peer.info.precision == "fp32"
    pytest.importorskip("openvino")
    if "avx512bf16" not in features.available(features.machine()):
        pytest.skip("this processor has no bf16 for OpenVINO to follow the hint with")
    with Peer("openvino", mlp, inputs, threads=1, precision="bf16") as peer:
        assert peer.info.precision == "bf16"


def test_a_precision_that_no_peer_takes_is_an_error(
    mlp: onnx.ModelProto, inputs: dict[str, np.ndarray]
) -> None:
    with pytest.raises(UsageError) as caught:
        Peer("openvino", mlp, inputs, threads=1, precision="int4")
    assert str(caught.value) == "peers do not run in 'int4'\n  hint: one of fp32, bf16, fp16"


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_peer_is_stopped_between_its_blocks(
    mlp: onnx.ModelProto, inputs: dict[str, np.ndarray]
) -> None:
    with Peer("onnxruntime", mlp, inputs, threads=1) as peer:
        peer.block(1)
        deadline = time.monotonic() + 10
        while (state := state_of(peer.pid)) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state == "T"
        pid = peer.pid
    assert not os.path.exists(f"/proc/{pid}")


def test_peer_is_an_error_when_its_name_is_unknown(
    mlp: onnx.ModelProto, inputs: dict[str, np.ndarray]
) -> None:
    with pytest.raises(UsageError) as caught:
        Peer("tensorrt", mlp, inputs, threads=1)
    assert str(caught.value) == "unknown peer 'tensorrt'\n  hint: one of onnxruntime, openvino"


def test_peer_is_an_error_when_the_engine_refuses_the_model(
    inputs: dict[str, np.ndarray],
) -> None:
    with pytest.raises(ToolchainError, match=r"^onnxruntime: \w+: "):
        Peer("onnxruntime", onnx.ModelProto(), inputs, threads=1)


def test_peer_is_an_error_of_one_line_when_it_refuses_the_model_at_its_first_run(
    capfd: pytest.CaptureFixture[str],
) -> None:
    int64, helper = onnx.TensorProto.INT64, onnx.helper
    values = [helper.make_tensor_value_info(name, int64, [2]) for name in "aby"]
    graph = helper.make_graph(
        [helper.make_node("Div", ["a", "b"], ["y"])], "division", values[:2], values[2:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    zeros = {name: np.zeros(2, np.int64) for name in "ab"}
    with pytest.raises(ToolchainError, match=r"onnxruntime: .*division by zero"):
        Peer("onnxruntime", model, zeros, threads=1)
    assert "Traceback" not in capfd.readouterr().err
