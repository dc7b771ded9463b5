"""ResNet-18 and ResNet-50 (He et al., "Deep Residual Learning for Image Recognition", 2015)."""

from __future__ import annotations

from collections.abc import Sequence

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
    max_pool,
    relu,
)


def resnet18(seed: int) -> onnx.ModelProto:
    """Build ResNet-18, 11.69 M parameters: ``image`` [1, 3, 224, 224] → ``logits`` [1, 1000]."""
    return _resnet("resnet18", seed, blocks=(2, 2, 2, 2), bottleneck=False)


def resnet50(seed: int) -> onnx.ModelProto:
    """Build ResNet-50, 25.56 M parameters: ``image`` [1, 3, 224, 224] → ``logits`` [1, 1000].

    The stride is on the 3 × 3 convolution of a block, as in torchvision ("v1.5").
    """
    return _resnet("resnet50", seed, blocks=(3, 4, 6, 3), bottleneck=True)


def _resnet(name: str, seed: int, *, blocks: Sequence[int], bottleneck: bool) -> onnx.ModelProto:
    graph = GraphBuilder(name, seed)
    x = image_input(graph)
    x = batch_norm(graph, conv(graph, x, 64, 7, stride=2, name="conv1"), name="bn1")
    x = max_pool(graph, relu(graph, x), 3, stride=2, padding=1, name="maxpool")
    for stage, count in enumerate(blocks):
        for index in range(count):
            with graph.scope(f"layer{stage + 1}", str(index)):
                stride = 2 if stage > 0 and index == 0 else 1
                x = _block(graph, x, 64 << stage, stride, bottleneck)
    x = flatten(graph, global_average_pool(graph, x, name="avgpool"))
    return graph.model({"logits": linear(graph, x, 1000, name="fc")})


def _block(graph: GraphBuilder, x: Value, width: int, stride: int, bottleneck: bool) -> Value:
    if bottleneck:
        layers = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
    else:
        layers = [(width, 3, stride), (width, 3, 1)]
    y = x
    for number, (channels, kernel, step) in enumerate(layers, start=1):
        if number > 1:
            y = relu(graph, y)
        y = conv(graph, y, channels, kernel, stride=step, name=f"conv{number}")
        gain = RESIDUAL_GAIN if number == len(layers) else 1.0
        y = batch_norm(graph, y, gain=gain, name=f"bn{number}")
    if x.shape != y.shape:
        with graph.scope("downsample"):
            x = conv(graph, x, y.shape[1], 1, stride=stride, name="0")
            x = batch_norm(graph, x, name="1")
    return relu(graph, add(graph, y, x))
