"""EfficientNet-B0 (Tan and Le, "EfficientNet", ICML 2019), exported with folded normalization."""

from __future__ import annotations

import onnx

from hone.models.builder import GraphBuilder, Value
from hone.models.layers import (
    RESIDUAL_GAIN,
    add,
    conv,
    flatten,
    global_average_pool,
    image_input,
    linear,
)

# Expansion factor, output channels, repetitions, first stride, kernel: table 1 of the paper.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
# The gate's bottleneck is a quarter of the block's input channels.
_SQUEEZE = 4
# Gains that keep the variance (He's holds behind a rectifier, whose mean square is 1/2):
# x sigmoid(x) of a normal x has the mean square 0.356, and nothing is rectified before `expand`.
_SILU_GAIN = (0.5 / 0.356) ** 0.5
_LINEAR_GAIN = 0.5**0.5
# A gate without training is about sigmoid(0); its small inputs keep it there.
_GATE_GAIN = 0.25
_GATED_GAIN = 2 * _SILU_GAIN * _LINEAR_GAIN
# Spreads what the pool makes of images of noise, which is nearly the same for all of them.
_HEAD_GAIN = 10.0


def efficientnet_b0(seed: int) -> onnx.ModelProto:
    """Build EfficientNet-B0, 5.3 M parameters: ``image`` [1, 3, 224, 224], ``logits`` [1, 1000]."""
    graph = GraphBuilder("efficientnet-b0", seed)
    x = _silu(graph, conv(graph, image_input(graph), 32, 3, stride=2, bias=True, name="stem"))
    block = 0
    for expansion, channels, repetitions, first_stride, kernel in _STAGES:
        for repetition in range(repetitions):
            with graph.scope("blocks", str(block)):
                stride = first_stride if repetition == 0 else 1
                x = _inverted_residual(graph, x, channels, expansion, stride, kernel)
            block += 1
    x = _silu(graph, conv(graph, x, 1280, 1, bias=True, gain=_HEAD_GAIN, name="head"))
    x = flatten(graph, global_average_pool(graph, x, name="avgpool"))
    return graph.model({"logits": linear(graph, x, 1000, name="classifier")})


def _inverted_residual(
    graph: GraphBuilder, x: Value, channels: int, expansion: int, stride: int, kernel: int
) -> Value:
    hidden = x.shape[1] * expansion
    y = x
    if expansion != 1:
        y = conv(graph, y, hidden, 1, bias=True, gain=_LINEAR_GAIN, name="expand")
        y = _silu(graph, y)
    y = conv(
        graph,
        y,
        hidden,
        kernel,
        stride=stride,
        groups=hidden,
        bias=True,
        gain=_SILU_GAIN,
        name="depthwise",
    )
    y = _silu(graph, y)
    with graph.scope("gate"):
        gate = global_average_pool(graph, y, name="squeeze")
        gate = _silu(graph, conv(graph, gate, x.shape[1] // _SQUEEZE, 1, bias=True, name="reduce"))
        gate = conv(graph, gate, hidden, 1, bias=True, gain=_GATE_GAIN, name="expand")
        gate = graph.node("Sigmoid", [gate], gate.shape)
        y = graph.node("Mul", [y, gate], y.shape)
    gain = _GATED_GAIN * (RESIDUAL_GAIN if x.shape[1] == channels and stride == 1 else 1.0)
    y = conv(graph, y, channels, 1, bias=True, gain=gain, name="project")
    return add(graph, x, y) if x.shape == y.shape else y


def _silu(graph: GraphBuilder, x: Value) -> Value:
    """``x · sigmoid(x)`` in the two nodes of an export."""
    return graph.node("Mul", [x, graph.node("Sigmoid", [x], x.shape)], x.shape)
