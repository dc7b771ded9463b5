from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.errors import ModelError
from hone.passes.graph.dataflow import Dataflow
from hone.passes.quantize.equalize import By, equalize, equalized_tensors
from hone.passes.quantize.observer import Range

Emit = Callable[[relax.Expr, str], relax.Var]
SHAPE = (1, 5, 6, 3)


def network(build: Callable[[relax.Var, Emit], relax.Expr]) -> tvm.IRModule:
    """``main(x)`` of one dataflow block whose bindings have exactly the given names."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    bindings: list[relax.VarBinding] = []

    def emit(value: relax.Expr, name: str, *, output: bool = False) -> relax.Var:
        value = builder.normalize(value)
        var = (relax.Var if output else relax.DataflowVar)(name, value.ty)
        bindings.append(relax.VarBinding(var, value))
        return var

    result = emit(build(x, emit), "y", output=True)
    body = builder.normalize(relax.SeqExpr([relax.DataflowBlock(bindings)], result))
    return tvm.IRModule({"main": relax.Function([x], body, body.ty)})


def conv(x: relax.Expr, weight: np.ndarray, groups: int = 1, padding: int = 1) -> relax.Call:
    return relax.op.nn.conv2d(
        x,
        relax.const(weight),
        padding=padding,
        groups=groups,
        data_layout="NHWC",
        kernel_layout="OHWI",
    )


def run(module: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    module = tvm.transform.Sequential([relax.transform.LegalizeOps()])(module)
    executable = tvm.compile(module, tvm.target.Target("llvm"))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


def constants(module: tvm.IRModule, name: str) -> np.ndarray:
    (call,) = (b.value for b in Dataflow(module["main"]).bindings if b.var.name == name)
    return call.args[1].value.numpy()


def ranges(**channels: list[float]) -> dict[str, tuple[Range, ...]]:
    return {
        name: tuple(Range(minimum=-abs(v), maximum=v) for v in values)
        for name, values in channels.items()
    }


def uneven(rng: np.random.Generator, *shape: int) -> np.ndarray:
    spread = np.exp2(rng.integers(-4, 5, shape[0])).reshape(-1, *[1] * (len(shape) - 1))
    return (rng.normal(size=shape) * spread).astype(np.float32)


@pytest.fixture
def chain(rng: np.random.Generator):
    """conv → bias → activation → depthwise → bias → ReLU → max pool → 1 × 1 conv."""

    def make(activation: Callable[[relax.Expr], relax.Expr] = relax.op.nn.relu) -> tvm.IRModule:
        seeded = np.random.default_rng(5)

        def build(x: relax.Var, emit: Emit) -> relax.Expr:
            a = emit(conv(x, uneven(seeded, 4, 3, 3, 3)), "conv1@conv2d")
            bias = seeded.normal(size=(1, 1, 1, 4)).astype(np.float32)
            a = emit(relax.op.add(a, relax.const(bias)), "conv1")
            a = emit(activation(a), "relu1")
            a = emit(conv(a, uneven(seeded, 4, 3, 3, 1), groups=4), "dw@conv2d")
            a = emit(relax.op.add(a, relax.const(bias[0, 0, 0])), "dw")
            a = emit(relax.op.nn.relu(a), "relu2")
            a = emit(relax.op.nn.max_pool2d(a, 2, layout="NHWC"), "pool")
            return conv(a, uneven(seeded, 5, 1, 1, 4), padding=0)

        return network(build)

    return make


WIDE = {"conv1": [8.0, 0.25, 30.0, 1.0], "dw": [1.0, 9.0, 0.1, 100.0]}


@pytest.mark.parametrize("by", list(By))
def test_result_is_the_same_bit_for_bit_when_channels_are_scaled(chain, rng, by: By) -> None:
    module = chain()
    assert equalized_tensors(module) == ("conv1", "dw")
    result = equalize(module, ranges(**WIDE), by=by)
    assert result.pairs == (("conv1", "dw"), ("dw", "y"))
    assert not np.array_equal(constants(result.module, "conv1"), constants(module, "conv1"))
    for _ in range(3):
        x = rng.normal(size=SHAPE).astype(np.float32)
        np.testing.assert_array_equal(run(result.module, x), run(module, x))


def test_weights_match_the_worked_number() -> None:
    first = np.zeros((3, 1, 1, 3), np.float32)
    first[:, 0, 0] = [[8.0, -1.0, 0.0], [0.5, 0.0, 0.25], [0.0, -0.5, 0.5]]
    second = np.full((2, 1, 1, 3), 0.5, np.float32)

    def build(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, first, padding=0), "conv1")
        return conv(emit(relax.op.nn.relu(a), "relu1"), second, padding=0)

    result = equalize(network(build), ranges(conv1=[1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(
        np.abs(constants(result.module, "conv1")).max((1, 2, 3)), [2.0, 0.5, 0.5]
    )
    np.testing.assert_array_equal(
        np.abs(constants(result.module, "y")).max((0, 1, 2)), [2.0, 0.5, 0.5]
    )


def test_ranges_of_both_sides_are_within_a_factor_of_two_when_settled(chain) -> None:
    module = equalize(chain(), ranges(**WIDE)).module
    first, depthwise, last = (constants(module, n) for n in ("conv1@conv2d", "dw@conv2d", "y"))
    pairs = [
        (np.abs(first).max((1, 2, 3)), np.abs(depthwise).max((1, 2, 3))),
        (np.abs(depthwise).max((1, 2, 3)), np.abs(last).max((0, 1, 2))),
    ]
    for giving, reading in pairs:
        # At rest, sqrt(r1 / r2) is within a factor of sqrt(2) of the median.
        root = 0.5 * np.log2(giving / reading)
        assert np.all(np.abs(root - np.median(root)) <= 0.5)


def test_activations_become_even_before_a_depthwise_layer(chain) -> None:
    module = chain()
    seen = ranges(**WIDE)
    result = equalize(module, seen, by=By.ACTIVATIONS)
    scale = constants(module, "conv1").ravel() / constants(result.module, "conv1").ravel()
    even = np.array([r.maximum for r in seen["conv1"]]) / scale
    # Powers of two from r / max r up: nothing exceeds the largest channel.
    assert even.max() == 30.0
    assert even.min() > 15.0


def relu6(x: relax.Expr) -> relax.Expr:
    return relax.op.clip(x, 0, 6)


@pytest.mark.parametrize("by", list(By))
def test_channels_behind_relu6_change_only_below_the_bound(chain, rng, by: By) -> None:
    module = chain(relu6)
    seen = ranges(conv1=[8.0, 4.5, 6.0, 2.9], dw=WIDE["dw"])
    result = equalize(module, seen, by=by)
    scale = constants(module, "conv1").ravel() / constants(result.module, "conv1").ravel()
    # The first and third channel reach the bound.
    np.testing.assert_array_equal(scale[[0, 2]], 1.0)
    assert np.all(np.array([4.5, 2.9]) / scale[[1, 3]] <= 6.0)
    x = rng.normal(size=SHAPE).astype(np.float32) * np.float32(1e-3)
    # Little more than the biases arrives, all of it within the ranges above.
    np.testing.assert_array_equal(run(result.module, x), run(module, x))


def test_channel_of_zeros_is_left_alone(rng) -> None:
    first, second = uneven(rng, 4, 3, 3, 3), uneven(rng, 2, 1, 1, 4)
    first[1], second[..., 2] = 0.0, 0.0

    def build(x: relax.Var, emit: Emit) -> relax.Expr:
        return conv(emit(conv(x, first), "conv1"), second, padding=0)

    module = equalize(network(build), ranges(conv1=[1.0, 0.0, 1.0, 1.0])).module
    changed = constants(module, "conv1")
    assert np.isfinite(changed).all()
    assert np.isfinite(constants(module, "y")).all()
    np.testing.assert_array_equal(changed[[1, 2]], first[[1, 2]])


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A network without a pair."""

    name: str
    build: Callable[[relax.Var, Emit], relax.Expr]


W1 = uneven(np.random.default_rng(1), 3, 1, 1, 3)


def _two_readers(x: relax.Var, emit: Emit) -> relax.Expr:
    a = emit(conv(x, W1, padding=0), "conv1")
    other = emit(relax.op.exp(a), "exp")
    return relax.op.add(emit(conv(a, W1, padding=0), "conv2"), other)


def _sigmoid(x: relax.Var, emit: Emit) -> relax.Expr:
    a = emit(conv(x, W1, padding=0), "conv1")
    return conv(emit(relax.op.sigmoid(a), "act"), W1, padding=0)


def _above_zero(x: relax.Var, emit: Emit) -> relax.Expr:
    a = emit(conv(x, W1, padding=0), "conv1")
    return conv(emit(relax.op.clip(a, 1, 6), "act"), W1, padding=0)


def _residual(x: relax.Var, emit: Emit) -> relax.Expr:
    a = emit(conv(x, W1, padding=0), "conv0")
    b = emit(conv(a, W1, padding=0), "conv1")
    a = emit(relax.op.add(a, b), "add")
    return conv(a, W1, padding=0)


def _flattened(x: relax.Var, emit: Emit) -> relax.Expr:
    a = emit(conv(x, W1, padding=0), "conv1")
    a = emit(relax.op.reshape(a, (1, 90)), "flatten")
    return relax.op.matmul(a, relax.const(np.ones((90, 2), np.float32)))


@pytest.mark.parametrize(
    "build", [_two_readers, _sigmoid, _above_zero, _residual, _flattened], ids=lambda f: f.__name__
)
def test_module_stays_when_no_factor_can_pass(build) -> None:
    module = network(build)
    assert equalized_tensors(module) == ()
    assert equalize(module, {}).module.same_as(module)


def test_module_stays_when_everything_is_even() -> None:
    def build(x: relax.Var, emit: Emit) -> relax.Expr:
        ones = np.ones((3, 1, 1, 3), np.float32)
        return conv(emit(conv(x, ones, padding=0), "conv1"), ones, padding=0)

    module = network(build)
    assert equalize(module, ranges(conv1=[1.0] * 3)).module.same_as(module)


def test_error_lists_tensors_without_a_range(chain) -> None:
    with pytest.raises(ModelError) as error:
        equalize(chain(), ranges(dw=WIDE["dw"]))
    assert str(error.value) == "calibration gave no range for some tensors\n  - conv1"


def test_alpha_says_how_much_the_weights_take_over() -> None:
    rng = np.random.default_rng(2)
    first = rng.normal(size=(3, 1, 1, 3)).astype(np.float32)
    second = np.full((2, 1, 1, 3), 0.5, np.float32)

    def build(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, first, padding=0), "conv1")
        return conv(emit(relax.op.nn.relu(a), "relu1"), second, padding=0)

    seen = ranges(conv1=[256.0, 1.0, 1.0])
    for alpha, factor in ((0.0, 1.0), (0.25, 4.0), (0.5, 16.0), (1.0, 256.0)):
        result = equalize(network(build), seen, by=By.ACTIVATIONS, alpha=alpha)
        np.testing.assert_array_equal(
            constants(result.module, "y")[0, 0, 0], np.float32([0.5 * factor, 0.5, 0.5])
        )
