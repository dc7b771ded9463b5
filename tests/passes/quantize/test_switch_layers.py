"""A network whose layers are rounded or not by a switch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import tvm
from tvm import relax

import hone.passes.quantize.legalize  # noqa: F401  registers the lowering
from hone.errors import ModelError
from hone.passes.apply import apply
from hone.passes.quantize import operators
from hone.passes.quantize.qparams import UINT8, choose_qparams, dequantize, quantize
from hone.passes.quantize.switch_layers import SWITCH, Emulation, SwitchLayers

RNG = np.random.default_rng(7)
X = RNG.normal(size=(3, 5)).astype(np.float32)
W1 = RNG.normal(size=(5, 7)).astype(np.float32)
W2 = RNG.normal(size=(7, 2)).astype(np.float32)
B1 = RNG.normal(size=(7,)).astype(np.float32)
INPUT = choose_qparams(-2.0, 2.0, type=UINT8, symmetric=False)


def network() -> tvm.IRModule:
    x = relax.Var("x", relax.TensorType(X.shape, "float32"))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            product = block.emit(relax.op.matmul(x, relax.const(W1)), name_hint="one@matmul")
            total = block.emit(relax.op.add(product, relax.const(B1)), name_hint="one")
            active = block.emit(relax.op.nn.relu(total), name_hint="relu")
            result = block.emit_output(relax.op.matmul(active, relax.const(W2)), name_hint="two")
        block.emit_func_output(result)
    return block.get()


def to_levels(x: relax.Expr) -> relax.Expr:
    return operators.quantize(x, relax.const(INPUT.scale), relax.const(INPUT.zero_point))


def to_floats(x: relax.Expr) -> relax.Expr:
    return operators.dequantize(x, relax.const(INPUT.scale), relax.const(INPUT.zero_point))


def alternatives() -> dict[str, list[Emulation]]:
    return {
        "one": [
            Emulation(weight=np.round(W1), data=(to_levels, to_floats)),
            Emulation(weight=np.round(2 * W1) / 2),
        ],
        "two": [Emulation(weight=np.round(W2))],
    }


@pytest.fixture(scope="module")
def machine() -> relax.VirtualMachine:
    module = apply(network(), SwitchLayers(alternatives=alternatives()))
    return relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())


def run(machine: relax.VirtualMachine, *switch: int) -> np.ndarray:
    values = np.array(switch, np.int32)
    (result,) = machine["main"](tvm.runtime.tensor(X), tvm.runtime.tensor(values))
    return result.numpy()


def expected(x: np.ndarray, w1: np.ndarray, w2: np.ndarray) -> np.ndarray:
    return np.maximum(x @ w1 + B1, 0) @ w2


@pytest.mark.parametrize(
    ("switch", "wanted"),
    [
        ((0, 0), expected(X, W1, W2)),
        ((1, 0), expected(dequantize(quantize(X, INPUT), INPUT), np.round(W1), W2)),
        ((2, 0), expected(X, np.round(2 * W1) / 2, W2)),
        ((0, 1), expected(X, W1, np.round(W2))),
        ((2, 1), expected(X, np.round(2 * W1) / 2, np.round(W2))),
    ],
    ids=str,
)
def test_each_switch_selects_how_its_layer_is_rounded(machine, switch, wanted):
    # Sums of seven products of about 1: float32 rounds each by 6e-8 of it.
    np.testing.assert_allclose(run(machine, *switch), wanted, rtol=1e-5, atol=1e-5)


def test_network_gets_one_more_parameter_and_keeps_the_names_of_its_layers():
    module = apply(network(), SwitchLayers(alternatives=alternatives()))
    assert [str(param.name) for param in module["main"].params] == ["x", SWITCH]
    names = [str(b.var.name) for b in module["main"].body.blocks[0].bindings]
    assert {"one@matmul", "one", "relu", "two"} <= set(names)


@pytest.mark.parametrize(
    ("layer", "message"),
    [("relu", "is no convolution or matrix product"), ("three", "is no convolution or")],
)
def test_layer_that_is_no_matrix_product_is_refused(layer: str, message: str):
    wrong: Mapping[str, list[Emulation]] = {layer: [Emulation(weight=W1)]}
    with pytest.raises(ModelError, match=r"these layers cannot be switched") as error:
        apply(network(), SwitchLayers(alternatives=wrong))
    assert f"{layer}: {message}" in str(error.value)
