"""The split step in bands of rows: what it proposes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hone import importer, parity
from hone.activations import lowered_activation_bytes
from hone.assembling import assemble
from hone.errors import UsageError
from hone.model import Model
from hone.recipe import parse
from hone.runtime import load
from hone.steps.candidate import Candidate, Context
from hone.steps.options.split import SplitStep
from hone.steps.split import propose
from hone.targets.target import resolve

HOST = resolve("host")
CONTEXT = Context(target=HOST, threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Two large images before a small one: three convolutions, the last with stride 4."""
    rng = np.random.default_rng(2)
    nodes, weights, value, depth = [], [], "x", 3
    for name, channels, stride in (("a", 16, 1), ("b", 16, 1), ("c", 4, 4)):
        kernel = rng.standard_normal((channels, depth, 3, 3)).astype("float32") / 10
        weights.append(numpy_helper.from_array(kernel, f"{name}.weight"))
        nodes.append(
            helper.make_node(
                "Conv",
                [value, f"{name}.weight"],
                [name],
                name=f"/{name}/Conv",
                strides=[stride, stride],
                pads=[1, 1, 1, 1],
            )
        )
        value, depth = name, channels
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, [1, 4, 8, 8])],
        weights,
    )
    path = Path(tmp_path_factory.mktemp("model"), "net.onnx")
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, path)
    return importer.load(path)


def step(**options: object) -> SplitStep:
    return SplitStep.model_validate({"kind": "split", "axis": "patches", **options})


@pytest.mark.parametrize(
    "options", [{"layers": ["auto"]}, {"layers": ["/a/Conv", "/c/Conv"], "parts": 4}], ids=str
)
def test_bands_need_less_memory_and_compute_the_same(
    model: Model, options: dict[str, object]
) -> None:
    candidate = propose(model, step(**options), CONTEXT)
    assert isinstance(candidate, Candidate)
    before = lowered_activation_bytes(model.module, HOST, threads=1)
    after = lowered_activation_bytes(candidate.model.module, HOST, threads=1)
    assert after < 0.8 * before
    assert f"activations {before} → {after} bytes, as planned" in candidate.note
    package = assemble(candidate.model, target=HOST, threads=1).package
    parity.check(model, load(package).run, threads=1)


def test_the_number_of_bands_can_be_asked_for(model: Model) -> None:
    candidate = propose(model, step(layers=["auto"], parts=2), CONTEXT)
    assert isinstance(candidate, Candidate)
    assert candidate.note.startswith("2 bands of rows; ")


def test_layers_around_which_nothing_can_be_split_are_refused(model: Model) -> None:
    with pytest.raises(UsageError, match="the result of '/c/Conv' has only 8 rows"):
        propose(model, step(layers=["/c/Conv"], parts=9), CONTEXT)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"layers": ["/a/Conv"], "axis": "patches"}, "parts is required, unless"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(options: dict[str, object], problem: str) -> None:
    recipe = {"model": {"path": "net.onnx"}, "step": [{"kind": "split", **options}]}
    with pytest.raises(UsageError, match=problem):
        parse(recipe)


def test_memory_is_a_goal() -> None:
    assert parse({"model": {"path": "n.onnx"}, "goal": {"goal": "memory"}}).goal.goal == "memory"


def test_a_split_that_saves_nothing_is_not_proposed(model: Model) -> None:
    candidate = propose(model, step(layers=["auto"]), CONTEXT)
    assert isinstance(candidate, Candidate)
    said = propose(candidate.model, step(layers=["auto"], parts=8), CONTEXT)
    assert isinstance(said, str)
    assert "no split into patches needs less than" in said
