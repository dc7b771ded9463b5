"""MobileNetV2 (Sandler et al., "Inverted Residuals and Linear Bottlenecks", CVPR 2018)."""

from __future__ import annotations

import onnx

from hone.models.builder import GraphBuilder, Value
from hone.models.layers import (
    RESIDUAL_GAIN,
    add,
    batch_norm,
    conv,
    flatten,
    global_average_pool,
    image_input,
    linear,
    relu6,
)

# Expansion factor, output channels, repetitions, first stride: table 2 of the paper.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenetv2(seed: int) -> onnx.ModelProto:
    """Build MobileNetV2, 3.50 M parameters: ``image`` [1, 3, 224, 224] → ``logits`` [1, 1000]."""
    graph = GraphBuilder("mobilenetv2", seed)
    x = image_input(graph)
    with graph.scope("features"):
        with graph.scope("0"):
            x = _conv_bn_relu6(graph, x, 32, 3, stride=2)
        block = 0
        for expansion, channels, repetitions, first_stride in _STAGES:
            for repetition in range(repetitions):
                block += 1
                with graph.scope(str(block)):
                    stride = first_stride if repetition == 0 else 1
                    x = _inverted_residual(graph, x, channels, expansion, stride)
        with graph.scope(str(block + 1)):
            x = _conv_bn_relu6(graph, x, 1280, 1)
    x = flatten(graph, global_average_pool(graph, x, name="avgpool"))
    with graph.scope("classifier"):
        logits = linear(graph, x, 1000, name="1")
    return graph.model({"logits": logits})


def _inverted_residual(
    graph: GraphBuilder, x: Value, channels: int, expansion: int, stride: int
) -> Value:
    hidden = x.shape[1] * expansion
    y = x
    gain = RESIDUAL_GAIN if x.shape[1] == channels and stride == 1 else 1.0
    with graph.scope("conv"):
        position = 0
        if expansion != 1:
            with graph.scope("0"):
                y = _conv_bn_relu6(graph, y, hidden, 1)
            position = 1
        with graph.scope(str(position)):
            y = _conv_bn_relu6(graph, y, hidden, 3, stride=stride, groups=hidden)
        y = conv(graph, y, channels, 1, name=str(position + 1))
        y = batch_norm(graph, y, gain=gain, name=str(position + 2))
    return add(graph, x, y) if x.shape == y.shape else y


def _conv_bn_relu6(
    graph: GraphBuilder, x: Value, channels: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> Value:
    x = conv(graph, x, channels, kernel, stride=stride, groups=groups, name="0")
    return relu6(graph, batch_norm(graph, x, name="1"), name="2")
