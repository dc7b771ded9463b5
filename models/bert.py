"""The encoder of BERT-mini (Turc et al., "Well-Read Students Learn Better", 2019)."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from hone.models.builder import GraphBuilder, Value
from hone.models.layers import add, attention, gelu, layer_norm, linear, split_heads

_LAYERS, _WIDTH, _HEADS, _FEED_FORWARD = 4, 256, 4, 1024
_TOKENS, _VOCABULARY = 128, 8192
_EPSILON = 1e-12
_EMBEDDING_STD = 0.02
_MASKED_SCORE = -10000.0


def bert_mini(seed: int) -> onnx.ModelProto:
    """Build the encoder, 5.29 M parameters, of which 3.16 M are in its layers.

    ``input_ids`` int64 [1, 128] below 8192 (the published vocabulary of 30 522 would only make the
    file larger) and ``attention_mask`` int64 [1, 128] (0 hides a token) → ``last_hidden_state``
    [1, 128, 256]. There is one segment, so its embedding is part of the positions'.
    """
    graph = GraphBuilder("bert-mini", seed)
    ids = graph.input("input_ids", (1, _TOKENS), dtype=TensorProto.INT64)
    tokens = graph.input("attention_mask", (1, _TOKENS), dtype=TensorProto.INT64)
    mask = _mask(graph, tokens)
    x = _embeddings(graph, ids)
    for index in range(_LAYERS):
        with graph.scope("encoder", "layer", str(index)):
            x = _layer(graph, x, mask)
    return graph.model({"last_hidden_state": x})


def _mask(graph: GraphBuilder, tokens: Value) -> Value:
    """Make what is added to the scores: 0 for a token, −10000 for none, [1, 1, 1, T]."""
    with graph.scope("mask"):
        axes = graph.parameter("axes", np.array([1, 2], np.int64))
        shown = graph.parameter("shown", np.array(0.0, np.float32))
        hidden = graph.parameter("hidden", np.array(_MASKED_SCORE, np.float32))
        shape = (1, 1, 1, _TOKENS)
        rows = graph.node("Unsqueeze", [tokens, axes], shape, dtype=TensorProto.INT64)
        is_token = graph.node(
            "Cast", [rows], shape, dtype=TensorProto.BOOL, to=int(TensorProto.BOOL)
        )
        return graph.node("Where", [is_token, shown, hidden], shape)


def _embeddings(graph: GraphBuilder, ids: Value) -> Value:
    with graph.scope("embeddings"):
        with graph.scope("word_embeddings"):
            table = graph.parameter("weight", graph.normal((_VOCABULARY, _WIDTH), _EMBEDDING_STD))
            words = graph.node("Gather", [table, ids], (1, _TOKENS, _WIDTH), axis=0)
        with graph.scope("position_embeddings"):
            positions = graph.normal((1, _TOKENS, _WIDTH), _EMBEDDING_STD)
            table = graph.parameter("weight", positions)
            x = graph.node("Add", [words, table], words.shape)
        return layer_norm(graph, x, name="LayerNorm", epsilon=_EPSILON)


def _layer(graph: GraphBuilder, x: Value, mask: Value) -> Value:
    with graph.scope("attention"):
        with graph.scope("self"):
            parts = []
            for name in ("query", "key", "value"):
                projected = linear(graph, x, _WIDTH, name=name)
                with graph.scope(name):
                    parts.append(split_heads(graph, projected, _HEADS))
            context = attention(graph, *parts, mask=mask)
        with graph.scope("output"):
            y = add(graph, linear(graph, context, _WIDTH, name="dense"), x)
            x = layer_norm(graph, y, name="LayerNorm", epsilon=_EPSILON)
    with graph.scope("intermediate"):
        y = linear(graph, x, _FEED_FORWARD, name="dense")
        y = gelu(graph, y, name="intermediate_act_fn")
    with graph.scope("output"):
        y = add(graph, linear(graph, y, _WIDTH, name="dense"), x)
        return layer_norm(graph, y, name="LayerNorm", epsilon=_EPSILON)
