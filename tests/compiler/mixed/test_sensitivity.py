"""Which layers move the outputs most."""

from __future__ import annotations

import math
from importlib.resources import files

import numpy as np
import pytest
from tvm import relax

from hone.data import load as load_data
from hone.importer import load
from hone.mixed.sensitivity import kl_divergence, relative_error, sensitivity
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.dataflow import Dataflow, layer_of
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.quantize.switch_layers import Emulation
from hone.progress import silent

FOLDER = files("hone.models") / "digits"


def test_divergence_is_the_worked_number():
    found = kl_divergence([np.array([[0.0, 0.0]])], [np.array([[math.log(3), 0.0]])])
    assert found == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-12)
    assert round(found, 4) == 0.1438


def test_divergence_is_nothing_when_scores_are_shifted():
    scores = np.array([[3.0, -1.0, 900.0]])
    assert kl_divergence([scores], [scores + 5.0]) == pytest.approx(0.0, abs=1e-12)


def test_error_is_the_worked_number():
    assert relative_error([np.array([3.0, 4.0])], [np.array([3.0, 3.5])]) == pytest.approx(0.1)


@pytest.mark.parametrize(("found", "error"), [(0.0, 0.0), (1.0, 1.0)])
def test_error_of_zeros_is_none_or_all(found: float, error: float):
    assert relative_error([np.zeros(3)], [np.full(3, found)]) == error


def test_error_is_that_of_the_worst_output():
    exact, half = np.array([3.0, 4.0]), np.array([3.0, 3.5])
    assert relative_error([exact, exact], [exact, half]) == pytest.approx(0.1)


def test_layer_that_is_spoilt_most_is_the_most_sensitive():
    model = load(FOLDER / "digits.onnx")
    model = model.with_module(
        apply(model.module, relax.transform.FoldConstant(), FoldBatchNorm(), ToNHWC())
    )
    weights = {
        layer_of(binding.var): binding.value.args[1].value.numpy()
        for binding in Dataflow(model.module["main"]).bindings
        if isinstance(binding.value, relax.Call)
        and str(binding.value.op.name) in ("relax.nn.conv2d", "relax.matmul")
    }
    names = list(weights)
    amounts = dict(zip(names, (0.02, 0.5, 0.0, 0.1), strict=True))
    spoilt = {
        name: Emulation(weight=(weight * (1 + amounts[name])).astype(np.float32))
        for name, weight in weights.items()
    }
    found = sensitivity(
        model,
        {"spoilt": spoilt, "exact": {names[0]: Emulation(weight=weights[names[0]])}},
        load_data(str(FOLDER / "calibration.npz"), model.signature, limit=3),
        samples=2,
        threads=1,
        divergence=relative_error,
        progress=silent(),
    )
    assert sorted(names, key=found["spoilt"].__getitem__) == [
        names[2],
        names[0],
        names[3],
        names[1],
    ]
    assert found["spoilt"][names[2]] == 0.0
    assert found["exact"] == {names[0]: 0.0}
    # The last layer is a matrix product with a bias: 10% more of its weights, less than 10% more.
    assert 0.05 < found["spoilt"][names[3]] < 0.15
