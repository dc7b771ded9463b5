"""ViT-tiny: the vision transformer (Dosovitskiy et al., 2020) in DeiT's smallest size (2020)."""

from __future__ import annotations

import numpy as np
import onnx

from hone.models.builder import GraphBuilder, Value
from hone.models.layers import add, attention, conv, gelu, layer_norm, linear

_IMAGE, _PATCH, _WIDTH, _LAYERS, _HEADS = 224, 16, 192, 12, 3
_EPSILON = 1e-6
_EMBEDDING_STD = 0.02


def vit_tiny(seed: int) -> onnx.ModelProto:
    """Build ViT-tiny/16, 5.72 M parameters: ``image`` [1, 3, 224, 224] → ``logits`` [1, 1000]."""
    graph = GraphBuilder("vit-tiny", seed)
    x = _embed(graph, graph.input("image", (1, 3, _IMAGE, _IMAGE)))
    for index in range(_LAYERS):
        with graph.scope("blocks", str(index)):
            y = layer_norm(graph, x, name="norm1", epsilon=_EPSILON)
            x = add(graph, x, _attention(graph, y))
            y = layer_norm(graph, x, name="norm2", epsilon=_EPSILON)
            x = add(graph, x, _feed_forward(graph, y))
    x = layer_norm(graph, x, name="norm", epsilon=_EPSILON)
    first = graph.parameter("class_index", np.array(0, np.int64))
    token = graph.node("Gather", [x, first], (1, _WIDTH), axis=1)
    return graph.model({"logits": linear(graph, token, 1000, name="head")})


def _embed(graph: GraphBuilder, image: Value) -> Value:
    """Patches as tokens behind a class token, plus positions, [1, 197, 192]."""
    patches = (_IMAGE // _PATCH) ** 2
    with graph.scope("patch_embed"):
        x = conv(graph, image, _WIDTH, _PATCH, stride=_PATCH, padding=0, bias=True, name="proj")
        target = graph.parameter("tokens_shape", np.array([0, _WIDTH, -1], np.int64))
        x = graph.node("Reshape", [x, target], (1, _WIDTH, patches))
        x = graph.node("Transpose", [x], (1, patches, _WIDTH), perm=[0, 2, 1])
    token = graph.parameter("cls_token", graph.normal((1, 1, _WIDTH), _EMBEDDING_STD))
    positions = graph.parameter("pos_embed", graph.normal((1, patches + 1, _WIDTH), _EMBEDDING_STD))
    x = graph.node("Concat", [token, x], (1, patches + 1, _WIDTH), axis=1)
    return graph.node("Add", [x, positions], x.shape)


def _attention(graph: GraphBuilder, x: Value) -> Value:
    """Self-attention with one projection for query, key and value."""
    batch, tokens, width = x.shape
    depth = width // _HEADS
    with graph.scope("attn"):
        joint = linear(graph, x, 3 * width, name="qkv")
        target = graph.parameter("qkv_shape", np.array([0, 0, 3, _HEADS, depth], np.int64))
        axes = graph.parameter("axes", np.array([0], np.int64))
        joint = graph.node("Reshape", [joint, target], (batch, tokens, 3, _HEADS, depth))
        joint = graph.node(
            "Transpose", [joint], (3, batch, _HEADS, tokens, depth), perm=[2, 0, 3, 1, 4]
        )
        parts = graph.nodes("Split", [joint], [(1, *joint.shape[1:])] * 3, axis=0)
        query, key, value = (graph.node("Squeeze", [part, axes], part.shape[1:]) for part in parts)
        return linear(graph, attention(graph, query, key, value), width, name="proj")


def _feed_forward(graph: GraphBuilder, x: Value) -> Value:
    with graph.scope("mlp"):
        hidden = gelu(graph, linear(graph, x, 4 * x.shape[-1], name="fc1"), name="act")
        return linear(graph, hidden, x.shape[-1], name="fc2")
