"""The multi-layer perceptron of the MNIST tutorials: 784 → 512 → 512 → 10."""

from __future__ import annotations

import onnx

from hone.models.builder import GraphBuilder
from hone.models.layers import linear, relu


def mlp(seed: int) -> onnx.ModelProto:
    """Build the perceptron, 669 706 parameters: ``x`` [1, 784] → ``logits`` [1, 10]."""
    graph = GraphBuilder("mlp", seed)
    x = graph.input("x", (1, 784))
    for name, features in (("fc1", 512), ("fc2", 512)):
        x = relu(graph, linear(graph, x, features, name=name))
    return graph.model({"logits": linear(graph, x, 10, name="fc3")})
