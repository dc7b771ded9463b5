"""Models whose values lie far from 1, which products of sums would lose: they are compiled without.

`hone.passes.lower.pairs` adds values and weights before it multiplies, so that values of a million
leave six digits of the weights behind.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import hone
from hone import driver, improve, recipe
from hone.errors import AccuracyError
from hone.model import Model
from hone.targets.target import Target, resolve

LANES = 16


@pytest.fixture
def adders() -> Target:
    host = resolve("host")
    if host.vector_bits != 32 * LANES:
        pytest.skip("products of sums are made of vectors of 512 bits, which this machine lacks")
    return replace(host, separate_adders=True)


def network() -> onnx.ModelProto:
    """Return (1e6 norm(x)) W 1e-6: values that a normalization has made large."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((128, 64)) / 10).astype(np.float32)
    nodes = [
        helper.make_node("LayerNormalization", ["x", "up"], ["scaled"], axis=-1),
        helper.make_node("MatMul", ["scaled", "weight"], ["product"]),
        helper.make_node("Mul", ["product", "down"], ["y"]),
    ]
    up = np.full(128, 1e6, np.float32)
    tensors = {"up": up, "down": np.float32(1e-6), "weight": weight}
    graph = helper.make_graph(
        nodes,
        "far",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [16, 128])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [16, 64])],
        [numpy_helper.from_array(np.array(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def model() -> Model:
    return hone.load(network())


class Log:
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def task(self, label: str, total: float | None = None):
        return hone.progress.silent().task(label, total)

    def log(self, message: str) -> None:
        self.messages.append(message)


def test_compile_forgoes_sums_where_they_lose_too_much(adders: Target, model: Model) -> None:
    log = Log()
    package = driver.compile(model, target=adders, threads=2, progress=log)
    assert f"{driver.TOO_FAR_BY_SUMS}; compiled without them" in log.messages
    x = np.random.default_rng(1).standard_normal((16, 128)).astype(np.float32)
    weight = numpy_helper.to_array(network().graph.initializer[2]).astype(np.float64)
    spread = x.std(-1, keepdims=True, dtype=np.float64)
    exact = (x - x.mean(-1, keepdims=True, dtype=np.float64)) / spread @ weight
    result = hone.runtime.load(package).run({"x": x})["y"]
    np.testing.assert_allclose(result, exact, atol=1e-4)


def test_build_forgoes_sums_too_and_says_so(
    adders: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(network(), tmp_path / "far.onnx")
    (tmp_path / "hone.toml").write_text(
        '[model]\npath = "far.onnx"\n[target]\nname = "host"\nthreads = 2\n'
        '[data]\nmetric = "relative_error"\n[measure]\nrounds = 3\n'
    )
    monkeypatch.setattr("hone.workbench.resolve", lambda _: adders)
    report = improve.build(recipe.load(tmp_path / "hone.toml"))
    assert any(driver.TOO_FAR_BY_SUMS in note for note in report.notes)


def test_an_error_for_another_reason_stays_one(
    adders: Target, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AccuracyError("outputs differ")

    monkeypatch.setattr("hone.parity.check", fail)
    log = Log()
    with pytest.raises(AccuracyError, match="outputs differ"):
        driver.compile(model, target=adders, threads=2, progress=log)
    assert not any(driver.TOO_FAR_BY_SUMS in message for message in log.messages)
