from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

import hone
from hone import importer, models, shadow
from hone.errors import ModelError, UsageError
from hone.importing.layer_names import binding_names, layer_binding, node_ids, part, unique
from hone.reference import reference
from hone.signature import TensorSpec

F32 = TensorProto.FLOAT
I64 = TensorProto.INT64


def info(name, shape, elem=F32):
    return helper.make_tensor_value_info(name, elem, shape)


def weight(name, *shape, seed=0):
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(array, name)


def ints(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


def make(nodes, inputs, outputs, initializers=(), opset=17, **options):
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers))
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, **options)


def conv_model(**options):
    return make(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", pads=[1, 1, 1, 1])],
        [info("x", [1, 3, 5, 7])],
        [info("y", None)],
        [weight("w", 4, 3, 3, 3), weight("b", 4)],
        **options,
    )


def failure(model, shapes=None) -> ModelError:
    with pytest.raises(ModelError) as caught:
        importer.load(model, shapes)
    assert caught.value.exit_code == 3
    return caught.value


def bindings(model):
    return [b for block in model.module["main"].body.blocks for b in block.bindings]


def run(model, **inputs):
    return shadow.evaluate(model.module, inputs)[0]


# ---------------------------------------------------------------- shapes of arguments


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x:[1,3,224,224]", ("x", (1, 3, 224, 224))),
        ("gpu_0/data_0:[1, 3]", ("gpu_0/data_0", (1, 3))),
        ("a:[0]:0:[2]", ("a:[0]:0", (2,))),
        ("serving_default_x:0:[1 8]", ("serving_default_x:0", (1, 8))),
        (" x:[ 1 , 2, ] ", ("x", (1, 2))),
        ("scalar:[]", ("scalar", ())),
    ],
)
def test_parse_shape_splits_at_the_last_bracket(text, expected):
    assert importer.parse_shape(text) == expected


@pytest.mark.parametrize("text", ["", "x", "x:1,3", "x[1]", ":[1]", "x:[1", "x:[1]]"])
def test_parse_shape_is_a_usage_error_when_it_has_another_form(text):
    with pytest.raises(UsageError) as caught:
        importer.parse_shape(text)
    assert caught.value.exit_code == 2


def test_parse_shape_names_what_is_no_size():
    with pytest.raises(UsageError) as caught:
        importer.parse_shape("x:[N=1..8@4,3,-1,0,2.5]")
    assert str(caught.value) == (
        "--shape: sizes are whole numbers from 1, in 'x:[N=1..8@4,3,-1,0,2.5]' this is not: "
        "N=1..8@4, -1, 0, 2.5\n  hint: give every dynamic dimension one value, such as "
        "'input:[1,3,224,224]'"
    )


# ---------------------------------------------------------------- layer names


def test_unique_leaves_given_names_alone_when_numbers_collide():
    assert unique(["a", "a", "a_1", "a"]) == ["a", "a_2", "a_1", "a_3"]


def test_node_ids_use_the_operator_and_output_when_a_node_has_no_name():
    rows = [("c", "Conv", "y"), ("", "Relu", "z"), ("c", "Conv", "w")]
    assert node_ids(rows) == ["c", "Relu_z", "c_1"]


def test_binding_names_are_what_the_block_builder_keeps():
    names = binding_names(["/l1/conv.0:1", "/l1/conv_0:1", "x", "a@b"], reserved=["x"])
    assert names == ["/l1/conv_0:1", "/l1/conv_0:1_1", "x_1", "a_b"]
    assert layer_binding(part(names[0], "conv2d")) == names[0]


NAMES_AFTER_PASSES = [
    relax.transform.Normalize(),
    relax.transform.DecomposeOpsForInference(),
    relax.transform.CanonicalizeBindings(),
    relax.transform.FoldConstant(),
    relax.transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "OHWI"]}),
    relax.transform.CanonicalizeBindings(),
    relax.transform.LegalizeOps(),
    relax.transform.AnnotateTIROpPattern(),
    relax.transform.FuseOps(),
]


def test_binding_names_survive_the_passes_before_fusion():
    model = importer.load(
        make(
            [
                helper.make_node("Conv", ["a.b:0", "w"], ["c"], name="/l.1/conv", pads=[1] * 4),
                helper.make_node("Relu", ["c"], ["d"], name="/l.1/relu"),
                helper.make_node("Conv", ["d", "v"], ["e"], name="/l.2/conv:0"),
                helper.make_node("GlobalMaxPool", ["e"], ["f"], name="pool"),
            ],
            [info("a.b:0", [1, 3, 6, 6])],
            [info("f", None)],
            [weight("w", 4, 3, 3, 3), weight("v", 5, 4, 1, 1)],
        )
    )
    wanted = {layer.binding for layer in model.layers if layer.op_type != "GlobalMaxPool"}
    module = model.module
    for step in NAMES_AFTER_PASSES[:-1]:
        module = step(module)
        names = {b.var.name for block in module["main"].body.blocks for b in block.bindings}
        assert wanted <= names, step.info.name


# ---------------------------------------------------------------- import


def test_signature_keeps_exact_names_when_they_are_no_identifiers():
    nodes = [
        helper.make_node("Add", ["gpu_0/data_0", "a.b:1"], ["out:0"]),
        helper.make_node("Mul", ["gpu_0/data_0", "a.b:1"], ["7"]),
    ]
    inputs = [info("gpu_0/data_0", [1, 2]), info("a.b:1", [1, 2])]
    model = importer.load(make(nodes, inputs, [info("7", [1, 2]), info("out:0", [1, 2])]))
    assert [s.name for s in model.signature.inputs] == ["gpu_0/data_0", "a.b:1"]
    assert [s.name for s in model.signature.outputs] == ["7", "out:0"]
    assert [p.name for p in model.module["main"].params] == ["gpu_0/data_0", "a.b:1"]
    x, y = np.array([[1, 2]], np.float32), np.array([[3, 5]], np.float32)
    product, total = run(model, **{"gpu_0/data_0": x, "a.b:1": y})
    np.testing.assert_array_equal(product, [[3, 10]])
    np.testing.assert_array_equal(total, [[4, 7]])


def test_initializers_are_no_inputs_when_they_are_listed_as_such():
    proto = conv_model()
    proto.graph.input.extend([info("w", [4, 3, 3, 3]), info("b", [4])])
    model = importer.load(proto)
    assert model.signature.inputs == (TensorSpec(name="x", dtype="float32", shape=(1, 3, 5, 7)),)
    assert [i.name for i in model.source.graph.input] == ["x"]


def test_module_is_one_dataflow_block_with_named_parts():
    model = importer.load(conv_model())
    assert isinstance(model.module["main"].body.blocks[0], relax.DataflowBlock)
    assert len(model.module["main"].body.blocks) == 1
    assert [b.var.name for b in bindings(model)] == ["conv@conv2d", "conv"]
    assert dict(model.module["main"].attrs) == {"global_symbol": "main"}
    relax.analysis.well_formed(model.module)
    assert model.layers == (importer_layer("conv", "Conv", "conv"),)
    assert model.origin.weights_bytes == 4 * (4 * 27 + 4)


def importer_layer(layer, op_type, binding):
    from hone.model import Layer

    return Layer(id=layer, op_type=op_type, binding=binding)


def test_layers_that_only_alias_have_the_binding_of_what_they_alias():
    nodes = [
        helper.make_node("Identity", ["x"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Dropout", ["b"], ["y"], name="drop"),
    ]
    model = importer.load(make(nodes, [info("x", [2])], [info("y", [2])]))
    assert [(i.id, i.binding) for i in model.layers] == [
        ("first", "x"),
        ("relu", "relu"),
        ("drop", "relu"),
    ]


@pytest.mark.parametrize("result", ["x", "c"], ids=["input", "constant"])
def test_outputs_that_nothing_computes_are_returned(result):
    nodes = [helper.make_node("Identity", [result], ["y"])]
    constant = numpy_helper.from_array(np.array([5, 6], np.float32), "c")
    model = importer.load(make(nodes, [info("x", [2])], [info("y", [2])], [constant]))
    (y,) = run(model, x=np.array([1, 2], np.float32))
    np.testing.assert_array_equal(y, [1, 2] if result == "x" else [5, 6])


def test_several_outputs_of_a_node_have_names():
    nodes = [helper.make_node("Split", ["x"], ["a", "b"], axis=1, name="split", num_outputs=2)]
    model = importer.load(
        make(nodes, [info("x", [1, 5])], [info("a", None), info("b", None)], opset=18)
    )
    assert [s.shape for s in model.signature.outputs] == [(1, 3), (1, 2)]
    assert {"split", "split@1"} <= {b.var.name for b in bindings(model)}


@pytest.mark.parametrize(
    ("opset", "attributes", "sizes", "parts"),
    [
        (13, {}, None, (2, 2, 2)),
        (18, {"num_outputs": 4}, None, (2, 2, 2)),
        (18, {}, (1, 2, 3), (1, 2, 3)),
        (11, {"split": [3, 1, 2]}, None, (3, 1, 2)),
    ],
    ids=["equal", "equal, four, the last one smaller", "input", "attribute"],
)
@pytest.mark.parametrize("read", [0, 1, 2])
def test_a_split_whose_parts_are_not_all_read_keeps_their_sizes(
    opset: int, attributes: dict, sizes: tuple[int, ...] | None, parts: tuple[int, ...], read: int
) -> None:
    width = sum(parts) + (1 if attributes.get("num_outputs") else 0)
    names = [f"part{i}" for i in range(attributes.get("num_outputs", 3))]
    given = [ints("sizes", *sizes)] if sizes else []
    nodes = [
        helper.make_node(
            "Split", ["x", "sizes"] if sizes else ["x"], names, axis=1, name="split", **attributes
        ),
        helper.make_node("Neg", [names[read]], ["y"]),
    ]
    model = importer.load(make(nodes, [info("x", [3, width])], [info("y", None)], given, opset))
    x = np.arange(3 * width, dtype="float32").reshape(3, width)
    (y,) = run(model, x=x)
    first = sum(parts[:read])
    np.testing.assert_array_equal(y, -x[:, first : first + parts[read]])


def test_indices_alone_are_read_of_the_largest() -> None:
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["values", "indices"]),
        helper.make_node("Cast", ["indices"], ["y"], to=TensorProto.FLOAT),
    ]
    model = importer.load(make(nodes, [info("x", [2, 4])], [info("y", None)], [ints("k", 2)]))
    x = np.array([[3, 1, 4, 2], [0, 7, 5, 6]], np.float32)
    np.testing.assert_array_equal(run(model, x=x)[0], [[2, 0], [1, 3]])


def test_weights_from_nodes_are_folded():
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["ones"], value=numpy_helper.from_array(
            np.array([0.5], np.float32))),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("Identity", ["wt"], ["wi"]),
        helper.make_node("Constant", [], ["k"], value_ints=[4, 3]),
        helper.make_node("Reshape", ["wi", "k"], ["wr"]),
        helper.make_node("Add", ["wr", "ones"], ["ws"]),
        helper.make_node("MatMul", ["x", "ws"], ["y"], name="mm"),
    ]  # fmt: skip
    w = weight("w", 3, 4)
    model = importer.load(make(nodes, [info("x", [2, 4])], [info("y", None)], [w, ints("s", 4, 3)]))
    assert [layer.id for layer in model.layers] == ["mm"]
    (binding,) = bindings(model)
    expected = numpy_helper.to_array(w).T.reshape(4, 3) + np.float32(0.5)
    np.testing.assert_array_equal(binding.value.args[1].value.numpy(), expected)


def test_shape_arithmetic_is_folded_when_shapes_are_static():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Concat", ["n", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"], name="flat"),
    ]
    model = importer.load(
        make(
            nodes, [info("x", ["N", 3, 4])], [info("y", None)], [ints("zero", 0), ints("rest", -1)]
        ),
        {"x": (2, 3, 4)},
    )
    assert [layer.id for layer in model.layers] == ["flat"]
    assert model.signature.outputs[0].shape == (2, 12)


def test_large_constants_are_left_to_run_time(monkeypatch):
    from hone.importing import reader

    monkeypatch.setattr(reader, "FOLD_LIMIT_BYTES", 64)
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["zeros"], name="zeros"),
        helper.make_node("Add", ["x", "zeros"], ["y"], name="add"),
    ]
    model = importer.load(make(nodes, [info("x", [5, 5])], [info("y", None)], [ints("s", 5, 5)]))
    assert [layer.id for layer in model.layers] == ["zeros", "add"]
    x = np.arange(25, dtype=np.float32).reshape(5, 5)
    np.testing.assert_array_equal(run(model, x=x)[0], x)


def test_64_bit_constants_keep_their_width():
    big = np.array([2**40, -(2**40)], np.int64)
    nodes = [helper.make_node("Add", ["x", "big"], ["y"])]
    model = importer.load(
        make(nodes, [info("x", [2], I64)], [info("y", None, I64)],
             [numpy_helper.from_array(big, "big")])
    )  # fmt: skip
    np.testing.assert_array_equal(run(model, x=np.array([1, 1], np.int64))[0], big + 1)


def test_nodes_that_no_output_needs_are_dropped():
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="used"),
        helper.make_node("LSTM", ["x", "x", "x"], ["z"], name="unused", hidden_size=3),
    ]
    model = importer.load(make(nodes, [info("x", [2])], [info("y", [2])]))
    assert [layer.id for layer in model.layers] == ["used"]


@pytest.mark.parametrize("opset", [9, 11, 13, 18, 21, onnx.defs.onnx_opset_version()])
def test_every_opset_imports(opset):
    model = importer.load(conv_model(opset=opset))
    assert model.origin.opset == opset


def test_file_of_the_newest_onnx_is_one_that_onnxruntime_opens():
    proto = conv_model()
    proto.ir_version = onnx.IR_VERSION
    model = importer.load(proto)
    assert proto.ir_version == onnx.IR_VERSION
    x = np.ones((1, 3, 5, 7), np.float32)
    (expected,) = reference(model).run({"x": x}).values()
    np.testing.assert_allclose(run(model, x=x)[0], expected, rtol=1e-5, atol=1e-5)


def test_weights_that_are_nan_are_a_problem():
    proto = conv_model()
    values = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    values.flat[[3, 5]] = np.nan
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w"))
    assert str(failure(proto)) == (
        "the model has 1 problem\n  - initializer 'w': 2 of 108 weights are NaN (export the model "
        "again from weights that are finite)"
    )


@pytest.mark.parametrize("opset", [9, 11])
def test_clip_is_relu_and_minimum_when_its_bounds_are_constant(opset):
    if opset < 11:
        node = helper.make_node("Clip", ["x"], ["y"], name="clip", min=0.0, max=6.0)
        bounds = []
    else:
        node = helper.make_node("Clip", ["x", "low", "high"], ["y"], name="clip")
        bounds = [numpy_helper.from_array(np.float32(v), n) for v, n in ((0, "low"), (6, "high"))]
    model = importer.load(make([node], [info("x", [4])], [info("y", [4])], bounds, opset=opset))
    assert [b.value.op.name for b in bindings(model)] == ["relax.nn.relu", "relax.minimum"]
    assert [b.var.name for b in bindings(model)] == ["clip@relu", "clip"]
    (y,) = run(model, x=np.array([-1, 0.5, 6, 9], np.float32))
    np.testing.assert_array_equal(y, [0, 0.5, 6, 6])


def test_gather_stays_inside_the_table_when_an_index_is_beyond_it():
    nodes = [helper.make_node("Gather", ["table", "i"], ["y"])]
    table = weight("table", 4, 3)
    model = importer.load(make(nodes, [info("i", [3], I64)], [info("y", None)], [table]))
    (y,) = run(model, i=np.array([-1, 3, 10**9], np.int64))
    rows = numpy_helper.to_array(table)
    np.testing.assert_array_equal(y[:2], rows[[3, 3]])
    assert any(np.array_equal(y[2], row) for row in rows)


def truncated(a, b):
    """Python's integers, rounded towards zero and wrapped around."""
    limits = np.iinfo(a.dtype)
    quotients = [abs(int(p)) // abs(int(q)) * (1 if (p < 0) == (q < 0) else -1)
                 for p, q in zip(a, b, strict=True)]  # fmt: skip
    span = int(limits.max) - int(limits.min) + 1
    return np.array([(q - int(limits.min)) % span + int(limits.min) for q in quotients], a.dtype)


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint64"])
@pytest.mark.parametrize("fixed", [False, True], ids=["fed", "constant"])
@pytest.mark.parametrize(
    ("op", "attributes", "expected"),
    [("Div", {}, truncated), ("Mod", {}, np.mod), ("Mod", {"fmod": 1}, np.fmod)],
    ids=["div", "mod", "fmod"],
)
def test_no_divisor_ends_the_process(kind, fixed, op, attributes, expected):
    limits = np.iinfo(kind)
    minus = -1 if limits.min < 0 else 1
    a = np.array([limits.min, 7, limits.max, limits.min, 7, 9], kind)
    b = np.array([minus, 2 * minus, 5, 3, 1, 1], kind)
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    node = helper.make_node(op, ["a", "b"], ["y"], **attributes)
    if fixed:
        stored = [numpy_helper.from_array(b, "b")]
        model = importer.load(make([node], [info("a", [6], elem)], [info("y", None, elem)], stored))
        (y,) = run(model, a=a)
    else:
        inputs = [info(name, [6], elem) for name in "ab"]
        model = importer.load(make([node], inputs, [info("y", None, elem)]))
        b[5] = 0
        (y,) = run(model, a=a, b=b)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(y[:5], expected(a[:5], b[:5]))


def test_a_constant_divisor_of_zero_is_a_problem():
    node = helper.make_node("Mod", ["a", "b"], ["y"], name="mod")
    stored = [ints("b", 3, 0)]
    error = failure(make([node], [info("a", [2], I64)], [info("y", None, I64)], stored))
    assert error.problems == ("Mod 'mod': it cannot be converted: the constant divisor holds a 0",)


def test_a_converter_that_returns_another_type_is_a_model_error(monkeypatch):
    from hone.importing import relax_builder

    broken = {**relax_builder.CONVERTERS, "Relu": lambda call: relax.op.sum(call.inputs[0])}
    monkeypatch.setattr(relax_builder, "CONVERTERS", broken)
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    error = failure(make(nodes, [info("x", [2])], [info("y", [2])]))
    assert error.problems == (
        "Relu 'relu': output 'y' is converted to float32[], required is y: float32[2]",
    )


def test_proto_is_not_changed():
    proto = conv_model()
    before = proto.SerializeToString(deterministic=True)
    importer.load(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_local_functions_are_inlined():
    function = helper.make_function(
        "custom", "Twice", ["a"], ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"], name="sum")],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    nodes = [helper.make_node("Twice", ["x"], ["y"], name="twice", domain="custom")]
    proto = make(nodes, [info("x", [2])], [info("y", [2])], functions=[function])
    proto.opset_import.append(helper.make_opsetid("custom", 1))
    (y,) = run(importer.load(proto), x=np.array([1, 2], np.float32))
    np.testing.assert_array_equal(y, [2, 4])


def test_functions_of_onnx_itself_are_expanded_when_their_operator_is_unsupported():
    nodes = [helper.make_node("Celu", ["x"], ["y"], name="celu", alpha=2.0)]
    (y,) = run(
        importer.load(make(nodes, [info("x", [3])], [info("y", [3])])),
        x=np.array([-2, 0, 3], np.float32),
    )
    np.testing.assert_allclose(y, [2 * (np.exp(-1) - 1), 0, 3], rtol=1e-6)


# ---------------------------------------------------------------- the reference networks


@pytest.fixture(scope="module", params=models.names())
def network(request):
    return importer.load(models.build(request.param))


def test_every_weight_bearing_layer_is_found_by_its_id(network):
    """Each Conv, Gemm and MatMul with a weight has its operator in its own bindings."""
    operators = {"Conv": "relax.nn.conv2d", "Gemm": "relax.matmul", "MatMul": "relax.matmul"}
    initializers = {t.name for t in network.source.graph.initializer}
    by_layer: dict[str, list[str]] = {}
    for binding in bindings(network):
        if isinstance(binding.value, relax.Call):
            names = by_layer.setdefault(layer_binding(binding.var.name), [])
            names.append(binding.value.op.name)
    layers = {layer.id: layer for layer in network.layers}
    found = 0
    for node in network.source.graph.node:
        if node.op_type in operators and initializers.intersection(node.input):
            layer = layers[node.name]
            assert layer.op_type == node.op_type
            assert operators[node.op_type] in by_layer[layer.binding]
            found += 1
    assert found >= 3


def test_every_layer_has_a_binding_of_its_output_shape(network):
    types = {b.var.name: b.var.ty for b in bindings(network)}
    for layer in network.layers:
        assert layer.binding in types


def test_reference_networks_import_without_opaque_calls(network):
    function = network.module["main"]
    relax.analysis.well_formed(network.module)
    assert len(network.module.functions) == 1
    assert [p.name for p in function.params] == [s.name for s in network.signature.inputs]
    seen = []
    relax.analysis.post_order_visit(
        function, lambda e: seen.append(e.op) if isinstance(e, relax.Call) else None
    )
    assert all(isinstance(o, tvm.ir.Op) and o.name != "relax.call_tir" for o in seen)


# ---------------------------------------------------------------- files


def test_files_and_protos_give_the_same_module(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(conv_model(), str(path))
    loaded, again = importer.load(path), importer.load(str(path))
    tvm.ir.assert_structural_equal(loaded.module, importer.load(conv_model()).module)
    assert loaded.origin == again.origin
    assert loaded.origin.path == str(path)
    assert importer.load(conv_model()).origin.path is None


def save_external(folder: Path) -> Path:
    path = folder / "m.onnx"
    onnx.save(
        conv_model(), str(path), save_as_external_data=True, location="m.data", size_threshold=0
    )
    return path


def test_external_data_are_read_and_hashed(tmp_path):
    path = save_external(tmp_path)
    model = importer.load(path)
    tvm.ir.assert_structural_equal(model.module, importer.load(conv_model()).module)
    data = tmp_path / "m.data"
    stored = bytearray(data.read_bytes())
    stored[0] ^= 1
    data.write_bytes(stored)
    assert importer.load(path).origin.sha256 != model.origin.sha256


def test_external_data_are_named_when_they_are_missing(tmp_path):
    path = save_external(tmp_path)
    (tmp_path / "m.data").unlink()
    assert str(failure(path)) == (
        f"{path}: the model's external data cannot be read\n"
        "  - external data 'm.data' are missing; 2 tensors lie there, the first is 'w'\n"
        "  hint: keep the data files beside the model, under the names that it was saved with"
    )


def test_external_data_are_refused_when_they_are_cut_short(tmp_path):
    path = save_external(tmp_path)
    data = tmp_path / "m.data"
    data.write_bytes(data.read_bytes()[:100])
    assert "'w'" in str(failure(path))


@pytest.mark.parametrize("location", ["../m.data", "/etc/hostname"])
def test_external_data_are_refused_when_they_lie_outside_of_the_folder(tmp_path, location):
    (tmp_path / "inner").mkdir()
    path = save_external(tmp_path / "inner")
    (tmp_path / "inner" / "m.data").rename(tmp_path / "m.data")
    proto = onnx.load(str(path), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(proto.SerializeToString())
    error = failure(path)
    assert error.problems == (
        f"external data {location!r} lie outside of the model's folder: refused",
    )


def test_external_data_are_refused_when_a_link_leads_out_of_the_folder(tmp_path):
    (tmp_path / "inner").mkdir()
    path = save_external(tmp_path / "inner")
    (tmp_path / "inner" / "m.data").rename(tmp_path / "secret")
    (tmp_path / "inner" / "m.data").symlink_to(tmp_path / "secret")
    assert failure(path).problems == (
        "external data 'm.data' lie outside of the model's folder: refused",
    )


def test_external_data_of_a_proto_are_an_error(tmp_path):
    proto = onnx.load(str(save_external(tmp_path)), load_external_data=False)
    assert str(failure(proto)) == (
        "the model's tensors lie in external files, a proto does not say where\n"
        "  hint: give the path of the file, or call onnx.load with its external data"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04rest", "this is not ONNX but a zip archive (PyTorch's .pt, a Keras file or a "
         "hone package)"),
        (b"\x89HDF\r\n", "this is not ONNX but an HDF5 file (Keras)"),
        (b"hello world", "this is not an ONNX model, or one cut short: 11 bytes do not parse as "
         "one\n  hint: compare its size with the original's, or export it again"),
        (b"\x08\x07", "this is not an ONNX model: 2 bytes parse, but hold no graph"),
    ],
    ids=["empty", "zip", "hdf5", "text", "no-graph"],
)  # fmt: skip
def test_files_that_are_not_onnx_say_so(tmp_path, content, message):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert str(failure(path)) == f"{path}: {message}"


def test_truncated_files_say_so(tmp_path):
    content = conv_model().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(content[: len(content) // 2])
    assert "this is not an ONNX model, or one cut short" in str(failure(path))


def test_damaged_models_never_raise_anything_else(tmp_path):
    content = models.build("digits-cnn").SerializeToString()
    rng = np.random.default_rng(0)
    structure = [*range(600), *range(len(content) - 1200, len(content))]  # not the weights
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for position in rng.choice(structure, 2):
            damaged[position] = rng.integers(256)
        path = tmp_path / "m.onnx"
        path.write_bytes(damaged)
        try:
            refused += not importer.check(path).ok
        except ModelError:
            refused += 1
    assert refused > 100


def test_missing_files_and_folders_say_so(tmp_path):
    with pytest.raises(UsageError) as missing:
        importer.load(tmp_path / "no.onnx")
    assert str(missing.value) == f"{tmp_path}/no.onnx: there is no such file"
    (tmp_path / "a.onnx").touch()
    with pytest.raises(UsageError) as folder:
        importer.load(tmp_path)
    assert str(folder.value) == (
        f"{tmp_path}: this is a folder, required is an ONNX file\n  hint: it holds a.onnx"
    )


@pytest.mark.parametrize("opset", [0, 1, 8, 9999])
def test_opsets_out_of_range_are_refused(opset):
    newest = onnx.defs.onnx_opset_version()
    text = str(failure(conv_model(opset=opset)))
    assert text.startswith(f"the model's opset is {opset}, required is 9 to {newest}")


def test_a_model_of_another_type_is_a_usage_error():
    with pytest.raises(UsageError, match=r"a model is a path or an onnx\.ModelProto"):
        importer.load(3)


# ---------------------------------------------------------------- all problems at once


def broken_model():
    nodes = [
        helper.make_node("Relu", ["image"], ["a"], name="relu"),
        helper.make_node("LSTM", ["a", "a", "a"], ["b"], name="rnn", hidden_size=3),
        helper.make_node("Frobnicate", ["a"], ["c"], name="odd"),
        helper.make_node("FastGelu", ["a"], ["d"], name="gelu", domain="com.microsoft"),
        helper.make_node("Add", ["a", "w"], ["e"]),
        helper.make_node("MatMul", ["nowhere", "w"], ["f"], name="mm"),
        helper.make_node("Relu", ["b"], ["g"], name="after"),
        helper.make_node("Conv", ["k", "k"], ["h"], name="conv", bogus=1),
        helper.make_node("MaxPool", ["k"], ["p", "i"], name="pool", kernel_shape=[2, 2]),
    ]
    proto = make(
        nodes,
        [info("image", ["N", 4]), info("k", [1, 1, 4, 4]), info("text", [2], TensorProto.STRING)],
        [info(n, None) for n in ("b", "c", "d", "e", "f", "g", "h", "p", "i", "gone")],
        [weight("w", 3)],
    )
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


def test_all_problems_are_listed_at_once_with_node_names():
    error = failure(broken_model(), {"imagr": (1, 4)})
    assert str(error) == (
        "the model has 11 problems\n"
        "  - --shape 'imagr': the model has no such input (did you mean 'image'?)\n"
        "  - input 'image': shape [N, 4] has a dynamic dimension without a value "
        "(give --shape 'image:[1,4]')\n"
        "  - input 'text': element type string is unsupported\n"
        "  - LSTM 'rnn': operator LSTM is unsupported\n"
        "  - Frobnicate 'odd': operator Frobnicate is unknown to ONNX opset 17\n"
        "  - FastGelu 'gelu': operator com.microsoft.FastGelu is unsupported (export the model for "
        "the standard ONNX domain only)\n"
        "  - MatMul 'mm': input 'nowhere' is no input, weight or result of a node before\n"
        "  - Conv 'conv': invalid node: Unrecognized attribute: bogus for operator Conv\n"
        "  - MaxPool 'pool': only its first output is supported, 'i' is another\n"
        "  - output 'gone': no node computes it"
    ).replace("11 problems", f"{len(error.problems)} problems")


def test_shape_errors_name_the_node_and_its_inputs():
    error = failure(broken_model(), {"image": (2, 4)})
    assert (
        "Add 'Add_e': Incompatible dimensions; inputs are a: float32[2, 4], w: float32[3]"
        in error.problems
    )


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({}, "input 'x': shape [N, 3, H] has a dynamic dimension without a value (give --shape "
         "'x:[1,3,1]')"),
        ({"x": (2, 3)}, "--shape 'x': [2, 3] does not fit the model's [N, 3, H]"),
        ({"x": (2, 4, 5)}, "--shape 'x': [2, 4, 5] does not fit the model's [N, 3, H]"),
        ({"x": (0, 3, 5)}, "input 'x': shape [0, 3, 5] has no elements; 1 is the least"),
        ({"x": (1, 3, 5), "w": (3,)}, "--shape 'w': the model has no such input (it is a weight, "
         "its shape is stored)"),
    ],
    ids=["none", "rank", "static", "zero", "weight"],
)  # fmt: skip
def test_wrong_shapes_are_problems(shapes, problem):
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    proto = make(nodes, [info("x", ["N", 3, "H"])], [info("y", None)], [weight("w", 1)])
    assert failure(proto, shapes).problems[0] == problem


def test_named_dimensions_hold_for_all_inputs_when_one_is_given():
    nodes = [helper.make_node("Add", ["x", "m"], ["y"])]
    proto = make(nodes, [info("x", ["N", "S"]), info("m", ["N", "S"])], [info("y", None)])
    model = importer.load(proto, {"x": (2, 5)})
    assert model.signature.inputs[1].shape == (2, 5)
    assert failure(proto, {"x": (2, 5), "m": (2, 6)}).problems[0] == (
        "--shape 'm': dimension 'S' is 6 here and 5 in another input"
    )


@pytest.mark.parametrize(
    ("group", "bias", "problem"),
    [
        (2, 4, "3 input and 4 output channels do not fit a weight of [4, 3, 3, 3] in 2 groups"),
        (1, 5, "a bias of [5] does not fit 4 output channels"),
    ],
    ids=["group", "bias"],
)
def test_channels_that_do_not_fit_are_problems(group, bias, problem):
    proto = make(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", group=group)],
        [info("x", [1, 3, 5, 5])],
        [info("y", None)],
        [weight("w", 4, 3, 3, 3), weight("b", bias)],
    )
    assert [str(found) for found in importer.check(proto).problems] == [f"Conv 'conv': {problem}"]


def test_shapes_that_depend_on_data_are_problems():
    nodes = [helper.make_node("Reshape", ["x", "s"], ["y"], name="reshape")]
    error = failure(make(nodes, [info("x", [2, 3]), info("s", [1], I64)], [info("y", None)]))
    assert error.problems == (
        "Reshape 'reshape': the shape of 'y' cannot be determined; it depends on 's', which is "
        "known at run time only",
    )


def test_kernel_inputs_must_be_constant():
    nodes = [helper.make_node("CumSum", ["x", "axis"], ["y"], name="sum")]
    error = failure(make(nodes, [info("x", [2, 3]), info("axis", [], I64)], [info("y", None)]))
    assert error.problems == (
        "CumSum 'sum': input 1 is known at run time only; it must be a constant",
    )


def test_types_that_do_not_match_are_problems():
    nodes = [
        helper.make_node("Add", ["x", "i"], ["y"], name="add"),
        helper.make_node("Sqrt", ["i"], ["z"], name="sqrt"),
    ]
    outputs = [info("y", None), info("z", None)]
    error = failure(make(nodes, [info("x", [2]), info("i", [2], I64)], outputs))
    assert error.problems == (
        "Add 'add': input 'i' is int64, but 'x' is float32",
        "Sqrt 'sqrt': input 'i' is int64, which opset 17 does not allow",
    )


def test_weights_that_do_not_fit_their_bytes_are_problems():
    proto = conv_model()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    (problem,) = failure(proto).problems
    assert problem.startswith(
        "initializer 'w': [4, 3, 3, 3] of float32 do not fit the bytes stored"
    )


def test_training_modes_are_refused():
    nodes = [
        helper.make_node(
            "BatchNormalization", ["x", "a", "a", "a", "a"], ["y", "m", "v"], name="bn",
            training_mode=1,
        )
    ]  # fmt: skip
    error = failure(make(nodes, [info("x", [1, 2, 3])], [info("y", None)], [weight("a", 2)]))
    assert error.problems == (
        "BatchNormalization 'bn': training_mode is 1, only inference is supported",
    )


def test_outputs_that_nothing_reads_are_left_out():
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p", "index"], name="pool", kernel_shape=[2, 2]),
        helper.make_node("LayerNormalization", ["p", "a"], ["y", "mean", "scale"], name="ln"),
    ]
    proto = make(nodes, [info("x", [1, 2, 3, 4])], [info("y", None)], [weight("a", 3)])
    assert [layer.id for layer in importer.load(proto).layers] == ["pool", "ln"]


@pytest.mark.parametrize("taken", [True, False])
def test_the_branch_of_a_known_condition_is_imported(taken):
    then = helper.make_graph(
        [helper.make_node("Add", ["x", "one"], ["t"], name="add")], "then", [], [info("t", [2])],
        [numpy_helper.from_array(np.float32(1), "one")],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["e"], name="neg")], "else", [], [info("e", [2])]
    )
    nodes = [
        helper.make_node("If", ["c"], ["z"], name="if", then_branch=then, else_branch=other),
        helper.make_node("Relu", ["z"], ["y"], name="relu"),
    ]
    condition = numpy_helper.from_array(np.array(taken), "c")
    model = importer.load(make(nodes, [info("x", [2])], [info("y", None)], [condition]))
    assert model.layers[0].id == ("if/add" if taken else "if/neg")
    (y,) = run(model, x=np.array([1, -3], np.float32))
    np.testing.assert_array_equal(y, [2, 0] if taken else [0, 3])


def test_control_flow_is_refused():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])], "branch", [], [info("b", [2])]
    )
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    error = failure(
        make(nodes, [info("x", [2]), info("c", [], TensorProto.BOOL)], [info("y", [2])])
    )
    assert error.problems == ("If 'If_y': operator If is unsupported",)


def test_nothing_is_written_when_an_import_fails(capfd, recwarn):
    failure(broken_model())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not recwarn.list


# ---------------------------------------------------------------- check


def test_check_counts_nodes_and_macs():
    report = importer.check(conv_model())
    assert report.ok
    assert (report.nodes, report.nodes_supported) == (1, 1)
    assert report.macs == report.macs_supported == 4 * 5 * 7 * 27
    assert report.coverage == 1
    assert report.operators == {"Conv": 1}
    assert report.opset == 17
    assert report.outputs == (TensorSpec(name="y", dtype="float32", shape=(1, 4, 5, 7)),)
    assert report.weights_bytes == 4 * (4 * 27 + 4)


def test_check_lists_what_load_raises():
    report = importer.check(broken_model())
    assert tuple(map(str, report.problems)) == failure(broken_model()).problems
    assert not report.ok
    assert report.nodes_supported < report.nodes
    problem = next(p for p in report.problems if p.node == "rnn")
    assert (problem.op, problem.message) == ("LSTM", "operator LSTM is unsupported")


@pytest.mark.parametrize(
    ("op", "attributes", "shapes", "macs"),
    [
        ("Conv", {"group": 2}, [(1, 4, 5, 5), (6, 2, 3, 3)], 6 * 3 * 3 * 2 * 9),
        ("ConvTranspose", {}, [(1, 4, 5, 5), (4, 3, 2, 2)], 4 * 25 * 3 * 4),
        ("Gemm", {"transA": 1}, [(4, 2), (4, 3)], 2 * 3 * 4),
        ("Gemm", {"transB": 1}, [(2, 4), (3, 4)], 2 * 3 * 4),
        ("MatMul", {}, [(5, 2, 4), (5, 4, 3)], 5 * 2 * 3 * 4),
    ],
)
def test_macs_count_each_multiplication(op, attributes, shapes, macs):
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    proto = make([node], [info("x", shapes[0]), info("w", shapes[1])], [info("y", None)])
    assert importer.check(proto).macs == macs


def test_check_of_resnet50_is_quick_and_needs_no_tvm(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(models.build("resnet50"), str(path))
    code = (
        "import sys; from hone.importer import check; r = check(sys.argv[1]); "
        "assert r.ok and r.nodes > 100 and 4.0e9 < r.macs < 4.2e9; assert 'tvm' not in sys.modules"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)
    assert time.monotonic() - start < 30  # under 2 s alone; the test machine is shared


# ---------------------------------------------------------------- what no package can hold


def test_names_must_be_unique_at_the_boundary():
    node = helper.make_node("Relu", ["x"], ["y"])
    proto = make([node], [info("x", [2])], [info("y", [2]), info("y", [2])])
    assert failure(proto).problems == ("output 'y': 2 outputs have this name",)


def test_bfloat16_is_refused_at_the_boundary_and_taken_within():
    bf16 = onnx.TensorProto.BFLOAT16
    relu = helper.make_node("Relu", ["a"], ["b"])
    proto = make([relu], [info("a", [2], bf16)], [info("b", [2], bf16)])
    assert [str(problem) for problem in importer.check(proto).problems] == [
        f"{kind} {name!r}: element type bfloat16 is unsupported here: numpy has no such arrays "
        "(cast it to or from float32 inside the model)"
        for kind, name in (("input", "a"), ("output", "b"))
    ]
    with pytest.raises(ModelError, match="the model has 2 problems"):
        hone.compile(importer.load(proto))
    casts = [
        helper.make_node("Cast", ["x"], ["a"], to=bf16),
        relu,
        helper.make_node("Cast", ["b"], ["y"], to=F32),
    ]
    assert importer.check(make(casts, [info("x", [2])], [info("y", [2])])).ok


def test_tensors_that_no_memory_holds_are_problems():
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["w"], name="fill"),
        helper.make_node("Add", ["x", "w"], ["y"], name="big"),
    ]
    proto = make(nodes, [info("x", ["N"])], [info("y", None)], [ints("s", 1 << 20, 1 << 20)])
    assert failure(proto, {"x": (1,)}).problems == (
        "ConstantOfShape 'fill': w: float32[1048576, 1048576] has 4096 GiB, the most is 64",
        "Add 'big': y: float32[1048576, 1048576] has 4096 GiB, the most is 64",
    )


@pytest.mark.parametrize("shape", [(10**20,), (2**31,), ("2",), (1.5,), 3, None])
def test_shapes_that_are_no_sizes_are_usage_errors(shape):
    proto = make([helper.make_node("Relu", ["x"], ["y"])], [info("x", ["N"])], [info("y", None)])
    with pytest.raises(UsageError, match="required is a sequence of whole numbers up to"):
        importer.check(proto, {"x": shape})


def test_pipes_are_refused_instead_of_waited_for(tmp_path):
    path = tmp_path / "net.onnx"
    os.mkfifo(path)
    with pytest.raises(UsageError, match="this is a pipe, required is an ONNX file"):
        importer.check(path)
