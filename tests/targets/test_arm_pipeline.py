from __future__ import annotations

import shutil

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import hone
import hone.models
from hone import pipeline
from hone.targets import toolchain
from hone.targets.target import resolve

# Sums of up to 576 products in two orders: sqrt(576) * eps of outputs of about 10, ten times over.
TOLERANCE = 10 * 24 * np.finfo(np.float32).eps * 10


@pytest.fixture(scope="module")
def digits():
    proto = hone.models.build("digits-cnn")
    model = hone.load(proto)
    (spec,) = model.signature.inputs
    x = np.random.default_rng(0).uniform(0, 1, spec.shape).astype(spec.dtype)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return model, x, session.run(None, {spec.name: x})


def library(model, name: str, threads: int) -> bytes:
    target = resolve(name)
    lowered = pipeline.lower(model.module, target, threads=threads)
    scheduled = pipeline.schedule(lowered, target, threads=threads)
    return pipeline.link(scheduled.module, target, threads=threads)


@pytest.mark.parametrize(
    ("name", "core"), [("rpi4", "cortex-a72"), ("rpi5", "cortex-a76"), ("graviton4", "max")]
)
def test_digits_for_a_board_agree_with_onnxruntime(arm_emulator, digits, tmp_path, name, core):
    model, x, expected = digits
    path = tmp_path / "lib.so"
    path.write_bytes(library(model, name, threads=2))
    actual = arm_emulator.run(path, [x], cpu=core, threads=2)
    assert [array.shape for array in actual] == [array.shape for array in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_digits_compile_for_a_board_when_there_is_no_toolchain(digits, tmp_path, monkeypatch):
    if toolchain.zig_version() is None:
        pytest.skip("ziglang is not installed")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("cc") is None
    assert library(digits[0], "rpi4", threads=1)[:4] == b"\x7fELF"


def test_library_for_a_board_is_the_same_bytes_when_compiled_twice(digits):
    if toolchain.zig_version() is None:
        pytest.skip("ziglang is not installed")
    assert library(digits[0], "rpi4", threads=1) == library(digits[0], "rpi4", threads=1)


def test_denormals_are_zeros_on_a_board(arm_emulator, tmp_path):
    # Run by the virtual machine and by the plan, which the runner compares.
    size = 1 << 16
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [size])
    half = numpy_helper.from_array(np.full(1, 0.5, np.float32), "half")
    node = helper.make_node("Mul", ["x", "half"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y], [half])
    opset = [helper.make_opsetid("", 17)]
    model = hone.load(helper.make_model(graph, opset_imports=opset, ir_version=8))
    path = tmp_path / "lib.so"
    path.write_bytes(library(model, "rpi4", threads=2))
    values = np.full(size, 1.5e-38, np.float32)  # normal; half of it is not
    values[::2] = 1e-39  # not normal
    values[1::4] = 3.0
    (actual,) = arm_emulator.run(path, [values], cpu="cortex-a72", threads=2)
    assert (actual[1::4] == 1.5).all()
    rest = np.delete(actual, np.s_[1::4])
    assert not rest.any()
