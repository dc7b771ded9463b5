"""SplitOperator: golden, reject and numeric tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.errors import UsageError
from hone.passes.graph.split_operator import SplitOperator


def conv_module(weight: np.ndarray, batch: int = 3, groups: int = 1) -> tvm.IRModule:
    """Return relu(conv(x)) with x [batch, 5, 7, 6], the convolution named ``conv``."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((batch, 5, 7, 6), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(
                relax.op.nn.conv2d(x, relax.const(weight), padding=1, groups=groups), "conv"
            )
            z = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(z)
    return builder.get()


def dense_module(weight: np.ndarray) -> tvm.IRModule:
    """Return x @ weight with x [4, 5], named ``fc``."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, weight.shape[0]), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, relax.const(weight)), "fc")
            z = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(z)
    return builder.get()


def run(module: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


def test_split_conv_gives_parts_and_concat_when_channels_do_not_divide(
    rng: np.random.Generator,
) -> None:
    weight = rng.standard_normal((7, 5, 3, 3)).astype("float32")
    after = SplitOperator(layers=["conv"], parts=2)(conv_module(weight))

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3, 5, 7, 6), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            first = builder.emit(relax.op.nn.conv2d(x, relax.const(weight[:4]), padding=1))
            second = builder.emit(relax.op.nn.conv2d(x, relax.const(weight[4:]), padding=1))
            both = builder.emit(relax.op.concat([first, second], axis=1))
            z = builder.emit_output(relax.op.nn.relu(both))
        builder.emit_func_output(z)
    assert_structural_equal(relax.transform.Normalize()(after), builder.get())


def test_split_keeps_the_layer_name_on_the_concat(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((7, 5, 3, 3)).astype("float32")
    after = SplitOperator(layers=["conv"], parts=3)(conv_module(weight))
    names = [binding.var.name for binding in after["main"].body.blocks[0].bindings]
    assert names[:4] == ["conv@part0", "conv@part1", "conv@part2", "conv"]


@dataclass(frozen=True)
class Case:
    id: str
    parts: int
    axis: str


@pytest.mark.parametrize(
    "case",
    [
        Case("two halves of seven channels", 2, "channels"),
        Case("a part for each channel", 7, "channels"),
        Case("batch of three in two", 2, "batch"),
        Case("batch of three in three", 3, "batch"),
    ],
    ids=lambda case: case.id,
)
def test_split_conv_computes_the_same_when_split(case: Case, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((7, 5, 3, 3)).astype("float32")
    before = conv_module(weight)
    after = SplitOperator(layers=["conv"], parts=case.parts, axis=case.axis)(before)
    x = rng.standard_normal((3, 5, 7, 6)).astype("float32")
    # The same sums in the same order within each output element; a vectorizer may still
    # contract differently, hence a few units in the last place of a sum of 45 terms.
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", ["channels", "batch"])
def test_split_dense_computes_the_same_when_split(axis: str, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((5, 9)).astype("float32")
    x = rng.standard_normal((4, 5)).astype("float32")
    after = SplitOperator(layers=["fc"], parts=2, axis=axis)(dense_module(weight))
    np.testing.assert_allclose(run(after, x), np.maximum(x @ weight, 0), rtol=1e-5, atol=1e-6)


def test_split_returns_the_same_function_when_no_layer_is_named(rng: np.random.Generator) -> None:
    before = conv_module(rng.standard_normal((7, 5, 3, 3)).astype("float32"))
    after = SplitOperator(layers=[], parts=2)(before)
    assert after["main"].same_as(before["main"])


@pytest.mark.parametrize(
    ("layers", "parts", "axis", "message"),
    [
        (["conf"], 2, "channels", "cannot split: 'conf' is no convolution or matrix product, "
         "did you mean 'conv'?"),
        (["conv"], 8, "channels", "cannot split: 'conv' has only 7 output channels"),
        (["conv"], 4, "batch", "cannot split: 'conv' has a batch of only 3"),
    ],
    ids=["unknown layer", "too many parts", "batch too small"],
)  # fmt: skip
def test_split_is_an_error_when_it_cannot_be_done(
    layers: list[str], parts: int, axis: str, message: str, rng: np.random.Generator
) -> None:
    before = conv_module(rng.standard_normal((7, 5, 3, 3)).astype("float32"))
    with pytest.raises(UsageError) as caught:
        SplitOperator(layers=layers, parts=parts, axis=axis)(before)
    assert str(caught.value) == message


def test_split_is_an_error_when_the_convolution_is_grouped(rng: np.random.Generator) -> None:
    before = conv_module(rng.standard_normal((10, 1, 3, 3)).astype("float32"), groups=5)
    with pytest.raises(UsageError) as caught:
        SplitOperator(layers=["conv"], parts=2)(before)
    assert str(caught.value) == "cannot split: 'conv' is a convolution of 5 groups"


def test_split_is_an_error_when_there_is_one_part() -> None:
    with pytest.raises(UsageError, match="parts must be at least 2, not 1"):
        SplitOperator(layers=["conv"], parts=1)
