"""Type inference and validation of the integer operators."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.errors import ModelError
from hone.passes.apply import apply
from hone.passes.quantize import operators


def tensor(*shape: int, dtype: str = "uint8") -> relax.Var:
    return relax.Var("t", relax.TensorType(shape, dtype))


def constant(*shape: int, dtype: str) -> relax.Expr:
    return relax.const(np.zeros(shape, dtype))


def convolution(**changes: object) -> relax.Call:
    arguments: dict[str, object] = {
        "data": tensor(2, 7, 9, 3),
        "weight": constant(5, 3, 2, 3, dtype="int8"),
        "bias": constant(5, dtype="int32"),
        "multiplier": constant(5, dtype="float32"),
        "levels": constant(4, dtype="int32"),
        **changes,
    }
    return operators.conv2d_int8(**arguments)


def dense(**changes: object) -> relax.Call:
    arguments: dict[str, object] = {
        "data": tensor(2, 3, 7),
        "weight": constant(5, 7, dtype="int8"),
        "bias": constant(5, dtype="int32"),
        "multiplier": constant(5, dtype="float32"),
        "levels": constant(4, dtype="int32"),
        **changes,
    }
    return operators.dense_int8(**arguments)


def inferred(call: relax.Call) -> tuple[tuple[int, ...], str]:
    type_ = relax.BlockBuilder().normalize(call).ty
    return tuple(int(e) for e in type_.shape), str(type_.dtype)


def test_shapes_are_inferred() -> None:
    assert inferred(convolution()) == ((2, 5, 8, 5), "uint8")
    geometry = {"strides": (2, 3), "padding": (0, 1, 2, 3), "dilation": (2, 1)}
    assert inferred(convolution(**geometry)) == ((2, 3, 4, 5), "uint8")
    assert inferred(dense(out_dtype="int8")) == ((2, 3, 5), "int8")
    data = tensor(2, 4, 5, 3)
    multiplier, levels = constant(1, dtype="float32"), constant(4, dtype="int32")
    mean = operators.mean_int8(data, multiplier, levels, axis=[1, -2])
    assert inferred(mean) == ((2, 3), "uint8")
    kept = operators.mean_int8(data, multiplier, levels, axis=[1, -2], keepdims=True)
    assert inferred(kept) == ((2, 1, 1, 3), "uint8")
    pool = operators.avg_pool2d_int8(data, multiplier, levels, pool_size=(2, 3), strides=(2, 1))
    assert inferred(pool) == ((2, 2, 3, 3), "uint8")
    scale, zero = constant(dtype="float32"), constant(dtype="int32")
    assert inferred(operators.dequantize(data, scale, zero)) == ((2, 4, 5, 3), "float32")


REFUSED = {
    "float_data": (
        lambda: convolution(data=tensor(2, 7, 9, 3, dtype="float32")),
        "hone.conv2d_int8: data must be uint8 or int8, not float32",
    ),
    "unsigned_weight": (
        lambda: convolution(weight=constant(5, 3, 2, 3, dtype="uint8")),
        "hone.conv2d_int8: weight must be int8, not uint8",
    ),
    "float_weight": (
        lambda: dense(weight=constant(5, 7, dtype="float32")),
        "hone.dense_int8: weight must be int8, not float32",
    ),
    "groups": (
        lambda: convolution(weight=constant(5, 3, 2, 1, dtype="int8"), groups=3),
        "hone.conv2d_int8: groups must be 1, or C with one filter for each channel; not 3 for "
        "data [2, 7, 9, 3] and weight [5, 3, 2, 1]",
    ),
    "channels": (
        lambda: dense(weight=constant(5, 8, dtype="int8")),
        "hone.dense_int8: data [..., C] and weight [K, C] are required, not [2, 3, 7] and [5, 8]",
    ),
    "bias": (
        lambda: convolution(bias=constant(4, dtype="int32")),
        "hone.conv2d_int8: bias must have shape [5], not [4]",
    ),
    "float_bias": (
        lambda: convolution(bias=constant(5, dtype="float32")),
        "hone.conv2d_int8: bias must be int32, not float32",
    ),
    "levels": (
        lambda: convolution(levels=constant(1, dtype="int32")),
        "hone.conv2d_int8: levels must have shape [4], not [1]",
    ),
    "float_levels": (
        lambda: convolution(out_dtype="float32"),
        "hone.conv2d_int8: levels must have shape [1], not [4]",
    ),
    "out_dtype": (
        lambda: convolution(out_dtype="int32"),
        "hone.conv2d_int8: out_dtype must be uint8 or int8 or float32, not int32",
    ),
    "window": (
        lambda: convolution(data=tensor(2, 2, 9, 3)),
        "hone.conv2d_int8: the window [3, 2] is larger than the padded input [2, 2, 9, 3]",
    ),
    "stride": (
        lambda: convolution(strides=(0, 1)),
        "hone.conv2d_int8: strides must be 2 integers of at least 1, not [0, 1]",
    ),
    "residual_without_multiplier": (
        lambda: convolution(residual=tensor(2, 5, 8, 5)),
        "a residual and its multiplier come together or not at all",
    ),
    "residual_shape": (
        lambda: convolution(
            residual=tensor(2, 5, 8, 1),
            residual_multiplier=constant(1, dtype="float32"),
            levels=constant(5, dtype="int32"),
        ),
        "hone.conv2d_int8: residual must have the output's shape [2, 5, 8, 5], not [2, 5, 8, 1]",
    ),
    "residual_of_float_output": (
        lambda: convolution(
            residual=tensor(2, 5, 8, 5),
            residual_multiplier=constant(1, dtype="float32"),
            levels=constant(2, dtype="int32"),
            out_dtype="float32",
        ),
        "hone.conv2d_int8: a residual needs a quantized output",
    ),
    "add_shapes": (
        lambda: operators.add_int8(
            tensor(2, 3), tensor(1, 3), constant(2, dtype="float32"), constant(5, dtype="int32")
        ),
        "hone.add_int8: left and right must have one shape, not [2, 3] and [1, 3]",
    ),
    "mean_axis": (
        lambda: operators.mean_int8(
            tensor(2, 3), constant(1, dtype="float32"), constant(4, dtype="int32"), axis=[2]
        ),
        "hone.mean_int8: axis must name dimensions of data [2, 3], not [2]",
    ),
    "quantize_levels": (
        lambda: operators.quantize(
            tensor(2, 3), constant(dtype="float32"), constant(dtype="int32")
        ),
        "hone.quantize: data must be float32, not uint8",
    ),
    "scale_shape": (
        lambda: operators.dequantize(
            tensor(2, 3), constant(3, dtype="float32"), constant(dtype="int32")
        ),
        "hone.dequantize: scale must have shape [], not [3]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_call_is_refused_when_an_argument_does_not_fit(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(ModelError) as error:
        build()
    assert str(error.value) == message


def test_tvm_refuses_too_when_a_pass_builds_a_wrong_call() -> None:
    call = convolution()
    wrong = relax.Call(call.op, [tensor(2, 7, 9, 4), *call.args[1:]], call.attrs)
    with pytest.raises(ModelError, match=r"hone\.conv2d_int8: groups must be 1"):
        relax.BlockBuilder().normalize(wrong)


def test_layers_of_one_shape_lower_to_one_kernel_when_only_their_numbers_differ() -> None:
    x = tensor(1, 4, 4, 3)
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        with bb.dataflow():
            value: relax.Expr = x
            for seed in range(3):
                rng = np.random.default_rng(seed)
                value = bb.emit(
                    operators.conv2d_int8(
                        value,
                        relax.const(rng.integers(-127, 128, (3, 3, 3, 3)).astype(np.int8)),
                        relax.const(rng.integers(-99, 99, 3).astype(np.int32)),
                        relax.const(rng.random(3).astype(np.float32)),
                        relax.const(np.array([seed, 7 * seed, seed, 200 + seed], np.int32)),
                        padding=(1, 1, 1, 1),
                    )
                )
            out = bb.emit_output(value)
        bb.emit_func_output(out)
    lowered = apply(bb.get(), relax.transform.LegalizeOps())
    kernels = [f for f in lowered.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
    assert len(kernels) == 1


def test_module_survives_saving_and_loading() -> None:
    x = tensor(2, 7, 9, 3)
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(convolution(data=x, strides=(2, 1)))
        bb.emit_func_output(out)
    module = bb.get()
    tvm.ir.assert_structural_equal(tvm.ir.load_json(tvm.ir.save_json(module)), module)
