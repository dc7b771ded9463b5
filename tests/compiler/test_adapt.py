from __future__ import annotations

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper

from hone.adapt import RoundingTask, learn_roundings, weight_tasks
from hone.calibrate import calibrate
from hone.data import Dataset
from hone.importer import load
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.quantize.expose_tensors import ExposeTensors
from hone.passes.quantize.integer_layer import quantize_weights
from hone.passes.quantize.qparams import INT8, dequantize, quantize
from hone.passes.quantize.quantize_int8 import quantize_int8, weighted_sites
from hone.passes.quantize.quantize_weights import quantize_weight_only
from hone.passes.quantize.weight_schemes import Granularity, Scheme, WeightOptions
from hone.tensor_reader import TensorReader, compile_for_host

RNG = np.random.default_rng(5)
CONV = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)
DEPTHWISE = RNG.normal(size=(4, 1, 3, 3)).astype(np.float32)
FC = RNG.normal(size=(4 * 5 * 6, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Model:
    """Convolution, ReLU, depthwise convolution, flatten, product: ``a`` → ``y``."""
    nodes = [
        helper.make_node("Conv", ["a", "w"], ["t1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["t1"], ["t2"], name="relu1"),
        helper.make_node("Conv", ["t2", "d"], ["t3"], name="dw", pads=[1, 1, 1, 1], group=4),
        helper.make_node("Flatten", ["t3"], ["t4"], name="flatten"),
        helper.make_node("MatMul", ["t4", "f"], ["y"], name="fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 3, 5, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(v, n) for v, n in ((CONV, "w"), (DEPTHWISE, "d"), (FC, "f"))],
    )
    proto: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    imported = load(proto)
    return imported.with_module(apply(imported.module, ToNHWC()))


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = np.random.default_rng(0)
    # Smooth images: neighbours are alike, so errors of neighbouring weights add up.
    images = rng.normal(size=(12, 1, 3, 1, 1)) + 0.3 * rng.normal(size=(12, 1, 3, 5, 6))
    return Dataset(inputs={"a": images.astype(np.float32)}, labels=None, source="x.npz")


def tasks(model: Model, ranges) -> list[RoundingTask]:
    result = []
    for site, levels in weighted_sites(model.module, ranges):
        _, qparams = quantize_weights(site, levels)
        column = (len(site.weight), 1)
        result.append(
            RoundingTask(
                site=site,
                scale=qparams.scale.reshape(column),
                zero_point=qparams.zero_point.reshape(column),
                type=INT8,
                data=levels,
            )
        )
    return result


def test_every_layer_answers_better_inside_the_network(model: Model, data: Dataset) -> None:
    ranges = calibrate(model, data, threads=1)
    wanted = tasks(model, ranges)
    found = learn_roundings(model, data, wanted, threads=1, steps=200)
    assert found.notes == ()
    assert set(found.gains) == {"conv1", "dw", "fc"}
    assert all(gain <= 1.0 for gain in found.gains.values())
    assert found.gains["conv1"] < 0.7
    assert found.gains["fc"] < 0.7
    # The product's gain by hand: its input as the float network gives it, quantized.
    task = next(task for task in wanted if task.site.layer == "fc")
    reader = TensorReader(model, [str(task.site.inputs[0].name)], threads=1)
    rows = np.concatenate(
        [next(iter(reader.read(data.sample(index)).values())) for index in range(len(data))]
    )
    rows = dequantize(quantize(rows, task.data), task.data).astype(np.float64)
    nearest, qparams = quantize_weights(task.site, task.data)
    errors = [
        np.square(rows @ (levels * qparams.scale[:, None] - task.site.weight).T).mean()
        for levels in (found.levels["fc"].astype(np.float64), nearest.astype(np.float64))
    ]
    assert found.gains["fc"] == pytest.approx(errors[0] / errors[1], rel=0.01)


def test_learned_levels_are_what_is_quantized(model: Model, data: Dataset) -> None:
    ranges = calibrate(model, data, threads=1)
    found = learn_roundings(model, data, tasks(model, ranges), threads=1, steps=50)
    shaped = {
        site.layer: found.levels[site.layer].reshape(site.weight.shape)
        for site, _ in weighted_sites(model.module, ranges)
    }
    plain = quantize_int8(model.module, ranges).module
    rounded = quantize_int8(model.module, ranges, rounded=shaped).module
    names = [layer.result for layer in quantize_int8(model.module, ranges).quantized]
    sample = data.sample(0)
    before, after = (
        TensorReader(model.with_module(module), names, threads=1).read(sample)
        for module in (plain, rounded)
    )
    assert any((before[name] != after[name]).any() for name in names)


def test_layers_take_turns_when_memory_is_short(model: Model, data: Dataset) -> None:
    ranges = calibrate(model, data, threads=1)
    wanted = tasks(model, ranges)
    options = {"threads": 1, "steps": 20}
    whole = learn_roundings(model, data, wanted, **options)
    # conv1 takes 27 x 27 numbers, the product 120 x 120.
    turns = learn_roundings(model, data, wanted, memory_bytes=4 * 120 * 120, **options)
    for layer, levels in whole.levels.items():
        np.testing.assert_array_equal(turns.levels[layer], levels)
    short = learn_roundings(model, data, wanted, memory_bytes=4 * 120 * 119, **options)
    assert set(short.levels) == {"conv1", "dw"}
    assert short.notes == (
        "fc stays rounded to nearest: its 120 inputs need 0 MiB of second moments, "
        "0 MiB are allowed",
    )


def test_a_time_limit_is_noted_and_nothing_gets_worse(model: Model, data: Dataset) -> None:
    ranges = calibrate(model, data, threads=1)
    found = learn_roundings(model, data, tasks(model, ranges), threads=1, seconds=1e-6)
    assert found.notes == ("1e-06 s ended the rounding of 3 layers before 1000 steps",)
    assert all(gain <= 1.0 for gain in found.gains.values())


@pytest.mark.parametrize(
    "options",
    [
        WeightOptions(bits=4, granularity=Granularity.GROUP, group_size=8, symmetric=False),
        WeightOptions(bits=2, granularity=Granularity.TENSOR),
    ],
    ids=["groups", "tensor"],
)
def test_weights_alone_take_the_learned_levels(
    model: Model, data: Dataset, options: WeightOptions
) -> None:
    wanted = weight_tasks(model.module, options)
    assert [task.site.layer for task in wanted] == ["conv1", "dw", "fc"]
    found = learn_roundings(model, data, wanted, threads=1, steps=200)
    plain = quantize_weight_only(model.module, options)
    rounded = quantize_weight_only(model.module, options, rounded=found.levels)
    float_, before, after = (
        np.stack([compile_for_host(tupled(m), threads=1)([x])[0] for x in data.inputs["a"]])
        for m in (model.module, plain.module, rounded.module)
    )
    assert np.square(after - float_).mean() < 0.5 * np.square(before - float_).mean()
    # Nearest to the weights is what the others are.
    assert all(
        b.sqnr_db > a.sqnr_db for a, b in zip(rounded.quantized, plain.quantized, strict=True)
    )


def tupled(module: tvm.IRModule) -> tvm.IRModule:
    output = str(module["main"].body.body.name)
    return apply(module, ExposeTensors(tensors=[output]))


def test_ternary_and_binary_weights_are_not_rounded(model: Model) -> None:
    for scheme in (Scheme.TERNARY, Scheme.BINARY):
        assert weight_tasks(model.module, WeightOptions(scheme=scheme)) == ()
    kept = weight_tasks(model.module, WeightOptions(bits=4), keep_float=["fc"])
    assert [task.site.layer for task in kept] == ["conv1", "dw"]
