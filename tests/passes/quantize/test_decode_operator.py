from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.errors import ModelError
from hone.passes.quantize.decode_operator import Decoded, decode_call, decode_weights
from hone.passes.quantize.weight_schemes import (
    Granularity,
    Scheme,
    WeightOptions,
    quantize_weights,
)

OPTIONS = [
    WeightOptions(),
    WeightOptions(bits=4, symmetric=False),
    WeightOptions(bits=4, granularity=Granularity.GROUP, group_size=4, power_of_two=True),
    WeightOptions(bits=2, granularity=Granularity.TENSOR, symmetric=False),
    WeightOptions(scheme=Scheme.TERNARY),
    WeightOptions(scheme=Scheme.BINARY),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_weight_survives_being_an_operator(options, axis, rng) -> None:
    weight = rng.standard_normal((5, 3, 7)).astype(np.float32)
    first = np.moveaxis(weight, axis, 0)
    levels = quantize_weights(first.reshape(len(first), -1), options)
    decoded = Decoded(levels=levels, shape=weight.shape, axis=axis)
    call = decoded.call()
    assert decode_call(call) is call
    again = Decoded.of(call)
    assert again.levels.power_of_two == options.power_of_two
    np.testing.assert_array_equal(again.levels.levels, levels.levels)
    np.testing.assert_array_equal(again.real(), decoded.real())
    expected = np.moveaxis(levels.real().reshape(first.shape), 0, axis)
    np.testing.assert_array_equal(again.real(), expected)


def test_the_type_is_the_weight_and_constant_folding_leaves_it_alone() -> None:
    levels = quantize_weights(np.eye(4, 6, dtype=np.float32), WeightOptions(bits=4))
    call = Decoded(levels=levels, shape=(6, 4), axis=1).call()
    bb = relax.BlockBuilder()
    with bb.function("main", []):
        with bb.dataflow():
            out = bb.emit_output(call)
        bb.emit_func_output(out)
    module = bb.get()
    assert module["main"].ret_ty == relax.TensorType((6, 4), "float32")
    tvm.ir.assert_structural_equal(relax.transform.FoldConstant()(module), module)


def constant(shape: tuple[int, ...], dtype: str) -> relax.Constant:
    return relax.const(np.zeros(shape, dtype), dtype)


GOOD = {"bits": 4, "group": 6, "shape": (4, 6), "axis": 0}


@pytest.mark.parametrize(
    ("arguments", "attributes", "message"),
    [
        ([((4, 3), "uint8"), ((4, 1), "float32")], {"bits": 3}, "bits must be 1, 2, 4 or 8, not 3"),
        ([((4, 3), "uint8"), ((4, 1), "float32")], {"group": 0}, "group must be at least 1, not 0"),
        ([((4, 3), "uint8"), ((4, 1), "float32")], {"axis": 2},
         "axis 2 of a weight [4, 6] does not exist"),
        ([((4, 2), "uint8"), ((4, 1), "float32")], {}, "packed must have shape [4, 3], not [4, 2]"),
        ([((4, 3), "int8"), ((4, 1), "float32")], {}, "packed must be uint8, not int8"),
        ([((4, 3), "uint8"), ((4, 2), "float32")], {},
         "scale must have shape [4, 1] or [1, 1], not [4, 2]"),
        ([((4, 3), "uint8"), ((1, 1), "float32")], {"group": 3},
         "scale must have shape [4, 2], not [1, 1]"),
        ([((4, 3), "uint8"), ((4, 1), "float16")], {},
         "scale must be float32 or int8, not float16"),
        ([((4, 3), "uint8"), ((4, 1), "float32"), ((1, 1), "int8")], {},
         "zero_point must have shape [4, 1], not [1, 1]"),
        ([((4, 1), "uint8"), ((4, 1), "float32"), ((4, 1), "int8")], {"bits": 1},
         "levels of 1 bit have no zero point"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(arguments, attributes, message) -> None:
    with pytest.raises(ModelError) as caught:
        decode_weights(*(constant(*given) for given in arguments), **{**GOOD, **attributes})
    assert caught.value.message == message
    assert caught.value.where == "hone.decode_weights"


def test_packed_weights_must_be_constant_to_be_read() -> None:
    packed = relax.Var("packed", relax.TensorType((4, 3), "uint8"))
    call = decode_weights(packed, constant((4, 1), "float32"), **GOOD)
    with pytest.raises(ModelError, match="packed weights must be constant"):
        Decoded.of(call)
