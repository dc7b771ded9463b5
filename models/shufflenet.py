"""ShuffleNetV2 1.0x (Ma et al., "ShuffleNet V2", ECCV 2018), exported with folded normalization."""

from __future__ import annotations

import numpy as np
import onnx

from hone.models.builder import GraphBuilder, Value
from hone.models.layers import (
    conv,
    flatten,
    global_average_pool,
    image_input,
    linear,
    max_pool,
    relu,
)

# Channels and units of each stage: table 5 of the paper.
_STAGES = ((116, 4), (232, 8), (464, 4))
# No rectifier halves the mean square before the convolution that follows a depthwise one.
_LINEAR = 0.5**0.5
# Spreads what the pool makes of images of noise, which is nearly the same for all of them.
_LAST = 4.0


def shufflenetv2(seed: int) -> onnx.ModelProto:
    """Build ShuffleNetV2, 2.3 M parameters: ``image`` [1, 3, 224, 224] → ``logits`` [1, 1000]."""
    graph = GraphBuilder("shufflenetv2", seed)
    with graph.scope("stem"):
        x = relu(graph, conv(graph, image_input(graph), 24, 3, stride=2, bias=True, name="conv"))
        x = max_pool(graph, x, 3, stride=2, padding=1, name="pool")
    for stage, (channels, units) in enumerate(_STAGES):
        for unit in range(units):
            with graph.scope("stage", str(stage), str(unit)):
                x = _unit(graph, x, channels, first=unit == 0)
    with graph.scope("last"):
        x = relu(graph, conv(graph, x, 1024, 1, bias=True, gain=_LAST, name="conv"))
    x = flatten(graph, global_average_pool(graph, x, name="avgpool"))
    return graph.model({"logits": linear(graph, x, 1000, name="classifier")})


def _unit(graph: GraphBuilder, x: Value, channels: int, *, first: bool) -> Value:
    half = channels // 2
    if first:
        left = _depthwise(graph, x, 2, name="left.depthwise")
        left = _pointwise(graph, left, half, name="left.pointwise")
        right = x
    else:
        batch, _, height, width = x.shape
        sizes = graph.parameter("sizes", np.array([half, half], np.int64))
        left, right = graph.nodes("Split", [x, sizes], [(batch, half, height, width)] * 2, axis=1)
    right = _pointwise(graph, right, half, name="right.expand")
    right = _depthwise(graph, right, 2 if first else 1, name="right.depthwise")
    right = _pointwise(graph, right, half, name="right.project")
    return _shuffle(graph, left, right)


def _pointwise(graph: GraphBuilder, x: Value, channels: int, *, name: str) -> Value:
    with graph.scope(name):
        return relu(graph, conv(graph, x, channels, 1, bias=True, name="conv"))


def _depthwise(graph: GraphBuilder, x: Value, stride: int, *, name: str) -> Value:
    channels = x.shape[1]
    return conv(
        graph, x, channels, 3, stride=stride, groups=channels, bias=True, gain=_LINEAR, name=name
    )


def _shuffle(graph: GraphBuilder, left: Value, right: Value) -> Value:
    """Concatenate both halves and take their channels in turn."""
    batch, half, height, width = left.shape
    joined = (batch, 2 * half, height, width)
    split = (batch, 2, half, height, width)
    x = graph.node("Concat", [left, right], joined, axis=1)
    x = graph.node("Reshape", [x, graph.parameter("halves", np.array(split, np.int64))], split)
    swapped = (batch, half, 2, height, width)
    x = graph.node("Transpose", [x], swapped, perm=[0, 2, 1, 3, 4])
    return graph.node("Reshape", [x, graph.parameter("joined", np.array(joined, np.int64))], joined)
