from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hone import calibrate as calibration
from hone.calibrate import calibrate
from hone.data import Dataset, load
from hone.errors import ModelError, UsageError
from hone.importer import load as load_model
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.dataflow import Dataflow
from hone.passes.quantize.observe_tensors import ObserveTensors
from hone.passes.quantize.observer import Range
from hone.passes.quantize.quantize_int8 import observed_tensors, quantize_int8

RNG = np.random.default_rng(11)
CONV = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)
BIAS = RNG.normal(size=4).astype(np.float32)
FC = RNG.normal(size=(4 * 5 * 6, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Model:
    """Convolution, ReLU, addition of a second input, flatten, product: ``a``, ``b`` → ``y``."""
    nodes = [
        helper.make_node("Conv", ["a", "w", "c"], ["t1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["t1"], ["t2"], name="relu1"),
        helper.make_node("Mul", ["t2", "b"], ["t3"], name="mul1"),
        helper.make_node("Flatten", ["t3"], ["t4"], name="flatten"),
        helper.make_node("MatMul", ["t4", "f"], ["y"], name="fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 3, 5, 6]),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 4, 5, 6]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(v, n) for v, n in ((CONV, "w"), (BIAS, "c"), (FC, "f"))],
    )
    proto: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    imported = load_model(proto)
    return imported.with_module(apply(imported.module, ToNHWC()))


def dataset(samples: int, source: str = "calibration.npz", seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset(
        inputs={
            "a": rng.normal(size=(samples, 1, 3, 5, 6)).astype(np.float32),
            "b": rng.normal(size=(samples, 1, 4, 5, 6)).astype(np.float32),
        },
        labels=None,
        source=source,
    )


def convolution(a: np.ndarray) -> np.ndarray:
    """``relu(conv1(a))`` of ``[1, 3, 5, 6]`` by numpy."""
    padded = np.pad(a, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    out = np.einsum("nchwrs,kcrs->nkhw", windows, CONV) + BIAS.reshape(1, 4, 1, 1)
    return np.maximum(out, 0)


def test_ranges_equal_numpy_over_all_samples(model: Model) -> None:
    data = dataset(5)
    ranges = calibrate(model, data, threads=1)
    assert tuple(ranges) == observed_tensors(model.module)
    products = [convolution(a) * b for a, b in zip(data.inputs["a"], data.inputs["b"], strict=True)]
    wanted = {
        # The convolution reads the input after its layout change.
        next(iter(ranges)): data.inputs["a"],
        "flatten": np.stack(products),
    }
    assert set(wanted) == set(ranges)
    for name, values in wanted.items():
        # Sums of 27 products in another order.
        assert ranges[name].minimum == pytest.approx(values.min(), rel=1e-5)
        assert ranges[name].maximum == pytest.approx(values.max(), rel=1e-5)


def test_ranges_are_enough_to_quantize_and_keep_layer_names(model: Model) -> None:
    result = quantize_int8(model.module, calibrate(model, dataset(3), threads=1))
    assert [q.layer for q in result.quantized] == ["conv1", "fc"]
    assert {layer.binding for layer in model.layers} >= {q.layer for q in result.quantized}


def test_layers_that_stay_float_are_not_observed(model: Model) -> None:
    ranges = calibrate(model, dataset(2), threads=1, keep_float=["conv1"])
    assert tuple(ranges) == ("flatten",)
    assert calibrate(model, dataset(2), threads=1, keep_float=["conv1", "fc"]) == {}


def test_statistics_are_small_however_large_the_tensors_are(model: Model) -> None:
    names = observed_tensors(model.module)
    observing = apply(model.module, ObserveTensors(tensors=names))
    results = [tuple(int(e) for e in t.shape) for t in observing["main"].ret_ty.fields]
    # Channels of NHWC, then the flat row: no product over the image.
    assert results == [(3,)] * 3 + [(4 * 5 * 6,)] * 3
    assert "fc" not in {str(b.var.name) for b in Dataflow(observing["main"]).bindings}


def test_each_sample_is_run_once_and_released(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    real = calibration._compile

    def compile_(*arguments: object) -> calibration.Run:
        run = real(*arguments)

        def counted(inputs: list[np.ndarray]) -> list[np.ndarray]:
            runs.append(len(inputs))
            return run(inputs)

        return counted

    monkeypatch.setattr(calibration, "_compile", compile_)
    calibrate(model, dataset(4), threads=1)
    assert runs == [2, 2, 2, 2]


def test_observer_can_be_replaced(model: Model) -> None:
    class First:
        def __init__(self, *, layer: str) -> None:
            self.seen: list[np.ndarray] = []

        def update(self, values: np.ndarray) -> None:
            assert values.shape[0] == 2
            self.seen.append(values)

        @property
        def range(self) -> Range:
            return Range(minimum=0.0, maximum=float(len(self.seen)))

    ranges = calibrate(model, dataset(3), threads=1, observer=First)
    assert {r.maximum for r in ranges.values()} == {3.0}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_error_names_tensor_and_sample_when_a_value_is_not_finite(model: Model, bad: float) -> None:
    data = dataset(3)
    data.inputs["b"][1, 0, 2, 3, 4] = bad
    with pytest.raises(ModelError) as error:
        calibrate(model, data, threads=1)
    assert str(error.value) == (
        "flatten: calibration sample 1 of calibration.npz makes this tensor NaN or infinite\n"
        "  hint: remove the sample, or keep the layer before it in float if it overflows float32"
    )


def test_error_when_there_are_no_samples(model: Model) -> None:
    with pytest.raises(UsageError) as error:
        calibrate(model, dataset(0), threads=1)
    assert str(error.value) == "calibration.npz: calibration needs at least one sample"


def test_random_data_are_refused_unless_asked_for_by_name(model: Model) -> None:
    data = load("random:2", model.signature, allow_random=True)
    with pytest.raises(UsageError) as error:
        calibrate(model, data, threads=1)
    assert str(error.value) == (
        "random:2: random data say nothing about the model's real value ranges, so they do not "
        "calibrate\n  hint: give real samples, or allow random ones by name"
    )
    assert len(calibrate(model, data, threads=1, allow_random=True)) == 2


def test_error_lists_the_names_when_a_tensor_does_not_exist(model: Model) -> None:
    with pytest.raises(ModelError) as error:
        apply(model.module, ObserveTensors(tensors=["fc", "nothing", "none"]))
    assert str(error.value) == "there is no tensor of these names\n  - nothing\n  - none"
