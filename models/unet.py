"""U-Net (Ronneberger et al., MICCAI 2015), half as wide, with padded convolutions."""

from __future__ import annotations

import onnx

from hone.models.builder import GraphBuilder, Value
from hone.models.layers import conv, max_pool, relu

_WIDTHS = (32, 64, 128)
_BOTTOM = 256
_CLASSES = 2
_SIZE = 160


def unet(seed: int) -> onnx.ModelProto:
    """Build a U-Net, 1.9 M parameters: ``image`` [1, 3, 160, 160] → ``mask`` [1, 2, 160, 160]."""
    graph = GraphBuilder("unet", seed)
    x = graph.input("image", (1, 3, _SIZE, _SIZE))
    skips = []
    for level, width in enumerate(_WIDTHS):
        with graph.scope("down", str(level)):
            x = _double_conv(graph, x, width)
            skips.append(x)
            x = max_pool(graph, x, 2, stride=2, name="pool")
    with graph.scope("bottom"):
        x = _double_conv(graph, x, _BOTTOM)
    for level, skip in reversed(list(enumerate(skips))):
        with graph.scope("up", str(level)):
            x = _double_conv(graph, _join(graph, skip, _up(graph, x, skip)), skip.shape[1])
    return graph.model({"mask": conv(graph, x, _CLASSES, 1, bias=True, name="head")})


def _double_conv(graph: GraphBuilder, x: Value, width: int) -> Value:
    for name in ("first", "second"):
        with graph.scope(name):
            x = relu(graph, conv(graph, x, width, 3, bias=True, name="conv"))
    return x


def _up(graph: GraphBuilder, x: Value, skip: Value) -> Value:
    """Transposed convolution that doubles the image and takes the channels of `skip`."""
    channels = x.shape[1]
    weight = graph.parameter("up.weight", graph.he((channels, skip.shape[1], 2, 2), channels))
    return graph.node(
        "ConvTranspose",
        [x, weight],
        skip.shape,
        dilations=[1, 1],
        group=1,
        kernel_shape=[2, 2],
        pads=[0, 0, 0, 0],
        strides=[2, 2],
    )


def _join(graph: GraphBuilder, skip: Value, x: Value) -> Value:
    batch, channels, height, width = skip.shape
    return graph.node("Concat", [skip, x], (batch, 2 * channels, height, width), axis=1)
