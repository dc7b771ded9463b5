from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from hone.calibrate import calibrate
from hone.data import Dataset, load
from hone.errors import UsageError
from hone.importer import load as load_model
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.quantize.qparams import dequantize
from hone.passes.quantize.quantize_int8 import quantize_int8
from hone.quantization_error import compared_levels, layer_errors, sqnr_db
from hone.quantized import HALF_STEPS
from hone.steps import half, int8, weights
from hone.steps.candidate import Candidate, Context
from hone.steps.options.int8 import Int8Step
from hone.steps.options.weights import WeightsStep
from hone.targets.target import resolve
from hone.tensor_reader import TensorReader

RNG = np.random.default_rng(3)
# Channels of very different size, which the next layer evens out: hard for one scale.
SIZES = np.array([8.0, 1.0, 0.1, 0.01])
WEIGHTS = {
    "w1": RNG.normal(size=(4, 2, 3, 3)) * SIZES.reshape(4, 1, 1, 1),
    "w2": RNG.normal(size=(3, 4, 1, 1)) / SIZES.reshape(1, 4, 1, 1),
    "w3": RNG.normal(size=(60, 5)),
}
# One whose weights are small beside what they make of inputs that are mostly positive.
WEIGHTS["w1"][1] = 0.5


@pytest.fixture(scope="module")
def model() -> Model:
    """conv1, ReLU, conv2, flatten, fc: ``x`` [1, 2, 4, 5] → ``y`` [1, 5]."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["t1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["t1"], ["t2"], name="relu1"),
        helper.make_node("Conv", ["t2", "w2"], ["t3"], name="conv2"),
        helper.make_node("Flatten", ["t3"], ["t4"], name="flatten"),
        helper.make_node("MatMul", ["t4", "w3"], ["y"], name="fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in WEIGHTS.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return load_model(proto)


def dataset(samples: int) -> Dataset:
    rng = np.random.default_rng(7)
    inputs = {"x": (rng.normal(size=(samples, 1, 2, 4, 5)) + 2.0).astype(np.float32)}
    return Dataset(inputs=inputs, labels=None, source="data.npz")


def test_sqnr_matches_the_worked_number() -> None:
    assert sqnr_db(9.0, 0.3**2) == pytest.approx(20.0)


def test_sqnr_of_no_noise_is_none_and_of_no_signal_is_finite() -> None:
    assert sqnr_db(1.0, 0.0) is None
    assert sqnr_db(0.0, 0.0) is None
    assert -4000 < sqnr_db(0.0, 1.0) < -3000


@pytest.mark.parametrize(("signal", "noise"), [(1.0, np.nan), (1.0, np.inf), (np.inf, 1.0)])
def test_sqnr_of_what_overflows_is_the_lowest_number(signal: float, noise: float) -> None:
    assert -4000 < sqnr_db(signal, noise) < -3000


def test_layer_errors_equal_numpy(model: Model) -> None:
    prepared = model.with_module(apply(model.module, ToNHWC()))
    data = dataset(4)
    result = quantize_int8(prepared.module, calibrate(prepared, data, threads=1))
    changed = prepared.with_module(result.module)
    errors = layer_errors(prepared, changed, compared_levels(result), data, samples=3, threads=1)
    assert [e.layer for e in errors] == ["conv1", "conv2", "fc"]
    x = data.inputs["x"][:3, 0].astype(np.float64)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    first = np.maximum(np.einsum("nchwrs,kcrs->nkhw", windows, WEIGHTS["w1"]), 0)
    last = np.einsum("nchw,kc->nkhw", first, WEIGHTS["w2"][..., 0, 0]).reshape(3, -1)
    wanted = {"conv1": first.transpose(0, 2, 3, 1), "fc": last @ WEIGHTS["w3"]}
    by_layer = {layer.layer: layer for layer in result.quantized}
    reader = TensorReader(
        prepared.with_module(result.module), [by_layer[n].result for n in wanted], threads=1
    )
    for error in errors:
        if error.layer not in wanted:
            continue
        layer = by_layer[error.layer]
        found = np.concatenate([reader.read(data.sample(i))[layer.result] for i in range(3)])
        if layer.qparams is not None:
            found = dequantize(found, layer.qparams)
        x = wanted[error.layer]
        noise = np.sum((x - found) ** 2)
        # The float network rounds to float32; its error is 1e-6 of what quantization does.
        assert error.sqnr_db == pytest.approx(10 * np.log10(np.sum(x**2) / noise), abs=0.01)


def propose(
    model: Model,
    data: Dataset | None = None,
    *,
    allow_random: bool = False,
    error_samples: int = 6,
    **options: object,
) -> Candidate:
    context = Context(
        target=resolve("host"),
        threads=1,
        teacher=model,
        calibration=data or dataset(6),
        allow_random=allow_random,
        error_samples=error_samples,
    )
    return int8.propose(model, Int8Step.model_validate({"kind": "int8", **options}), context)


def context(data: Dataset | None) -> Context:
    return Context(target=resolve("host"), threads=1, calibration=data, error_samples=3)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_errors_of_layers_of_16_bit_floats_are_reported(model: Model, kind: str) -> None:
    step = HALF_STEPS[kind].model_validate({"kind": kind})
    errors = dict(half.propose(model, step, context(dataset(4))).errors)
    assert list(errors) == ["conv1", "conv2", "fc"]
    # Products of 8 and 11 bits of mantissa.
    low, high = (35, 65) if kind == "bf16" else (55, 85)
    assert all(error is not None and low < error < high for error in errors.values())
    assert half.propose(model, step, context(None)).errors == ()


def test_errors_of_layers_with_weights_of_few_bits_are_those_of_their_results(model: Model) -> None:
    errors = {
        bits: dict(
            weights.propose(
                model,
                WeightsStep.model_validate({"kind": "weights", "bits": bits}),
                context(dataset(4)),
            ).errors
        )
        for bits in (8, 4)
    }
    assert list(errors[8]) == ["conv1", "conv2", "fc"]
    assert all(errors[4][layer] < errors[8][layer] - 10 for layer in errors[8])
    step = WeightsStep.model_validate({"kind": "weights"})
    alone = dict(weights.propose(model, step, context(None)).errors)
    assert list(alone) == list(errors[8])
    assert alone != errors[8]


OPTIONS = [
    {"observer": "moving_average"},
    {"observer": "percentile", "percentile": 90.0},
    {"observer": "percentile", "percentile": 95.0},
    {"equalize": "weights"},
    {"equalize": "activations"},
    {"equalize": "activations", "alpha": 0.9},
    {"rounding": "adaptive"},
    {"rounding": "adaptive", "rounding_steps": 2},
    {"recover": {"epochs": 4}},
    {"recover": {"epochs": 4, "freeze": [0.5, 1.0]}},
    {"bias_correction": True},
    {"weights": "asymmetric"},
    {"power_of_two": True},
    {"weights": "asymmetric", "rounding": "adaptive", "rounding_steps": 50},
    {"skip": ["last"]},
]


def test_every_option_of_the_step_has_an_effect_of_its_own(model: Model) -> None:
    errors = [propose(model, **options).errors for options in ({}, *OPTIONS)]
    assert len(set(errors)) == len(errors)


def test_equalized_activations_lose_less_when_channels_are_uneven(model: Model) -> None:
    plain = dict(propose(model).errors)["fc"]
    for by in ("weights", "activations"):
        assert dict(propose(model, equalize=by).errors)["fc"] > plain + 6  # one bit at least


def test_step_says_how_many_pairs_it_equalized(model: Model) -> None:
    note = propose(model, equalize="weights").note
    assert note == "3 kernels in int8, conversions from or to float: 1, 1 pairs of layers equalized"


def test_random_data_calibrate_only_when_asked_for_by_name(model: Model) -> None:
    data = load("random:2", model.signature, allow_random=True)
    with pytest.raises(UsageError, match="random data say nothing about the model's real value"):
        propose(model, data)
    candidate = propose(
        model, data, allow_random=True, error_samples=0, equalize="weights", bias_correction=True
    )
    assert candidate.precision == "int8"
    assert candidate.errors == ()
