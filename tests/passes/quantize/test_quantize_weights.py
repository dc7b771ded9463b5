from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.errors import ModelError, UsageError
from hone.passes.quantize.decode_operator import Decoded
from hone.passes.quantize.quantize_weights import QuantizeWeights, quantize_weight_only
from hone.passes.quantize.weight_schemes import Scheme, WeightOptions, quantize_weights

INT4 = WeightOptions(bits=4)
CONV = np.random.default_rng(1).standard_normal((6, 3, 3, 5)).astype(np.float32)
FC = np.random.default_rng(2).standard_normal((6, 4)).astype(np.float32)


def network(
    conv: relax.Expr, fc: relax.Expr, *, prepare: tuple[str, str] = ("conv@weight", "fc@weight")
) -> tvm.IRModule:
    """Convolution, mean, matrix product; weights that are calls get bindings of their own."""
    x = relax.Var("x", relax.TensorType((1, 7, 8, 5), "float32"))
    bb = relax.BlockBuilder()
    bindings: list[relax.VarBinding] = []

    def bind(name: str, value: relax.Expr, *, output: bool = False) -> relax.Var:
        value = bb.normalize(value)
        var = (relax.Var if output else relax.DataflowVar)(name, value.ty)
        bindings.append(relax.VarBinding(var, value))
        return var

    def weight(value: relax.Expr, name: str) -> relax.Expr:
        return bind(name, value) if isinstance(value, relax.Call) else value

    y = bind(
        "conv",
        relax.op.nn.conv2d(
            x, weight(conv, prepare[0]), data_layout="NHWC", kernel_layout="OHWI", padding=1
        ),
    )
    y = bind("mean", relax.op.mean(y, axis=[1, 2]))
    y = bind("fc", relax.op.matmul(y, weight(fc, prepare[1])), output=True)
    body = bb.normalize(relax.SeqExpr([relax.DataflowBlock(bindings)], y))
    return tvm.IRModule({"main": relax.Function([x], body, y.ty)})


def decoded(weight: np.ndarray, axis: int, options: WeightOptions) -> Decoded:
    first = np.moveaxis(weight, axis, 0)
    levels = quantize_weights(first.reshape(len(first), -1), options)
    return Decoded(levels=levels, shape=weight.shape, axis=axis)


def test_packed_weights_take_the_place_of_constants() -> None:
    before = network(relax.const(CONV), relax.const(FC))
    after = QuantizeWeights(INT4)(before)
    expected = network(decoded(CONV, 0, INT4).call(), decoded(FC, 1, INT4).call())
    tvm.ir.assert_structural_equal(after, expected)
    names = [str(binding.var.name) for binding in after["main"].body.blocks[0].bindings]
    assert names == ["conv@weight", "conv", "mean", "fc@weight", "fc"]
    relax.analysis.well_formed(after)


def test_the_module_given_stays_as_it_is() -> None:
    before = network(relax.const(CONV), relax.const(FC))
    copy = network(relax.const(CONV), relax.const(FC))
    quantize_weight_only(before, INT4)
    tvm.ir.assert_structural_equal(before, copy)


def test_what_was_done_is_reported() -> None:
    result = quantize_weight_only(
        network(relax.const(CONV), relax.const(FC)), INT4, keep_float=["fc"]
    )
    (entry,) = result.quantized
    assert entry.layer == "conv"
    assert (entry.float_bytes, entry.stored_bytes) == (CONV.nbytes, 6 * 23 + 6 * 4)
    real = decoded(CONV, 0, INT4).real()
    ratio = np.square(CONV).sum() / np.square(CONV - real).sum()
    assert entry.sqnr_db == pytest.approx(10 * np.log10(ratio), rel=1e-4)
    assert [tuple(skipped) for skipped in result.skipped] == [("fc", "kept in float")]


def test_exact_weights_have_no_noise() -> None:
    signs = np.sign(FC)
    options = WeightOptions(scheme=Scheme.BINARY)
    result = quantize_weight_only(
        network(relax.const(CONV), relax.const(signs)), options, keep_float=["conv"]
    )
    assert [entry.sqnr_db for entry in result.quantized] == [None]


def test_nothing_to_quantize_returns_the_same_module() -> None:
    before = network(relax.const(CONV), relax.const(FC))
    assert quantize_weight_only(before, INT4, keep_float=["conv", "fc"]).module.same_as(before)


def test_quantizing_twice_is_quantizing_once() -> None:
    once = QuantizeWeights(INT4)(network(relax.const(CONV), relax.const(FC)))
    again = quantize_weight_only(once, WeightOptions(bits=8))
    assert again.module.same_as(once)
    assert again.quantized == ()
    assert again.skipped == (
        ("conv", "its weights of 4 bits are packed already"),
        ("fc", "its weights of 4 bits are packed already"),
    )


def one_layer(make: object, *shapes: tuple[int, ...]) -> tvm.IRModule:
    bb = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(s, "float32")) for i, s in enumerate(shapes)]
    with bb.function("main", inputs):
        with bb.dataflow():
            out = bb.emit_output(make(*inputs))  # type: ignore[operator]
        bb.emit_func_output(out)
    return bb.get()


def ones(*shape: int) -> relax.Constant:
    return relax.const(np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("make", "shapes", "reason"),
    [
        (lambda x: relax.op.nn.conv2d(x, ones(4, 2, 1, 1)), [(1, 2, 5, 5)],
         "the layout is NCHW and OIHW, not NHWC and OHWI"),
        (lambda x: relax.op.nn.conv2d(x, ones(4, 1, 1, 1), groups=4, data_layout="NHWC",
                                      kernel_layout="OHWI"), [(1, 5, 5, 4)],
         "a convolution of 4 groups has no such kernel"),
        (lambda x: relax.op.matmul(x, ones(2, 3, 4)), [(2, 5, 3)],
         "weights of 3 axes have no such kernel"),
        (lambda x: relax.op.matmul(x, ones(3, 4)), [(3,)], "a vector has no such kernel"),
        (lambda x: relax.op.take(ones(3, 4), relax.const(np.array([1])), axis=1), [(1,)],
         "only whole rows are looked up in such a table"),
    ],
)  # fmt: skip
def test_what_has_no_kernel_is_skipped_with_the_reason(make, shapes, reason) -> None:
    before = one_layer(make, *shapes)
    result = quantize_weight_only(before, INT4)
    assert result.module.same_as(before)
    assert [skipped.reason for skipped in result.skipped] == [reason]


def test_a_product_of_two_activations_is_no_layer() -> None:
    before = one_layer(relax.op.matmul, (2, 3), (3, 4))
    result = quantize_weight_only(before, INT4)
    assert result.module.same_as(before)
    assert result.skipped == ()


def test_layers_to_keep_must_exist() -> None:
    with pytest.raises(UsageError) as caught:
        quantize_weight_only(
            network(relax.const(CONV), relax.const(FC)), INT4, keep_float=["cnv", "zzz"]
        )
    assert caught.value.message == (
        "no such layer to keep in float: 'cnv', did you mean 'conv'?; 'zzz'"
    )


def test_weights_that_are_not_finite_name_the_layer() -> None:
    broken = FC.copy()
    broken[2, 1] = np.nan
    with pytest.raises(ModelError) as caught:
        quantize_weight_only(network(relax.const(CONV), relax.const(broken)), INT4)
    assert caught.value.where == "fc"
