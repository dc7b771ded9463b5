"""ToNHWC: golden, idempotent, and the number of layout changes that stay in each network."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import Op, assert_structural_equal

import hone
from hone import models
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.graph.fold_channel_moves import FoldChannelMoves

PERMUTE = Op.get("relax.permute_dims")


def network(weight: np.ndarray, bias: np.ndarray) -> tvm.IRModule:
    """Return pool(relu(conv(x) + bias)) over NCHW [2, 3, 8, 6]."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3, 8, 6), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.conv2d(x, relax.const(weight), padding=1), "conv")
            y = builder.emit(relax.op.add(y, relax.const(bias)), "bias")
            y = builder.emit(relax.op.nn.relu(y), "relu")
            z = builder.emit_output(relax.op.nn.max_pool2d(y, (2, 2), (2, 2)))
        builder.emit_func_output(z)
    return builder.get()


@pytest.fixture
def weight(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((5, 3, 3, 3)).astype("float32")


@pytest.fixture
def bias(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((1, 5, 1, 1)).astype("float32")


def test_layout_changes_stay_at_the_borders(weight: np.ndarray, bias: np.ndarray) -> None:
    after = apply(network(weight, bias), ToNHWC())

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3, 8, 6), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.permute_dims(x, [0, 2, 3, 1]))
            y = builder.emit(
                relax.op.nn.conv2d(
                    y, relax.const(weight.transpose(0, 2, 3, 1)), padding=1, data_layout="NHWC",
                    kernel_layout="OHWI", out_layout="NHWC",
                )
            )  # fmt: skip
            y = builder.emit(relax.op.add(y, relax.const(bias.transpose(0, 2, 3, 1))))
            y = builder.emit(relax.op.nn.relu(y))
            y = builder.emit(
                relax.op.nn.max_pool2d(y, (2, 2), (2, 2), layout="NHWC", out_layout="NHWC")
            )
            z = builder.emit_output(relax.op.permute_dims(y, [0, 3, 1, 2]))
        builder.emit_func_output(z)
    assert_structural_equal(after, builder.get())


def test_layout_is_the_same_when_converted_twice(weight: np.ndarray, bias: np.ndarray) -> None:
    once = apply(network(weight, bias), ToNHWC())
    assert_structural_equal(apply(once, ToNHWC()), once)


def test_layout_keeps_the_names_of_the_layers(weight: np.ndarray, bias: np.ndarray) -> None:
    after = apply(network(weight, bias), ToNHWC())
    names = {b.var.name for b in after["main"].body.blocks[0].bindings}
    assert {"conv", "bias", "relu"} <= names


def test_layout_leaves_a_network_without_convolutions_alone(rng: np.random.Generator) -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            w = relax.const(rng.standard_normal((3, 5)).astype("float32"))
            z = builder.emit_output(relax.op.matmul(x, w))
        builder.emit_func_output(z)
    before = builder.get()
    assert_structural_equal(apply(before, ToNHWC()), before)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_of_one_group_is_converted_but_for_its_weights(
    rng: np.random.Generator, groups: int
) -> None:
    def network(*, converted: bool) -> tvm.IRModule:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType((2, 3, 5, 6), "float32"))
        with builder.function("main", [x]):
            with builder.dataflow():
                if converted:
                    y = builder.emit(relax.op.permute_dims(x, [0, 2, 3, 1]))
                    weight = relax.const(weights[0].transpose(0, 2, 3, 1))
                    layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_layout": "NHWC"}
                    y = builder.emit(relax.op.nn.conv2d(y, weight, **layouts))
                    layouts = {"data_layout": "NHWC", "out_layout": "NHWC"} if groups == 1 else {}
                    if groups > 1:
                        y = builder.emit(relax.op.permute_dims(y, [0, 3, 1, 2]))
                else:
                    y = builder.emit(relax.op.nn.conv2d(x, relax.const(weights[0])))
                    layouts = {}
                z = relax.op.nn.conv2d_transpose(
                    y, relax.const(weights[1]), strides=2, groups=groups, **layouts
                )
                if converted and groups == 1:
                    z = relax.op.permute_dims(builder.emit(z), [0, 3, 1, 2])
                z = builder.emit_output(z)
            builder.emit_func_output(z)
        return builder.get()

    weights = [rng.standard_normal(s).astype("float32") for s in ((4, 3, 1, 1), (4, 6, 2, 2))]
    after = apply(network(converted=False), ToNHWC())
    assert_structural_equal(after, network(converted=True))


def test_transposed_convolution_that_cuts_off_its_kernel_keeps_its_layout() -> None:
    # It has no form in phases, and nothing else lowers it in NHWC.
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 5, 6), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.conv2d(x, relax.const(np.ones((4, 3, 1, 1), "float32"))))
            weight = relax.const(np.ones((4, 2, 2, 2), "float32"))
            z = builder.emit_output(relax.op.nn.conv2d_transpose(y, weight, strides=2, padding=2))
        builder.emit_func_output(z)
    calls = [
        binding.value
        for binding in apply(builder.get(), ToNHWC())["main"].body.blocks[0].bindings
        if isinstance(binding.value, relax.Call)
    ]
    layouts = [str(c.attrs.data_layout) for c in calls if "conv2d" in str(c.op.name)]
    assert layouts == ["NHWC", "NCHW"]


# Of the image, and of the last feature map where a flatten follows in ONNX's order; the
# transformers' own permutations are theirs.
EXPECTED = {
    "digits-cnn": 2,
    "resnet18": 1,
    "resnet50": 1,
    "mobilenetv2": 1,
    "shufflenetv2": 1,
    "efficientnet-b0": 1,
    "unet": 2,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_network_has_no_layout_change_inside(name: str) -> None:
    passes = (FoldBatchNorm(), ToNHWC(), FoldChannelMoves())
    module = apply(hone.load(models.build(name)).module, *passes)
    calls = [
        binding.value
        for binding in module["main"].body.blocks[0].bindings
        if isinstance(binding.value, relax.Call) and binding.value.op == PERMUTE
    ]
    # A [N, 1, 1, C] tensor is permuted for free.
    real = [c for c in calls if sum(int(e) > 1 for e in c.ty.shape) > 1]
    assert len(real) == EXPECTED[name]
