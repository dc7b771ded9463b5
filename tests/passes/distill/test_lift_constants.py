from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.errors import UsageError
from hone.passes.distill.lift_constants import (
    BindConstants,
    LiftConstants,
    trainable_constants,
)


def array(*shape: int) -> np.ndarray:
    return np.arange(1, np.prod(shape) + 1, dtype="float32").reshape(shape)


def network(*, lifted: bool) -> tvm.IRModule:
    """Convolution + bias, bounds, a table that is not a bias, matmul with the same weight twice."""
    shapes = {"conv.weight": (4, 3, 1, 1), "conv.bias": (1, 4, 1, 1), "fc.weight": (4, 4)}
    x = relax.Var("x", relax.TensorType((1, 3, 2, 5), "float32"))
    params = {name: relax.Var(name, relax.TensorType(s, "float32")) for name, s in shapes.items()}
    value = {name: params[name] if lifted else relax.const(array(*shapes[name])) for name in shapes}
    builder = relax.BlockBuilder()
    op = relax.op
    with builder.function("main", [x, *params.values()] if lifted else [x]):
        with builder.dataflow():
            y = builder.emit(op.nn.conv2d(x, value["conv.weight"]), "conv@conv2d")
            y = builder.emit(op.add(y, value["conv.bias"]), "conv")
            y = builder.emit(op.minimum(y, relax.const(6.0, "float32")), "clip")
            y = builder.emit(op.add(y, relax.const(array(1, 4, 1, 1))), "table")
            y = builder.emit(op.reshape(op.mean(y, [2, 3]), (1, 4)), "flat")
            y = builder.emit(op.matmul(y, value["fc.weight"]), "fc")
            y = builder.emit(op.add(y, relax.const(0.5, "float32")), "scalar")
            gv = builder.emit_output(op.matmul(y, value["fc.weight"]), "fc2")
        builder.emit_func_output(gv)
    return builder.get()


def renamed(module: tvm.IRModule) -> tvm.IRModule:
    """BlockBuilder writes conv_conv2d for conv@conv2d: give the layer its part's name back."""
    text = {"conv_conv2d": "conv@conv2d"}
    block = module["main"].body.blocks[0]
    bindings, new = [], {}
    for binding in block.bindings:
        assert isinstance(binding.value, relax.Call)
        arguments = [new.get(a, a) if isinstance(a, relax.Var) else a for a in binding.value.args]
        call = relax.Call(binding.value.op, arguments, binding.value.attrs)
        call = relax.BlockBuilder().normalize(call)
        name = text.get(binding.var.name, binding.var.name)
        kind = relax.DataflowVar if isinstance(binding.var, relax.DataflowVar) else relax.Var
        new[binding.var] = kind(name, binding.var.ty)
        bindings.append(relax.VarBinding(new[binding.var], call))
    body = relax.SeqExpr([relax.DataflowBlock(bindings)], new[module["main"].body.body])
    body = relax.BlockBuilder().normalize(body)
    function = relax.Function(module["main"].params, body, body.ty, attrs=module["main"].attrs)
    return tvm.IRModule({"main": function})


def test_trainable_constants_are_weights_and_biases_when_others_stand_beside_them() -> None:
    found = trainable_constants(renamed(network(lifted=False)))
    # The two linear layers share one constant: it is trained once, under the first one's name.
    assert {constant.name: constant.value.shape for constant in found} == {
        "conv.weight": (4, 3, 1, 1),
        "conv.bias": (1, 4, 1, 1),
        "fc.weight": (4, 4),
    }


def test_lift_makes_parameters_of_weights_when_golden() -> None:
    after = LiftConstants()(renamed(network(lifted=False)))
    assert_structural_equal(after, renamed(network(lifted=True)), map_free_vars=True)
    names = [str(param.name) for param in after["main"].params]
    assert names == ["x", "conv.weight", "conv.bias", "fc.weight"]


def test_round_trip_gives_the_same_module_when_lifted_and_bound() -> None:
    before = renamed(network(lifted=False))
    values = {constant.name: constant.value for constant in trainable_constants(before)}
    after = BindConstants(values)(LiftConstants()(before))
    assert_structural_equal(after, before, map_free_vars=True)


def test_lift_takes_only_the_named_when_names_are_given() -> None:
    after = LiftConstants(names=["fc.weight"])(renamed(network(lifted=False)))
    assert [str(param.name) for param in after["main"].params] == ["x", "fc.weight"]


def test_lift_returns_the_same_module_when_nothing_is_trainable() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            gv = builder.emit_output(relax.op.add(x, relax.const(array(1, 3))))
        builder.emit_func_output(gv)
    before = builder.get()
    assert LiftConstants()(before).same_as(before)
    assert BindConstants({})(before).same_as(before)


def test_lift_leaves_half_precision_weights_when_asked_for_trainable_ones() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3), "float16"))
    with builder.function("main", [x]):
        with builder.dataflow():
            weight = relax.const(array(3, 2).astype("float16"))
            gv = builder.emit_output(relax.op.matmul(x, weight))
        builder.emit_func_output(gv)
    assert trainable_constants(builder.get()) == ()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"nothing": array(1)}, "main has no parameter 'nothing'"),
        (
            {"fc.weight": array(4, 5)},
            "'fc.weight' is R.Tensor((4, 4), dtype=\"float32\"), "
            'the value given is R.Tensor((4, 5), dtype="float32")',
        ),
    ],
)
def test_bind_raises_when_a_value_does_not_fit(values: dict[str, np.ndarray], text: str) -> None:
    with pytest.raises(UsageError) as error:
        BindConstants(values)(network(lifted=True))
    assert str(error.value) == text
