from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from hone import deviation, divergence, importer, parity, shadow
from hone.errors import AccuracyError
from hone.importing.onnx_file import read
from hone.importing.ranges import float_types, index_bounds
from hone.importing.reader import read_graph
from hone.model import Model
from hone.reference import NotCheckedError, _reason, reference

F32 = TensorProto.FLOAT
I64 = TensorProto.INT64


def info(name, shape, elem=F32):
    return helper.make_tensor_value_info(name, elem, shape)


def weight(name, *shape, seed=0):
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(array, name)


def make(nodes, inputs, outputs, initializers=(), opset=17):
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def network() -> Model:
    """Return three convolutions with activations between, and a sum."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="/block.2/conv", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r1"], ["s"], name="add"),
        helper.make_node("GlobalAveragePool", ["s"], ["y"], name="pool"),
    ]
    weights = [weight("w1", 4, 3, 3, 3), weight("b1", 4), weight("w2", 4, 4, 3, 3), weight("b2", 4)]
    return importer.load(make(nodes, [info("x", [1, 3, 6, 7])], [info("y", None)], weights))


def runner(model: Model, change=None):
    def run(inputs):
        results, _ = shadow.evaluate(model.module, inputs)
        names = [s.name for s in model.signature.outputs]
        outputs = dict(zip(names, results, strict=True))
        return change(outputs) if change else outputs

    return run


@relax.expr_functor.mutator
class _Alter(relax.PyExprMutator):
    """Replaces the call of one binding."""

    def __init__(self, module, name, replace):
        super().__init__(module)
        self.name, self.replace, self.replaced = name, replace, 0

    def visit_var_binding_(self, binding):
        if binding.var.name == self.name:
            new = self.builder_.emit(self.replace(self.visit_expr(binding.value)), self.name)
            self.set_var_remap(binding.var, new)
            self.replaced += 1
        else:
            super().visit_var_binding_(binding)


def altered(model: Model, name: str, replace) -> Model:
    mutator = _Alter(model.module, name, replace)
    function = mutator.visit_expr(model.module["main"])
    assert mutator.replaced == 1
    return model.with_module(tvm.IRModule({"main": function}))


def with_weight(call, change):
    data, constant = call.args
    changed = change(constant.value.numpy().copy())
    return relax.Call(call.op, [data, relax.const(changed, "float32")], call.attrs)


def one_weight(array):
    array[2, 1, 0, 0] += 0.5
    return array


def test_an_output_error_of_nan_is_not_ok():
    error = parity.OutputError(name="y", relative_error=float("nan"), tolerance=1.0)
    assert not error.ok


# ---------------------------------------------------------------- inputs


def test_random_inputs_are_seeded_and_fit_the_signature():
    model = network()
    first, again, other = (parity.random_inputs(model, s) for s in (3, 3, 4))
    np.testing.assert_array_equal(first["x"], again["x"])
    assert not np.array_equal(first["x"], other["x"])
    model.signature.check_inputs(first)


def embedding_model() -> Model:
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["w"]),
        helper.make_node("Cast", ["kinds"], ["k32"], to=TensorProto.INT32),
        helper.make_node("Reshape", ["k32", "shape"], ["kr"]),
        helper.make_node("Gather", ["types", "kr"], ["t"]),
        helper.make_node("Add", ["w", "t"], ["e"]),
        helper.make_node("Cast", ["mask"], ["m"], to=F32),
        helper.make_node("Unsqueeze", ["m", "last"], ["mu"]),
        helper.make_node("Mul", ["e", "mu"], ["y"]),
        helper.make_node("Cast", ["image"], ["z"], to=F32),
    ]
    weights = [
        weight("words", 1000, 3), weight("types", 5, 3),
        numpy_helper.from_array(np.array([1, 64]), "shape"),
        numpy_helper.from_array(np.array([-1]), "last"),
    ]  # fmt: skip
    inputs = [info(n, [1, 64], I64) for n in ("ids", "kinds", "mask")]
    inputs.append(info("image", [1, 64], TensorProto.UINT8))
    return importer.load(make(nodes, inputs, [info("y", None), info("z", None)], weights))


def test_integer_inputs_stay_within_the_tables_that_they_index():
    inputs = parity.random_inputs(embedding_model())
    assert 500 < inputs["ids"].max() < 1000
    assert 1 < inputs["kinds"].max() < 5
    assert set(np.unique(inputs["mask"])) == {0, 1}
    assert inputs["image"].max() > 200
    assert all(array.min() >= 0 for array in inputs.values())


def test_index_bounds_take_the_smallest_table_of_an_input():
    nodes = [
        helper.make_node("Gather", ["a", "i"], ["p"], axis=1),
        helper.make_node("Gather", ["b", "i"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["y"]),
    ]
    proto = make(
        nodes, [info("i", [], I64)], [info("y", None)], [weight("a", 3, 9), weight("b", 7, 3)]
    )
    assert index_bounds(read_graph(read(proto), {})) == {"i": 7}


def test_tolerance_follows_the_narrowest_float_type():
    assert deviation.tolerance(network()) == deviation.TOLERANCE["float32"]
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["h"], ["y"], to=F32),
    ]
    model = importer.load(make(nodes, [info("x", [2])], [info("y", [2])]))
    assert float_types(read_graph(read(model.source), {})) == {"float32", "float16"}
    assert deviation.tolerance(model) == deviation.TOLERANCE["float16"]


# ---------------------------------------------------------------- check


def test_check_passes_when_the_outputs_agree():
    model = network()
    report = parity.check(model, runner(model), samples=2)
    assert report.status == parity.Status.EQUAL
    assert report.samples == 2
    assert report.worst is not None
    assert report.worst < 1e-5
    assert str(report).startswith("parity with onnxruntime: equal, largest relative error ")
    assert str(report).endswith(" of 1e-04 allowed, 2 samples")


def test_check_passes_when_integers_index_tables():
    model = embedding_model()
    assert parity.check(model, runner(model)).status == parity.Status.EQUAL


BROKEN = {
    "conv1@conv2d": (
        lambda call: with_weight(call, one_weight), "Conv", "conv1", 0,
    ),
    "/block_2/conv@conv2d": (
        lambda call: with_weight(call, one_weight), "Conv", "/block.2/conv", 2,
    ),
    "relu1": (lambda call: relax.op.abs(call.args[0]), "Relu", "relu1", 1),
    "add": (lambda call: relax.op.subtract(*call.args), "Add", "add", 3),
}  # fmt: skip


@pytest.mark.parametrize("binding", BROKEN)
def test_first_divergence_is_the_layer_that_was_broken(binding):
    change, op_type, layer, equal = BROKEN[binding]
    model = altered(network(), binding, change)
    found = divergence.first_divergence(model, parity.random_inputs(model))
    assert found is not None
    assert (found.op_type, found.layer, found.layers_equal) == (op_type, layer, equal)
    assert found.relative_error > 1e-2
    assert found.given != found.expected


def test_first_divergence_is_none_when_every_layer_agrees():
    model = network()
    assert divergence.first_divergence(model, parity.random_inputs(model)) is None


def test_padding_that_keeps_the_shape_is_found_when_it_is_wrong():
    def move(call):
        attrs = call.attrs
        return relax.op.nn.conv2d(
            *call.args, strides=attrs.strides, padding=[0, 2, 2, 0], dilation=attrs.dilation
        )

    model = altered(network(), "/block_2/conv@conv2d", move)
    found = divergence.first_divergence(model, parity.random_inputs(model))
    assert found is not None
    assert found.layer == "/block.2/conv"


def test_check_names_the_first_wrong_layer_in_full():
    model = altered(network(), "relu1", lambda call: relax.op.add(*[call.args[0]] * 2))
    with pytest.raises(AccuracyError) as caught:
        parity.check(model, runner(model), seed=7)
    assert caught.value.exit_code == 4
    inputs = parity.random_inputs(model, 7)
    session = reference(model, extra=["c1", "r1"])
    values = session.run(inputs)
    twice = values["c1"] * 2
    index = np.unravel_index(np.argmax(np.abs(twice - values["r1"])), twice.shape)
    error = np.abs(twice - values["r1"]).max() / values["r1"].max()
    given, _ = shadow.evaluate(model.module, inputs)
    output = deviation.relative_error(given[0], values["y"])
    assert str(caught.value) == (
        "the compiled model differs from onnxruntime on the inputs of seed 7: output 'y' has "
        f"relative error {output:.1e}, 1e-04 is allowed; the first layer that differs is Relu "
        f"'relu1': relative error {error:.1e}, at {[int(i) for i in index]} it is "
        f"{twice[index]:.6g}, onnxruntime's is {values['r1'][index]:.6g}; 1 layers before it agree"
        "\n  hint: the import of this operator is wrong: report it with the model"
    )


def test_check_blames_lowering_when_every_layer_of_the_import_agrees():
    model = network()
    wrong = runner(model, lambda outputs: {k: v * np.float32(1.01) for k, v in outputs.items()})
    with pytest.raises(AccuracyError) as caught:
        parity.check(model, wrong)
    assert str(caught.value) == (
        "the compiled model differs from onnxruntime on the inputs of seed 0: output 'y' has "
        "relative error 1.0e-02, 1e-04 is allowed; no layer of the un-fused module differs: the "
        "error comes from lowering (layout, fusion, schedule or code generation), not from the "
        "import\n  hint: compile for --target host without tuning records, to see whether a "
        "record is wrong"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v * np.float32(1.0002),
        lambda v: np.full_like(v, np.nan),
        lambda v: v[:, :2],
        lambda v: np.zeros_like(v),
    ],
    ids=["tolerance", "nan", "shape", "zeros"],
)
def test_check_fails_when_an_output_is_wrong(change):
    model = network()
    wrong = runner(model, lambda outputs: {"y": change(outputs["y"])})
    with pytest.raises(AccuracyError):
        parity.check(model, wrong, samples=1)


def test_check_uses_the_tolerance_that_is_given():
    model = network()
    wrong = runner(model, lambda outputs: {k: v * np.float32(1.01) for k, v in outputs.items()})
    assert parity.check(model, wrong, rtol=0.02).status == parity.Status.EQUAL


# ---------------------------------------------------------------- not checked


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: /src/upsample.h:314 "
            "onnxruntime::UpsampleBase::UpsampleBase(const KernelInfoType&) [with KernelInfoType = "
            "onnxruntime::OpKernelInfo] [ONNXRuntimeError] : 1 : FAIL : upsample.h:579 "
            "ScalesValidation 'Cubic' mode only supports:\n  * 2-D inputs",
            "'Cubic' mode only supports: * 2-D inputs",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape "
            "node. Name:'' Status Message: /src/core/reshape_helper.h:91 onnxruntime::ReshapeHelper"
            "::ReshapeHelper(const onnxruntime::TensorShape&, bool) a == b was false. "
            "The input tensor cannot be reshaped. Input shape:{3}\n",
            "running Reshape node. The input tensor cannot be reshaped. Input shape:{3}",
        ),
        ("Required inputs (['x']) are missing.", "Required inputs (['x']) are missing."),
    ],
)
def test_reason_leaves_out_codes_and_places_in_onnxruntimes_source(said: str, kept: str) -> None:
    assert _reason(RuntimeError(said)) == f"onnxruntime cannot run it: {kept}"


def test_a_model_is_not_checked_when_onnxruntime_lacks_its_types():
    nodes = [helper.make_node("Sin", ["x"], ["y"])]
    bf16 = TensorProto.BFLOAT16
    model = importer.load(make(nodes, [info("x", [2], bf16)], [info("y", [2], bf16)], opset=22))
    report = parity.check(model, runner(model))
    assert report.status == parity.Status.NOT_CHECKED
    assert report.worst is None
    assert report.reason.startswith("onnxruntime cannot run it: ")
    assert str(report) == f"parity with onnxruntime: not checked: {report.reason}"


def test_a_model_is_not_checked_when_its_source_was_not_kept():
    model = dataclasses.replace(network(), source=None)
    report = parity.check(model, runner(model))
    assert report.reason == "the model's ONNX source was not kept"
    with pytest.raises(NotCheckedError, match="was not kept"):
        reference(model)


def test_onnxruntime_writes_nothing_when_it_refuses_a_model(capfd):
    model = network()
    source = onnx.ModelProto()
    source.CopyFrom(model.source)
    source.graph.node[1].op_type = "Nonsense"
    report = parity.check(dataclasses.replace(model, source=source), runner(model))
    assert report.status == parity.Status.NOT_CHECKED
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_inputs_of_a_model_are_arrays_when_they_are_scalars():
    node = helper.make_node("Mul", ["x", "s"], ["y"])
    model = importer.load(make([node], [info("x", [2]), info("s", [])], [info("y", [2])]))
    assert isinstance(parity.random_inputs(model)["s"], np.ndarray)
    assert parity.check(model, runner(model)).status == parity.Status.EQUAL


@pytest.mark.parametrize("op", ["Div", "Mod"])
def test_what_integers_are_divided_by_is_never_zero(op):
    int64 = onnx.TensorProto.INT64
    nodes = [
        helper.make_node("Identity", ["b"], ["divisor"]),
        helper.make_node(op, ["a", "divisor"], ["y"]),
    ]
    values = [info("a", [64], int64), info("b", [64], int64)]
    model = importer.load(make(nodes, values, [info("y", [64], int64)]))
    inputs = parity.random_inputs(model)
    assert inputs["b"].min() == 1
    assert inputs["a"].min() == 0
    assert parity.check(model, runner(model)).status == parity.Status.EQUAL


def test_the_reference_starts_at_once_when_threads_are_many():
    model = network()
    assert parity.check(model, runner(model), threads=100_000).status == parity.Status.EQUAL
