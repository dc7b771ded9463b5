"""The convolutional network of the demo, for images of 8 × 8 pixels."""

from __future__ import annotations

import onnx

from hone.models.builder import GraphBuilder, Value
from hone.models.layers import batch_norm, conv, flatten, linear, max_pool, relu
from hone.models.moments import Moments

CHANNELS = (32, 64, 128)


def digits_cnn(seed: int) -> onnx.ModelProto:
    """Build the network, 98 026 parameters: ``image`` [1, 1, 8, 8] in [0, 1] → ``logits`` [1, 10].

    Three 3 × 3 convolutions, each with batch normalization and ReLU, max pooling after the second
    and the third, and a linear classifier.
    """
    graph = GraphBuilder("digits-cnn", seed)
    # Pixels in [0, 1]: moments of the uniform distribution.
    x = graph.input("image", (1, 1, 8, 8), moments=Moments.of(1, 0.5, 1.0 / 12.0))
    x = _convolution(graph, x, 1)
    x = max_pool(graph, _convolution(graph, x, 2), 2, stride=2, name="pool2")
    x = max_pool(graph, _convolution(graph, x, 3), 2, stride=2, name="pool3")
    return graph.model({"logits": linear(graph, flatten(graph, x), 10, name="fc")})


def _convolution(graph: GraphBuilder, x: Value, number: int) -> Value:
    x = conv(graph, x, CHANNELS[number - 1], 3, name=f"conv{number}")
    return relu(graph, batch_norm(graph, x, name=f"bn{number}"), name=f"relu{number}")
