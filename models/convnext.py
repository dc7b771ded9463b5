"""ConvNeXt (Liu et al., "A ConvNet for the 2020s", CVPR 2022) in the size that timm calls atto."""

from __future__ import annotations

import onnx

from hone.models.builder import GraphBuilder, Value
from hone.models.layers import (
    add,
    conv,
    flatten,
    gelu,
    global_average_pool,
    image_input,
    layer_norm,
    linear,
)

_WIDTHS = (40, 80, 160, 320)
_DEPTHS = (2, 2, 6, 2)
_KERNEL = 7
_EXPANSION = 4
_EPSILON = 1e-6


def convnext_atto(seed: int) -> onnx.ModelProto:
    """Build ConvNeXt-atto, 3.7 M parameters: ``image`` [1, 3, 224, 224] → ``logits`` [1, 1000]."""
    graph = GraphBuilder("convnext-atto", seed)
    x = conv(graph, image_input(graph), _WIDTHS[0], 4, stride=4, padding=0, bias=True, name="stem")
    x = _to_channels_first(graph, _normalize(graph, x, "stem_norm"))
    for stage, (width, depth) in enumerate(zip(_WIDTHS, _DEPTHS, strict=True)):
        with graph.scope("stages", str(stage)):
            if stage:
                x = _to_channels_first(graph, _normalize(graph, x, "norm"))
                x = conv(graph, x, width, 2, stride=2, padding=0, bias=True, name="downsample")
            for block in range(depth):
                with graph.scope(str(block)):
                    x = _block(graph, x)
    x = flatten(graph, global_average_pool(graph, x, name="avgpool"))
    return graph.model({"logits": linear(graph, x, 1000, name="head")})


def _block(graph: GraphBuilder, x: Value) -> Value:
    width = x.shape[1]
    y = conv(graph, x, width, _KERNEL, groups=width, bias=True, name="depthwise")
    y = _normalize(graph, y, "norm")
    y = gelu(graph, linear(graph, y, _EXPANSION * width, name="expand"), name="gelu")
    return add(graph, x, _to_channels_first(graph, linear(graph, y, width, name="project")))


def _normalize(graph: GraphBuilder, x: Value, name: str) -> Value:
    """[N, C, H, W] → layer normalization over channels, [N, H, W, C]."""
    batch, channels, height, width = x.shape
    swapped = graph.node("Transpose", [x], (batch, height, width, channels), perm=[0, 2, 3, 1])
    return layer_norm(graph, swapped, name=name, epsilon=_EPSILON)


def _to_channels_first(graph: GraphBuilder, x: Value) -> Value:
    batch, height, width, channels = x.shape
    return graph.node("Transpose", [x], (batch, channels, height, width), perm=[0, 3, 1, 2])
