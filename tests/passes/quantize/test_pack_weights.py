"""Dequantized constants become packed weights of the layers that read them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.passes.quantize import operators
from hone.passes.quantize.decode_operator import Decoded
from hone.passes.quantize.given_levels import given_levels
from hone.passes.quantize.pack_weights import PackWeights, pack_weights
from hone.passes.quantize.quantize_weights import QuantizeWeights
from hone.passes.quantize.weight_schemes import WeightOptions

LEVELS = np.random.default_rng(1).integers(-8, 8, (7, 5)).astype(np.int8)
SCALE = np.random.default_rng(2).uniform(0.1, 0.2, 5).astype(np.float32)
POINTS = np.array([3, -8, 7, 0, -1], np.int8)


def network(
    weight: Callable[[Callable[[str, relax.Expr], relax.Var]], relax.Expr],
    *,
    layer: Callable[[relax.Expr, relax.Expr], relax.Expr] = relax.op.matmul,
    x: relax.Var | None = None,
) -> tvm.IRModule:
    """One layer named ``fc``, whose weight is what the function binds."""
    x = relax.Var("x", relax.TensorType((3, 7), "float32")) if x is None else x
    bb = relax.BlockBuilder()
    bindings: list[relax.VarBinding] = []

    def bind(name: str, value: relax.Expr, *, output: bool = False) -> relax.Var:
        value = bb.normalize(value)
        var = (relax.Var if output else relax.DataflowVar)(name, value.ty)
        bindings.append(relax.VarBinding(var, value))
        return var

    y = bind("fc", layer(x, weight(bind)), output=True)
    body = bb.normalize(relax.SeqExpr([relax.DataflowBlock(bindings)], y))
    return tvm.IRModule({"main": relax.Function([x], body, y.ty)})


def per_channel(levels: np.ndarray, axis: int, points: np.ndarray = POINTS) -> relax.Expr:
    zero_points = relax.const(points, str(points.dtype))
    return relax.op.dequantize(
        relax.const(levels), relax.const(SCALE), zero_points, axis, "float32"
    )


def decoded(*, bits: int = 4, axis: int = 1) -> Decoded:
    levels = given_levels(LEVELS.T, SCALE[:, None], POINTS[:, None].astype(np.int64), group=7)
    assert not isinstance(levels, str)
    assert levels.bits == bits
    shape = (7, 5) if axis == 1 else (5, 7)
    return Decoded(levels=levels, shape=shape, axis=axis)


def test_levels_of_a_product_take_the_place_of_their_real_values() -> None:
    before = network(lambda bind: bind("w", per_channel(LEVELS, 1)))
    after = PackWeights()(before)
    expected = network(lambda bind: bind("fc@weight", decoded().call()))
    tvm.ir.assert_structural_equal(after, expected)
    names = [str(binding.var.name) for binding in after["main"].body.blocks[0].bindings]
    assert names == ["fc@weight", "fc"]
    assert dict(pack_weights(before).packed) == {"fc": 4}


def test_a_transposed_weight_is_packed_as_it_is_read() -> None:
    before = network(
        lambda bind: bind("t", relax.op.permute_dims(bind("w", per_channel(LEVELS.T, 0))))
    )
    expected = network(lambda bind: bind("fc@weight", decoded().call()))
    tvm.ir.assert_structural_equal(PackWeights()(before), expected)


def test_a_transposed_decoded_weight_is_decoded_the_other_way() -> None:
    before = network(
        lambda bind: bind("t", relax.op.permute_dims(bind("w", decoded(axis=0).call())))
    )
    expected = network(lambda bind: bind("fc@weight", decoded().call()))
    tvm.ir.assert_structural_equal(PackWeights()(before), expected)


def look_up(x: relax.Expr, table: relax.Expr) -> relax.Expr:
    return relax.op.take(table, x, 0, mode="clip")


def test_a_table_keeps_its_levels() -> None:
    x = relax.Var("x", relax.TensorType((4,), "int64"))
    before = network(lambda bind: bind("w", per_channel(LEVELS.T, 0)), layer=look_up, x=x)
    expected = network(lambda bind: bind("fc@weight", decoded(axis=0).call()), layer=look_up, x=x)
    tvm.ir.assert_structural_equal(PackWeights()(before), expected)


def one_scale(levels: np.ndarray) -> relax.Expr:
    return operators.dequantize(
        relax.const(levels), relax.const(np.float32(0.1)), relax.const(0, "int32")
    )


OTHER_LAYERS = {
    "scale for each input": (
        lambda bind: bind("w", per_channel(np.zeros((5, 5), np.int8), 0)),
        relax.op.matmul,
        (3, 5),
        "its weights have one scale for each input channel",
    ),
    "batch": (
        lambda bind: bind("w", one_scale(np.zeros((2, 7, 5), np.int8))),
        relax.op.matmul,
        (2, 3, 7),
        "weights of 3 axes have no packed kernel",
    ),
    "vector": (
        lambda bind: bind("w", one_scale(LEVELS)),
        relax.op.matmul,
        (7,),
        "a vector has no packed kernel",
    ),
    "reshaped": (
        lambda bind: bind("r", relax.op.reshape(bind("w", one_scale(LEVELS)), (5, 7))),
        relax.op.matmul,
        (3, 5),
        "its weights are reshaped after they are dequantized",
    ),
    "convolution": (
        lambda bind: bind("w", one_scale(np.zeros((2, 3, 1, 1), np.int8))),
        relax.op.nn.conv2d,
        (1, 3, 4, 4),
        "there is no packed kernel for conv2d",
    ),
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_what_has_no_packed_kernel_stays_as_it_is(name: str) -> None:
    weight, layer, shape, reason = OTHER_LAYERS[name]
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    before = network(weight, layer=layer, x=x)
    result = pack_weights(before)
    assert result.module.same_as(before)
    assert [tuple(entry) for entry in result.skipped] == [("fc", reason)]


def test_a_scale_that_is_not_finite_stays_with_its_weight() -> None:
    scale = np.array([1, np.inf, 1, 1, 1], np.float32)
    before = network(
        lambda bind: bind(
            "w",
            relax.op.dequantize(
                relax.const(LEVELS), relax.const(scale), relax.const(POINTS), 1, "float32"
            ),
        )
    )
    result = pack_weights(before)
    assert result.module.same_as(before)
    reasons = [tuple(entry) for entry in result.skipped]
    assert reasons == [("fc", "a scale of its weights is not finite")]


def test_real_weights_stay_as_they_are() -> None:
    before = network(lambda _bind: relax.const(LEVELS.astype(np.float32)))
    result = pack_weights(before)
    assert result.module.same_as(before)
    assert (dict(result.packed), result.skipped) == ({}, ())


def test_weights_that_hone_packed_stay_as_they_are() -> None:
    before = QuantizeWeights(WeightOptions(bits=4))(
        network(lambda _bind: relax.const(LEVELS.astype(np.float32)))
    )
    assert pack_weights(before).module.same_as(before)


def test_decoded_weights_that_something_else_reads_become_real() -> None:
    def both(x: relax.Expr, weight: relax.Expr) -> relax.Expr:
        return relax.op.matmul(x, weight)

    before = network(lambda bind: bind("s", relax.op.abs(bind("w", decoded().call()))), layer=both)
    after = PackWeights()(before)
    real = decoded().real()
    expected = network(
        lambda bind: bind("s", relax.op.abs(bind("w", relax.const(real, "float32"))))
    )
    tvm.ir.assert_structural_equal(after, expected)


def test_the_module_given_stays_as_it_is() -> None:
    before, copy = (network(lambda bind: bind("w", per_channel(LEVELS, 1))) for _ in range(2))
    PackWeights()(before)
    tvm.ir.assert_structural_equal(before, copy)


@pytest.mark.parametrize(
    ("levels", "points", "bits", "moved", "left"),
    [
        ([[3, 12]], [[8]], 4, [[-5, 4]], None),
        ([[0, 15]], [[0]], 4, [[-8, 7]], [[-8]]),
        ([[-8, 7]], [[-8]], 4, [[-8, 7]], [[-8]]),
        ([[1, 2]], [[1]], 2, [[0, 1]], None),
        ([[0, 255]], [[128]], 8, [[-128, 127]], None),
        ([[0, 255]], [[3]], 8, [[-128, 127]], [[-125]]),
        ([[0, 15]], [[255]], 8, [[-128, -113]], [[127]]),
    ],
)
def test_levels_are_stored_in_the_fewest_bits(levels, points, bits, moved, left) -> None:
    found = given_levels(np.array(levels), np.ones((1, 1)), np.array(points), group=2)
    assert not isinstance(found, str)
    assert found.bits == bits
    assert found.levels.tolist() == moved
    assert (None if found.zero_point is None else found.zero_point.tolist()) == left
    assert found.real().tolist() == (np.array(levels) - points).tolist()


def test_levels_beyond_eight_bits_have_a_reason() -> None:
    found = given_levels(np.array([[-300, 5]]), np.ones((1, 1)), np.zeros((1, 1)), group=2)
    assert found == "its levels reach from -300 to 5, beyond 8 bits"
