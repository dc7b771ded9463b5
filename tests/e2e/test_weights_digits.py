"""The digits network with weights of few bits, from a recipe's step to compiled code."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from hone import pipeline
from hone.data import Dataset
from hone.data import load as load_data
from hone.errors import UsageError
from hone.importer import load
from hone.model import Model
from hone.recipe import parse
from hone.steps import registry
from hone.steps.candidate import Candidate, Context
from hone.steps.options.weights import WeightsStep
from hone.targets.target import resolve
from hone.weights import weights_bytes

FOLDER = files("hone.models") / "digits"
TARGET = resolve("host")
WEIGHTED = ["/conv1/Conv", "/conv2/Conv", "/conv3/Conv", "/fc/Gemm"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(FOLDER / "digits.onnx")


@pytest.fixture(scope="module")
def evaluation(model: Model) -> Dataset:
    return load_data(str(FOLDER / "evaluation.npz"), model.signature)


def propose(model: Model, limit: int = 64, **options: Any) -> Candidate:
    calibration = load_data(str(FOLDER / "calibration.npz"), model.signature, limit=limit)
    context = Context(target=TARGET, threads=1, teacher=model, calibration=calibration)
    step = WeightsStep.model_validate({"kind": "weights", **options})
    candidate = registry.propose(model, "fp32", step, context)
    assert isinstance(candidate, Candidate)
    return candidate


def compiled(module: tvm.IRModule, data: Dataset) -> tuple[float, int]:
    """Return top-1 and the bytes of the weights."""
    lowered = pipeline.lower(module, TARGET, threads=1, compact=True)
    scheduled = pipeline.schedule(lowered, TARGET, threads=1).module
    vm = relax.VirtualMachine(pipeline.build_executable(scheduled, TARGET, threads=1), tvm.cpu())
    rows = [
        vm["main"](*[tvm.runtime.tensor(x) for x in data.sample(i).values()]).numpy()
        for i in range(len(data))
    ]
    return float(np.mean(np.stack(rows).argmax(-1) == data.labels)), weights_bytes(lowered)


@pytest.fixture(scope="module")
def plain(model: Model, evaluation: Dataset) -> tuple[float, int]:
    return compiled(model.module, evaluation)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 0.27),
        ({"bits": 4}, 0.14),
        ({"bits": 4, "symmetric": False, "granularity": "group", "group_size": 32}, 0.19),
        ({"bits": 4, "rounding": "adaptive", "rounding_steps": 20}, 0.14),
    ],
)
def test_top1_drops_by_at_most_0_6_points(model, evaluation, plain, options, share) -> None:
    candidate = propose(model, **options)
    assert [layer for layer, _ in candidate.errors] == WEIGHTED
    assert candidate.precision is None
    accuracy, size = compiled(candidate.model.module, evaluation)
    assert plain[0] - accuracy <= 0.006
    assert size <= share * plain[1]


def test_one_layer_of_binary_weights_and_activations_runs(model, evaluation, plain) -> None:
    candidate = propose(model, scheme="xnor", skip=["!/conv2/Conv"])
    assert [layer for layer, _ in candidate.errors] == ["/conv2/Conv"]
    # Nothing is asked of its accuracy: what a ReLU leaves has no signs.
    _, size = compiled(candidate.model.module, evaluation)
    assert size < plain[1]


@pytest.mark.parametrize(
    ("options", "share"), [({"scheme": "ternary"}, 0.08), ({"scheme": "binary"}, 0.05)]
)
def test_two_and_one_bit_weights_are_smaller_still(
    model, evaluation, plain, options, share
) -> None:
    accuracy, size = compiled(propose(model, **options).model.module, evaluation)
    assert size <= share * plain[1]
    assert accuracy > 0.2, "ten classes: chance is 0.1"


def test_recovery_trains_weights_for_their_levels(model, evaluation, plain) -> None:
    without = propose(model, scheme="ternary")
    recovered = propose(model, limit=128, scheme="ternary", recover={"epochs": 6})
    assert "recovered in" in recovered.note
    before, size = compiled(without.model.module, evaluation)
    after, same = compiled(recovered.model.module, evaluation)
    assert same == size
    assert after > before


def test_selected_layers_keep_their_weights(model) -> None:
    candidate = propose(model, bits=4, skip=["first", "op:Gemm"])
    assert [layer for layer, _ in candidate.errors] == WEIGHTED[1:3]
    assert dict(candidate.skipped) == {WEIGHTED[0]: "kept in float", WEIGHTED[3]: "kept in float"}
    assert candidate.note == "weights of 2 layers from 368640 to 46848 bytes"


def test_nothing_changes_when_every_layer_is_kept(model) -> None:
    candidate = propose(model, skip=["op:Conv", "op:Gemm"])
    assert candidate.model.module.same_as(model.module)
    assert candidate.note == "no weight fits"


def test_a_selector_that_names_nothing_is_an_error(model) -> None:
    with pytest.raises(UsageError, match="'/conv9/Conv' is no layer, the nearest: /conv"):
        propose(model, skip=["/conv9/Conv"])


def test_adaptive_rounding_needs_data(model) -> None:
    step = WeightsStep(kind="weights", rounding="adaptive")
    with pytest.raises(UsageError, match="weights needs calibration data"):
        registry.propose(model, "fp32", step, Context(target=TARGET, threads=1))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"scheme": "binary", "bits": 4}, 'bits and symmetric are for scheme = "integer"'),
        ({"scheme": "ternary", "symmetric": False},
         'bits and symmetric are for scheme = "integer"'),
        ({"group_size": 16}, 'group_size is for granularity = "group"'),
        ({"rounding_steps": 5},
         'rounding_steps and rounding_seconds are for rounding = "adaptive"'),
        ({"scheme": "ternary", "rounding": "adaptive"},
         'rounding = "adaptive" is for scheme = "integer"'),
        ({"scheme": "xnor", "recover": {}},
         'scheme = "xnor" has no groups, and signs have no gradient to recover by'),
        ({"recover": {}, "rounding": "adaptive"},
         "recover trains weights for rounding to nearest: leave out rounding"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(options, problem) -> None:
    recipe = {
        "model": {"path": "x.onnx"},
        "data": {"calibration": "x.npz"},
        "step": [{"kind": "weights", **options}],
    }
    with pytest.raises(UsageError) as caught:
        parse(recipe)
    assert problem in caught.value.message


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({}, "weights int8"),
        ({"bits": 4, "symmetric": False, "granularity": "group"},
         "weights int4 asymmetric, groups of 32"),
        ({"bits": 2, "granularity": "tensor", "power_of_two": True},
         "weights int2, one scale, scales 2^n"),
        ({"scheme": "ternary", "recover": {}}, "weights ternary + recover"),
        ({"rounding": "adaptive"}, "weights int8 + adaptive rounding"),
    ],
)  # fmt: skip
def test_the_title_says_the_settings(options, title) -> None:
    assert WeightsStep(kind="weights", **options).title == title
