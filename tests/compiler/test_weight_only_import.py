"""Models whose weights alone another tool quantized: against onnxruntime, and packed for real."""

from __future__ import annotations

import io
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import hone
from hone import importer, parity, runtime, shadow
from hone.errors import ModelError
from hone.passes.graph.dataflow import Dataflow
from hone.passes.quantize.decode_operator import Decoded, decode_call
from hone.passes.quantize.match_qdq import match_qdq
from hone.passes.quantize.pack_weights import WeightPacking, pack_weights
from hone.progress import console
from hone.steps import weights
from hone.steps.candidate import Context
from hone.steps.options.weights import WeightsStep
from hone.targets.target import resolve

MICROSOFT = "com.microsoft"
NARROW = {
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
    "int2": ml_dtypes.int2,
    "int8": np.int8,
    "uint8": np.uint8,
}


def model_of(
    nodes: list[onnx.NodeProto], x: np.ndarray, constants: dict[str, np.ndarray], *, opset: int = 21
) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def n_bits(
    k: int,
    n: int,
    *,
    bits: int = 4,
    size: int = 16,
    zero_points: str = "",
    bias: bool = False,
    outer: tuple[int, ...] = (2, 3),
    **attrs: Any,
) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """Return a model of one MatMulNBits, its input, and what numpy computes."""
    rng = np.random.default_rng(2)
    blocks = -(-k // size)
    constants: dict[str, np.ndarray] = {
        "b": rng.integers(0, 256, (n, blocks, size * bits // 8), np.uint8),
        "s": rng.uniform(0.01, 0.02, n * blocks).astype(np.float32),
    }

    def fields(packed: np.ndarray) -> np.ndarray:
        spread = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return np.stack(spread, -1).reshape(n, -1).astype(np.float64)

    points = np.full((n, blocks), 1 << (bits - 1), np.float64)
    if zero_points == "packed":
        constants["z"] = rng.integers(0, 256, n * -(-blocks * bits // 8), np.uint8)
        points = fields(constants["z"].reshape(n, -1))[:, :blocks]
    elif zero_points:
        points = rng.uniform(0, (1 << bits) - 1, (n, blocks))
        points = np.rint(points) if zero_points == "whole" else points
        constants["z"] = points.astype(np.float32).reshape(-1)
    if bias:
        constants["c"] = rng.standard_normal(n).astype(np.float32)
    names = ["x", "b", "s", "z" if zero_points else "", "", "c" if bias else ""]
    while not names[-1]:
        names.pop()
    attributes = {"K": k, "N": n, "bits": bits, "block_size": size} | attrs
    node = helper.make_node("MatMulNBits", names, ["y"], name="fc", domain=MICROSOFT, **attributes)
    x = data(*outer, k)
    levels = fields(constants["b"].reshape(n, -1))
    scales = np.repeat(constants["s"].reshape(n, blocks), size, 1)
    weight = ((levels - np.repeat(points, size, 1)) * scales)[:, :k]
    expected = x @ weight.T + (constants["c"] if bias else 0)
    return model_of([node], x, constants, opset=17), x, expected


def reference(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    # Beyond this it makes MatMulNBits of other weights, with leave to round their inputs.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


def close(given: np.ndarray, expected: np.ndarray) -> None:
    """Sums of at most 67 float32 terms in another order: 2**-24 × sqrt(67), with room for 10."""
    assert given.shape == expected.shape
    assert np.abs(given - expected).max() <= 5e-6 * np.abs(expected).max()


def imported(model: onnx.ModelProto) -> WeightPacking:
    return pack_weights(match_qdq(importer.load(model).module).module)


def run(model: onnx.ModelProto, x: np.ndarray) -> tuple[np.ndarray, Any]:
    package = hone.compile(importer.load(model))
    return np.asarray(runtime.load(package).run({"x": x})["y"]), package


@pytest.mark.parametrize("zero_points", ["", "packed", "whole", "between"])
@pytest.mark.parametrize(
    ("k", "n", "bits", "size"),
    [(33, 7, 4, 16), (64, 13, 4, 32), (40, 5, 2, 16), (67, 3, 8, 32)],
)
def test_matmul_n_bits_equals_numpy(k, n, bits, size, zero_points):
    model, x, expected = n_bits(k, n, bits=bits, size=size, zero_points=zero_points, bias=True)
    loaded = importer.load(model)
    (given,), _ = shadow.evaluate(loaded.module, {"x": x})
    close(given, expected)
    assert imported(model).packed == ({} if zero_points == "between" else {"fc": bits})
    if bits != 8 or "p" in zero_points or not zero_points:  # onnxruntime lacks the others
        close(reference(model, x), expected)


@pytest.mark.parametrize("outer", [(1,), (17,), (2, 3)], ids=["row", "matrix", "batch"])
@pytest.mark.parametrize("zero_points", ["", "packed"])
def test_compiled_matmul_n_bits_equals_onnxruntime(outer, zero_points):
    model, x, expected = n_bits(33, 7, zero_points=zero_points, bias=True, outer=outer)
    given, _ = run(model, x)
    close(given, expected)
    close(given, reference(model, x))


def test_the_package_stores_four_bits():
    model, x, expected = n_bits(256, 64, size=32)
    given, package = run(model, x)
    close(given, expected)
    scales = 64 * 8 * 4
    assert 64 * 128 + scales <= package.manifest.weights_bytes < 64 * 128 + scales + 256
    assert importer.load(model).origin.weights_bytes == 64 * 128 + scales + 64 * 4


def test_parity_does_not_compare_with_rounded_inputs():
    model, x, expected = n_bits(64, 13, size=32, accuracy_level=4)
    assert np.abs(reference(model, x) - expected).max() > 1e-4 * np.abs(expected).max()
    loaded = importer.load(model)
    runner = runtime.load(hone.compile(loaded))
    assert parity.check(loaded, runner.run).worst <= 1e-5


def refused(model: onnx.ModelProto) -> str:
    with pytest.raises(ModelError) as caught:
        importer.load(model)
    return str(caught.value.problems[0])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"K": 0}, "attribute K is required, a whole number from 1"),
        ({"bits": 3}, "weights of 3 bits are unsupported; 2, 4 and 8 are supported"),
        (
            {"bits": 2, "block_size": 2},
            "a block of 2 weights of 2 bits is no whole number of bytes",
        ),
        (
            {"K": 65},
            "B has 224 elements; K = 65, N = 7, bits = 4 and block_size = 16 need 280",
        ),
    ],
    ids=["K", "bits", "bytes", "size"],
)
def test_matmul_n_bits_is_refused_with_the_reason(change, text):
    model, _, _ = n_bits(64, 7)
    node = model.graph.node[0]
    values = {a.name: a.i for a in node.attribute} | change
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in values.items())
    assert refused(model) == f"MatMulNBits 'fc': {text}"


def test_reordered_channels_are_refused():
    model, _, _ = n_bits(64, 7)
    model.graph.node[0].input.extend(["", "g"])
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(64, np.int32), "g"))
    assert refused(model) == (
        "MatMulNBits 'fc': g_idx spreads the blocks over the input channels, which is unsupported "
        "(quantize the model without reordering (act-order) of its channels)"
    )


def test_weights_at_run_time_are_refused():
    model, _, _ = n_bits(64, 7)
    scales = next(t for t in model.graph.initializer if t.name == "s")
    model.graph.initializer.remove(scales)
    model.graph.input.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, [28]))
    assert refused(model) == "MatMulNBits 'fc': scales must be a constant"


def test_four_bits_are_read_by_dequantization_alone():
    node = helper.make_node("Add", ["x", "w"], ["y"], name="add")
    model = model_of([node], np.zeros((2, 3), np.float32), {"w": np.ones(3, ml_dtypes.int4)})
    assert refused(model) == "Add 'add': input 'w' is int4, which only DequantizeLinear can read"


def quantized(
    kind: str, shape: tuple[int, int], layout: str, *, zero: bool
) -> tuple[dict[str, np.ndarray], dict[str, int], np.ndarray]:
    """Return levels, scale and zero point; attributes; and the weight, float64."""
    rng = np.random.default_rng(5)
    low, high = {
        "int4": (-8, 8), "uint4": (0, 16), "int2": (-2, 2), "int8": (-128, 128), "uint8": (0, 256)
    }[kind]  # fmt: skip
    levels = rng.integers(low, high, shape)
    levels[0, :2] = low, high - 1
    attrs: dict[str, int] = {}
    sizes: tuple[int, ...] = ()
    if layout.startswith("axis"):
        attrs = {"axis": int(layout[-1])}
        sizes = (shape[attrs["axis"]],)
    elif layout.startswith("block"):
        attrs = {"axis": int(layout[-1]), "block_size": 16}
        sizes = tuple(-(-e // 16) if i == attrs["axis"] else e for i, e in enumerate(shape))
    scale = rng.uniform(0.01, 0.02, sizes).astype(np.float32)
    points = rng.integers(low, high, sizes)
    given = {"w": levels.astype(NARROW[kind]), "s": scale}
    if zero:
        given["z"] = np.asarray(points).astype(NARROW[kind])

    def along(values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float64)
        if layout == "tensor":
            return values
        axis = attrs["axis"]
        if layout.startswith("axis"):
            return values.reshape([-1 if i == axis else 1 for i in range(2)])
        return np.take(np.repeat(values, 16, axis), range(shape[axis]), axis)

    weight = (levels - (along(points) if zero else 0)) * along(scale)
    return given, attrs, weight


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize("layout", ["tensor", "axis1", "block0"])
@pytest.mark.parametrize(
    ("kind", "bits"), [("int4", 4), ("uint4", 4), ("int2", 2), ("int8", 8), ("uint8", 8)]
)
def test_matmul_reads_dequantized_levels_packed(kind, bits, layout, zero):
    given, attrs, weight = quantized(kind, (37, 11), layout, zero=zero)
    nodes = [
        helper.make_node("DequantizeLinear", list(given), ["d"], **attrs),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="fc"),
    ]
    x = data(2, 3, 37)
    model = model_of(nodes, x, given)
    packing = imported(model)
    assert (dict(packing.packed), packing.skipped) == ({"fc": bits}, ())
    (result,), _ = shadow.evaluate(packing.module, {"x": x})
    close(result, x @ weight)
    (result,), _ = shadow.evaluate(importer.load(model).module, {"x": x})
    close(result, x @ weight)
    assert importer.load(model).origin.weights_bytes < 37 * 11 * bits // 8 + 8 * 33 * 2


@pytest.mark.parametrize("layout", ["tensor", "axis0", "block1"])
@pytest.mark.parametrize("form", ["gemm", "transpose", "gather"])
def test_transposed_weights_and_tables_are_packed_and_compiled(form, layout):
    given, attrs, weight = quantized("uint4", (11, 37), layout, zero=True)
    nodes = [helper.make_node("DequantizeLinear", list(given), ["d"], **attrs)]
    x, expected = data(5, 37), data(5, 37) @ weight.T
    if form == "gemm":
        nodes.append(helper.make_node("Gemm", ["x", "d"], ["y"], name="fc", transB=1))
    elif form == "transpose":
        nodes.append(helper.make_node("Transpose", ["d"], ["t"]))
        nodes.append(helper.make_node("MatMul", ["x", "t"], ["y"], name="fc"))
    else:
        nodes.append(helper.make_node("Gather", ["d", "x"], ["y"], name="fc"))
        x = np.array([[3, 10], [0, 3]])
        expected = weight[x]
    model = model_of(nodes, x, given)
    assert dict(imported(model).packed) == {"fc": 4}
    result, _ = run(model, x)
    close(result, expected)
    close(result, reference(model, x))


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("axis0", "its weights have one scale for each input channel"),
        ("block1", "its blocks lie along the output channels; packed kernels sum along a block"),
    ],
)
def test_other_layouts_become_float_with_a_reason(layout, reason):
    given, attrs, weight = quantized("int4", (37, 11), layout, zero=False)
    nodes = [
        helper.make_node("DequantizeLinear", list(given), ["d"], **attrs),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="fc"),
    ]
    x = data(3, 37)
    model = model_of(nodes, x, given)
    packing = imported(model)
    assert [tuple(entry) for entry in packing.skipped] == [("fc", reason)]
    assert not packing.packed
    result, package = run(model, x)
    close(result, x @ weight)
    assert package.manifest.weights_bytes >= weight.size * 4


def test_weights_of_a_batch_become_float_with_a_reason():
    levels = np.random.default_rng(3).integers(-8, 8, (2, 37, 5))
    scale = np.random.default_rng(4).uniform(0.1, 0.2, (2, 3, 5)).astype(np.float32)
    given = {"w": levels.astype(ml_dtypes.int4), "s": scale}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1, block_size=16),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="fc"),
    ]
    x = data(2, 3, 37)
    model = model_of(nodes, x, given)
    reasons = [tuple(entry) for entry in imported(model).skipped]
    assert reasons == [("fc", "weights of 3 axes have no packed kernel")]
    result, _ = run(model, x)
    close(result, x @ (levels * np.repeat(scale, 16, 1)[:, :37]))


def test_integer_kernels_win_where_the_input_is_quantized_too():
    given, attrs, _ = quantized("int4", (37, 11), "axis1", zero=False)
    given |= {"a": np.float32(0.02), "b": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "a", "b"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "a", "b"], ["r"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], **attrs),
        helper.make_node("MatMul", ["r", "d"], ["y"], name="fc"),
    ]
    x = data(3, 37)
    model = model_of(nodes, x, given)
    matched = match_qdq(importer.load(model).module)
    assert [entry.layer for entry in matched.quantized] == ["fc"]
    assert not pack_weights(matched.module).packed
    result, package = run(model, x)
    close(result, reference(model, x))
    assert package.manifest.precision == "int8"


def test_onnxruntimes_own_domain_has_blocks_in_any_opset():
    given, attrs, weight = quantized("uint4", (37, 11), "block0", zero=True)
    nodes = [
        helper.make_node("DequantizeLinear", list(given), ["d"], domain=MICROSOFT, **attrs),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="fc"),
    ]
    x = data(3, 37)
    model = model_of(nodes, x, given, opset=17)
    assert dict(imported(model).packed) == {"fc": 4}
    (result,), _ = shadow.evaluate(importer.load(model).module, {"x": x})
    close(result, x @ weight)


def test_a_weight_that_is_read_elsewhere_too_has_its_real_values_there():
    given, attrs, weight = quantized("int4", (11, 37), "block1", zero=True)
    nodes = [
        helper.make_node("DequantizeLinear", list(given), ["d"], **attrs),
        helper.make_node("Gemm", ["x", "d"], ["y"], name="fc", transB=1),
        helper.make_node("Gemm", ["y", "d"], ["u"], name="back"),
        helper.make_node("Neg", ["d"], ["n"]),
    ]
    x = data(5, 37)
    model = model_of(nodes, x, given)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("u", "n", "d"))
    packing = imported(model)
    assert dict(packing.packed) == {"fc": 4}
    assert [entry.layer for entry in packing.skipped] == ["back"]
    results = runtime.load(hone.compile(importer.load(model))).run({"x": x})
    y = x @ weight.T
    for name, expected in {"y": y, "u": y @ weight, "n": -weight, "d": weight}.items():
        close(results[name], expected)


def test_matmul_n_bits_of_halves_becomes_a_float_weight():
    model, x, expected = n_bits(33, 7)
    (scales,) = (t for t in model.graph.initializer if t.name == "s")
    scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales).astype(np.float16), "s"))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    x = x.astype(np.float16)
    (given,), _ = shadow.evaluate(importer.load(model).module, {"x": x})
    assert given.dtype == np.float16
    assert np.abs(given - expected).max() <= 5e-3 * np.abs(expected).max()
    assert not imported(model).packed


def test_what_became_of_the_weights_is_logged():
    stream = io.StringIO()
    given, attrs, _ = quantized("uint4", (37, 11), "block0", zero=True)
    nodes = [
        helper.make_node("DequantizeLinear", list(given), ["d"], **attrs),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="fc"),
    ]
    hone.compile(importer.load(model_of(nodes, data(3, 37), given)), progress=console(stream))
    lines = stream.getvalue()
    assert "weights: 1 layer reads the model's own levels, packed in 4 bits" in lines
    assert "stays in float" not in lines


@pytest.mark.parametrize("other", [True, False], ids=["one more layer", "alone"])
def test_weights_that_are_packed_already_are_named_and_others_packed(other):
    model, _, _ = n_bits(64, 32, outer=(4,))
    if other:
        weight = np.random.default_rng(3).standard_normal((32, 48)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, "w2"))
        model.graph.node.append(helper.make_node("MatMul", ["y", "w2"], ["z"], name="last"))
        model.graph.output.append(onnx.ValueInfoProto(name="z"))
        model = onnx.shape_inference.infer_shapes(model)
    loaded = importer.load(model)
    step = WeightsStep.model_validate({"kind": "weights"})
    candidate = weights.propose(loaded, step, Context(target=resolve("host"), threads=1))
    assert candidate.skipped == (("fc", "its weights of 4 bits are packed already"),)
    if not other:
        assert candidate.model is loaded
        assert candidate.note == "all weights are packed already"
        return
    assert [layer for layer, _ in candidate.errors] == ["last"]
    assert candidate.note.startswith("weights of 1 layers")
    bindings = Dataflow(candidate.model.module["main"]).bindings
    bits = [Decoded.of(b.value).levels.bits for b in bindings if decode_call(b.value) is not None]
    assert bits == [4, 8]
