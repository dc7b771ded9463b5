from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.errors import UsageError
from hone.passes.apply import apply
from hone.passes.graph.to_half import LARGE_TILES, ToHalf, constant

RNG = np.random.default_rng(3)
FIRST = RNG.standard_normal((6, 1, 1, 4)).astype("float32")
SECOND = RNG.standard_normal((5, 3, 3, 6)).astype("float32")
DENSE = RNG.standard_normal((20, 3)).astype("float32")
DEPTHWISE = RNG.standard_normal((6, 3, 3, 1)).astype("float32")
TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

Emit = Callable[..., relax.Var]
Body = Callable[[Emit, relax.Var], relax.Expr]
NHWC = {"data_layout": "NHWC", "kernel_layout": "OHWI"}


def module(shape: tuple[int, ...], body: Body) -> tvm.IRModule:
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(body(builder.emit, x), "gv")
        builder.emit_func_output(result)
    return builder.get()


def single(weight: np.ndarray) -> relax.Expr:
    return relax.const(weight)


def conv(data: relax.Expr, weight: relax.Expr, **options: object) -> relax.Call:
    return relax.op.nn.conv2d(data, weight, **NHWC, **options)


def network(emit: Emit, x: relax.Var) -> relax.Expr:
    y = emit(conv(x, single(FIRST)))
    y = emit(relax.op.nn.relu(y))
    z = emit(conv(y, single(SECOND), padding=1, strides=2))
    flat = emit(relax.op.reshape(z, (1, 20)))
    w = emit(relax.op.matmul(flat, single(DENSE)))
    return emit(relax.op.add(w, emit(relax.op.mean(y))))


@pytest.mark.parametrize("dtype", list(TYPES))
def test_tensors_between_layers_are_stored_in_16_bits(dtype: str) -> None:
    def expected(emit: Emit, x: relax.Var) -> relax.Expr:
        half = emit(relax.op.astype(x, dtype))
        y = emit(conv(half, constant(FIRST, dtype), out_dtype="float32"))
        y = emit(relax.op.astype(emit(relax.op.nn.relu(y)), dtype))
        z = conv(y, constant(SECOND, dtype), padding=1, strides=2, out_dtype="float32")
        z = emit(relax.op.astype(emit(z), dtype))
        flat = emit(relax.op.reshape(z, (1, 20)))
        w = emit(relax.op.matmul(flat, constant(DENSE, dtype), out_dtype="float32"))
        mean = emit(relax.op.mean(emit(relax.op.astype(y, "float32"))))
        return emit(relax.op.add(w, mean))

    before = module((1, 4, 4, 4), network)
    after = apply(before, ToHalf(dtype=dtype))
    assert_structural_equal(after, module((1, 4, 4, 4), expected))
    assert_structural_equal(before, module((1, 4, 4, 4), network))


def test_each_reader_widens_for_itself_so_that_no_kernel_stores_float32() -> None:
    def before(emit: Emit, x: relax.Var) -> relax.Expr:
        y = emit(relax.op.nn.relu(x))
        z = emit(conv(y, single(FIRST)))
        a = emit(relax.op.exp(y))
        b = emit(relax.op.tanh(y))
        return relax.Tuple([emit(relax.op.add(a, b)), z])

    def expected(emit: Emit, x: relax.Var) -> relax.Expr:
        y = emit(relax.op.astype(emit(relax.op.nn.relu(x)), "bfloat16"))
        z = emit(conv(y, constant(FIRST, "bfloat16"), out_dtype="float32"))
        a = emit(relax.op.exp(emit(relax.op.astype(y, "float32"))))
        b = emit(relax.op.tanh(emit(relax.op.astype(y, "float32"))))
        return relax.Tuple([emit(relax.op.add(a, b)), z])

    after = apply(module((1, 2, 2, 4), before), ToHalf())
    assert_structural_equal(after, module((1, 2, 2, 4), expected))


def test_a_result_that_a_layer_reads_too_is_returned_unrounded() -> None:
    def before(emit: Emit, x: relax.Var) -> relax.Expr:
        y = emit(relax.op.nn.relu(x))
        return relax.Tuple([y, emit(conv(y, single(FIRST)))])

    def expected(emit: Emit, x: relax.Var) -> relax.Expr:
        y = emit(relax.op.nn.relu(x))
        half = emit(relax.op.astype(y, "bfloat16"))
        return relax.Tuple([y, emit(conv(half, constant(FIRST, "bfloat16"), out_dtype="float32"))])

    after = apply(module((1, 2, 2, 4), before), ToHalf())
    assert_structural_equal(after, module((1, 2, 2, 4), expected))


def test_max_pooling_and_depthwise_layers_read_16_bits_and_compute_in_float32() -> None:
    def before(emit: Emit, x: relax.Var) -> relax.Expr:
        y = emit(conv(x, single(FIRST)))
        y = emit(relax.op.nn.max_pool2d(y, (2, 2), (2, 2), layout="NHWC"))
        y = emit(conv(y, single(DEPTHWISE), groups=6, padding=1))
        return emit(conv(y, single(SECOND)))

    def expected(emit: Emit, x: relax.Var) -> relax.Expr:
        def stored(value: relax.Expr) -> relax.Var:
            return emit(relax.op.astype(emit(value), "bfloat16"))

        def read(value: relax.Expr) -> relax.Var:
            return emit(relax.op.astype(value, "float32"))

        x = emit(relax.op.astype(x, "bfloat16"))
        y = stored(conv(x, constant(FIRST, "bfloat16"), out_dtype="float32"))
        y = stored(relax.op.nn.max_pool2d(read(y), (2, 2), (2, 2), layout="NHWC"))
        y = stored(conv(read(y), single(DEPTHWISE), groups=6, padding=1))
        return emit(conv(y, constant(SECOND, "bfloat16"), out_dtype="float32"))

    after = apply(module((1, 8, 8, 4), before), ToHalf())
    assert_structural_equal(after, module((1, 8, 8, 4), expected))


def test_products_of_activations_are_converted() -> None:
    def before(emit: Emit, x: relax.Var) -> relax.Expr:
        turned = emit(relax.op.permute_dims(x, [0, 2, 1]))
        scores = emit(relax.op.nn.softmax(emit(relax.op.matmul(x, turned))))
        return emit(relax.op.matmul(scores, x))

    def expected(emit: Emit, x: relax.Var) -> relax.Expr:
        x = emit(relax.op.astype(x, "bfloat16"))
        turned = emit(relax.op.permute_dims(x, [0, 2, 1]))
        scores = emit(relax.op.matmul(x, turned, out_dtype="float32"))
        scores = emit(relax.op.astype(emit(relax.op.nn.softmax(scores)), "bfloat16"))
        return emit(relax.op.matmul(scores, x, out_dtype="float32"))

    after = apply(module((2, 3, 5), before), ToHalf())
    assert_structural_equal(after, module((2, 3, 5), expected))


def test_layers_kept_in_float_are_left_alone_and_named() -> None:
    before = module((1, 4, 4, 4), network)
    names = [b.var.name for b in before["main"].body.blocks[0].bindings]
    convolution, product = names[0], names[4]
    plan = ToHalf(keep_float=[convolution, names[2], product]).plan(before)
    assert plan.converted == ()
    assert {reason for _, reason in plan.skipped} == {"kept in float by the recipe"}
    assert [layer for layer, _ in plan.skipped] == [convolution, names[2], product]
    assert ToHalf(keep_float=[convolution, product]).plan(before).converted == (names[2],)


def batched_weight(emit: Emit, x: relax.Var) -> relax.Expr:
    return emit(relax.op.matmul(x, single(RNG.standard_normal((2, 4, 3)).astype("float32"))))


def vector(emit: Emit, x: relax.Var) -> relax.Expr:
    row = emit(relax.op.reshape(x, (16,)))
    return emit(relax.op.matmul(row, single(RNG.standard_normal((16, 3)).astype("float32"))))


def channels_first(emit: Emit, x: relax.Var) -> relax.Expr:
    return emit(relax.op.nn.conv2d(x, single(FIRST.reshape(6, 4, 1, 1))))


def grouped(emit: Emit, x: relax.Var) -> relax.Expr:
    return emit(conv(x, single(FIRST[..., :2].copy()), groups=2))


def computed_weight(emit: Emit, x: relax.Var) -> relax.Expr:
    weight = emit(relax.op.exp(single(FIRST)))
    return emit(conv(x, weight))


def half_already(emit: Emit, x: relax.Var) -> relax.Expr:
    half = emit(relax.op.astype(x, "float16"))
    return emit(relax.op.matmul(half, constant(np.eye(4, dtype="float32"), "float16")))


@pytest.mark.parametrize(
    ("body", "shape", "reason"),
    [
        (batched_weight, (1, 4, 4), "its operands are not two batches of matrices"),
        (vector, (1, 2, 2, 4), "its operands are not two batches of matrices"),
        (channels_first, (1, 4, 2, 2), "its layout is NCHW/OIHW, not NHWC/OHWI"),
        (grouped, (1, 2, 2, 4), "is grouped: it reads 16-bit floats and computes in float32"),
        (computed_weight, (1, 2, 2, 4), "its weights are computed"),
        (half_already, (1, 2, 2, 4), "is not in float32"),
    ],
)
def test_what_does_not_fit_stays_and_is_named(
    body: Body, shape: tuple[int, ...], reason: str
) -> None:
    before = module(shape, body)
    plan = ToHalf().plan(before)
    assert plan.converted == ()
    assert [why for _, why in plan.skipped] == [reason]
    assert_structural_equal(apply(before, ToHalf()), before)


def test_large_tiles_are_a_note_on_the_function_where_a_layer_is_converted() -> None:
    before = module((1, 4, 4, 4), network)
    plain = apply(before, ToHalf())["main"]
    noted = apply(before, ToHalf(large_tiles=True))["main"]
    assert LARGE_TILES not in plain.attrs
    assert_structural_equal(noted, plain.with_attr(LARGE_TILES, True))
    names = [layer for layer, _ in ToHalf().plan(before).skipped]
    kept = [*ToHalf().plan(before).converted, *names]
    assert apply(before, ToHalf(keep_float=kept, large_tiles=True))["main"].same_as(before["main"])


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        ToHalf(dtype="float64")
    assert str(error.value) == "dtype must be one of bfloat16, float16, not 'float64'"


def test_weights_are_rounded_to_nearest_even() -> None:
    unit = 2.0**-8
    values = np.array([1 + unit, 1 + 3 * unit, -1 - unit, 1 + 1.5 * unit], "float32")
    expected = np.array([1, 1 + 4 * unit, -1, 1 + 2 * unit], "float32")
    actual = constant(values, "bfloat16").value.numpy().astype("float32")
    np.testing.assert_array_equal(actual, expected)


def test_the_network_is_off_by_the_rounding_of_its_operands() -> None:
    before = module((1, 4, 4, 4), network)
    x = RNG.standard_normal((1, 4, 4, 4)).astype("float32")

    def run(changed: tvm.IRModule) -> np.ndarray:
        machine = relax.VirtualMachine(tvm.compile(changed, "llvm"), tvm.cpu())
        return machine["main"](tvm.runtime.tensor(x)).numpy()

    exact = run(before)
    error = np.abs(run(apply(before, ToHalf(dtype="float16"))) - exact)
    # Four roundings in a row of operands, each relative to magnitudes of up to about 50.
    assert 0 < error.max() < 4 * 2.0**-12 * 50
