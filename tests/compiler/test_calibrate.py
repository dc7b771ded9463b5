from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax
from tvm.ir import GenericConst

from hone import calibrate as calibration
from hone import tensor_reader
from hone.calibrate import calibrate
from hone.calibration_cache import CalibrationCache, user_folder
from hone.data import RANDOM_HINT, Dataset, load
from hone.errors import ModelError, UsageError
from hone.importer import load as load_model
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.dataflow import Dataflow, Rebuilder, with_args
from hone.passes.quantize.calibrator import Calibrator, Method
from hone.passes.quantize.expose_tensors import ExposeTensors
from hone.passes.quantize.observe_tensors import ObserveTensors
from hone.passes.quantize.quantize_int8 import observed_tensors, quantize_int8
from hone.progress import silent
from hone.tensor_reader import Run

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
    real = calibration.compile_for_host

    def compile_(module: tvm.IRModule, *, threads: int) -> Run:
        run = real(module, threads=threads)

        def counted(inputs: list[np.ndarray]) -> list[np.ndarray]:
            runs.append(len(inputs))
            return run(inputs)

        return counted

    monkeypatch.setattr(calibration, "compile_for_host", compile_)
    calibrate(model, dataset(4), threads=1)
    assert runs == [2, 2, 2, 2]


@pytest.mark.parametrize("method", [m for m in Method if m is not Method.MINMAX], ids=str)
def test_ranges_equal_the_observer_fed_by_numpy(model: Model, method: Method) -> None:
    data = dataset(6)
    calibrator = Calibrator(method=method, percentile=98.0)
    ranges = calibrate(model, data, threads=1, calibrator=calibrator)
    observer = calibrator.observer("flatten")
    for a, b in zip(data.inputs["a"], data.inputs["b"], strict=True):
        observer.update(convolution(a) * b)
    whole = calibrate(model, data, threads=1)["flatten"]
    # Entropy and squared error find nothing worth clipping in so few values.
    keeps = method in (Method.ENTROPY, Method.MSE)
    assert (ranges["flatten"] == whole) == keeps
    # A sum in another order may move a value to the neighbouring bin: one bin of tolerance.
    bin_ = (whole.maximum - whole.minimum) / 1024
    assert ranges["flatten"].minimum == pytest.approx(observer.range.minimum, abs=bin_)
    assert ranges["flatten"].maximum == pytest.approx(observer.range.maximum, abs=bin_)


@pytest.mark.parametrize("method", [Method.MINMAX, Method.MSE], ids=str)
def test_cache_gives_the_same_ranges_without_running_the_network(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    calibrator, cache = Calibrator(method=method), CalibrationCache(tmp_path / "calibration")
    computed = calibrate(model, dataset(3), threads=1, calibrator=calibrator, cache=cache)
    for module in (calibration, tensor_reader):
        monkeypatch.setattr(module, "compile_for_host", None)
    stored = calibrate(model, dataset(3), threads=2, calibrator=calibrator, cache=cache)
    assert list(stored.items()) == list(computed.items())


class CompiledError(Exception):
    """Raised instead of compiling: the cache was not enough."""


def _other_weights(model: Model) -> Model:
    function = model.module["main"]
    constants = {}

    def change(expr: relax.Expr) -> None:
        if isinstance(expr, GenericConst) and expr.value.numpy().size == CONV.size:
            value = expr.value.numpy().copy()
            value.flat[-1] += 2.0**-20
            constants[expr] = relax.const(value)

    relax.analysis.post_order_visit(function, change)
    rebuilder = Rebuilder(function)
    for binding in Dataflow(function).bindings:
        call = binding.value
        arguments = [constants.get(a, rebuilder.use(a)) for a in call.args]
        rebuilder.bind(binding.var, with_args(call, arguments))
    assert constants
    return model.with_module(tvm.IRModule({"main": rebuilder.finish()}))


def _one_value_changed(data: Dataset) -> Dataset:
    data.inputs["b"].flat[-1] += np.float32(1e-3)
    return data


CHANGES = {
    "weights": lambda m: (_other_weights(m), dataset(3), {}),
    "one value": lambda m: (m, _one_value_changed(dataset(3)), {}),
    "sample count": lambda m: (m, dataset(2), {}),
    "method": lambda m: (m, dataset(3), {"calibrator": Calibrator(method=Method.ENTROPY)}),
    "percentile": lambda m: (
        m,
        dataset(3),
        {"calibrator": Calibrator(method=Method.PERCENTILE, percentile=99.0)},
    ),
    "layers in float": lambda m: (m, dataset(3), {"keep_float": ["conv1"]}),
    "file gone bad": lambda m: (m, dataset(3), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cache_is_missed_when_anything_changes(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    cache = CalibrationCache(tmp_path)
    for calibrator in (Calibrator(), Calibrator(method=Method.PERCENTILE, percentile=98.0)):
        calibrate(model, dataset(3), threads=1, calibrator=calibrator, cache=cache)
    files = list(tmp_path.iterdir())
    assert len(files) == 2

    def refuse(*_: object, **__: object) -> None:
        raise CompiledError

    for module in (calibration, tensor_reader):
        monkeypatch.setattr(module, "compile_for_host", refuse)
    calibrate(model, dataset(3), threads=1, cache=cache)
    if change == "file gone bad":
        for file in files:
            file.write_bytes(file.read_bytes()[:-40])
    other, data, options = CHANGES[change](model)
    with pytest.raises(CompiledError):
        calibrate(other, data, threads=1, cache=cache, **options)


def test_cache_says_so_when_it_is_used(model: Model, tmp_path: Path) -> None:
    lines: list[str] = []
    progress = silent()
    progress.log = lines.append
    for _ in range(2):
        calibrate(model, dataset(2), threads=1, cache=CalibrationCache(tmp_path), progress=progress)
    assert lines == ["calibration of 2 tensors taken from the cache"]


def test_cache_keeps_any_name_and_order(tmp_path: Path) -> None:
    arrays = {"file": np.zeros(2), "a/b\n": np.ones((2, 3)), "../x": np.array(1), "": np.array([])}
    cache = CalibrationCache(tmp_path / "deep" / "folder")
    assert cache.load({"k": 1}) is None
    cache.save({"k": 1}, arrays)
    loaded = cache.load({"k": 1})
    assert loaded is not None
    assert list(loaded) == list(arrays)
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)
    assert [p.suffix for p in (tmp_path / "deep" / "folder").iterdir()] == [".npz"]


def test_user_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_folder() == tmp_path / "hone" / "calibration"


def test_error_names_the_percentile_when_it_is_out_of_bounds(model: Model) -> None:
    calibrator = Calibrator(method=Method.PERCENTILE, percentile=3.0)
    with pytest.raises(UsageError, match=r"a percentile must be above 50 and at most 100, not 3$"):
        calibrate(model, dataset(1), threads=1, calibrator=calibrator)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", [Method.MINMAX, Method.PERCENTILE], ids=str)
def test_error_names_tensor_and_sample_when_a_value_is_not_finite(
    model: Model, bad: float, method: Method
) -> None:
    data = dataset(3)
    data.inputs["b"][1, 0, 2, 3, 4] = bad
    with pytest.raises(ModelError) as error:
        calibrate(model, data, threads=1, calibrator=Calibrator(method=method))
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
        f"calibrate\n  hint: {RANDOM_HINT}"
    )
    assert len(calibrate(model, data, threads=1, allow_random=True)) == 2


@pytest.mark.parametrize("make", [ObserveTensors, ExposeTensors])
def test_error_lists_the_names_when_a_tensor_does_not_exist(model: Model, make) -> None:
    with pytest.raises(ModelError) as error:
        apply(model.module, make(tensors=["fc", "nothing", "none"]))
    assert str(error.value) == "there is no tensor of these names\n  - nothing\n  - none"
