"""Layers on a `GraphBuilder`: each appends the standard ONNX nodes that a PyTorch export has."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hone.models.builder import GraphBuilder, Value
from hone.models.moments import Moments

_BATCH_NORM_EPSILON = 1e-5
# Scales and shifts that differ from channel to channel, so that a fold that mixes up channels
# shows, but stay near 1 and 0, as trained ones do.
_SCALE_RANGE = (0.5, 1.5)
_SHIFT_STD = 0.2
# Training makes residual branches small beside the identity; it also keeps deep sums in scale.
RESIDUAL_GAIN = 0.5
_BIAS_STD = 0.1
# Share of its mean that is taken out of a filter. The expected moments are a little off in the
# same direction for all channels, which a centered filter cancels; the rest of the mean stays, so
# that a forgotten zero point correction (activation zero point × sum of the filter) shows.
_CENTERING = 0.8


def image_input(graph: GraphBuilder) -> Value:
    """Declare the input ``image`` [1, 3, 224, 224], normalized: unit variance, means near 0.

    The means that the statistics expect are not exactly 0, as no data set's are; else the first
    running means all were.
    """
    moments = Moments(mean=np.array([0.05, -0.03, 0.02]), variance=np.ones(3))
    return graph.input("image", (1, 3, 224, 224), moments=moments)


def _positions(
    size: int, kernel: int, stride: int, padding: int
) -> tuple[int, NDArray[np.float64]]:
    """Output size along an axis, and the share of it for which each tap is inside the image."""
    out = (size + 2 * padding - kernel) // stride + 1
    index = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] - padding
    return out, ((index >= 0) & (index < size)).mean(axis=0)


def conv(
    graph: GraphBuilder,
    x: Value,
    channels: int,
    kernel: int,
    *,
    name: str,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    padding: int | None = None,
    gain: float = 1.0,
) -> Value:
    """Square 2-D convolution, [N, C, H, W] → [N, channels, H', W'].

    Parameters
    ----------
    padding : int, optional
        Zeros on each side; ``kernel // 2`` unless given.
    gain : float
        Factor on He's standard deviation, which keeps the variance behind a rectifier only.
    """
    batch, in_channels, height, width = x.shape
    padding = kernel // 2 if padding is None else padding
    out_height, inside_height = _positions(height, kernel, stride, padding)
    out_width, inside_width = _positions(width, kernel, stride, padding)
    fan_in = in_channels // groups * kernel * kernel
    weight = graph.he((channels, in_channels // groups, kernel, kernel), fan_in)
    weight *= np.float32(gain)
    if groups == 1:
        weight -= np.float32(_CENTERING) * weight.mean(axis=(1, 2, 3), keepdims=True)
    moments = None
    if x.moments is not None:
        moments = x.moments.conv(weight, groups, np.outer(inside_height, inside_width))
    with graph.scope(name):
        inputs: list[Value | str] = [x, graph.parameter("weight", weight)]
        if bias:
            shift = graph.normal((channels,), _BIAS_STD)
            inputs.append(graph.parameter("bias", shift))
            if moments is not None:
                moments = Moments(mean=moments.mean + shift, variance=moments.variance)
        return graph.node(
            "Conv",
            inputs,
            (batch, channels, out_height, out_width),
            moments=moments,
            dilations=[1, 1],
            group=groups,
            kernel_shape=[kernel, kernel],
            pads=[padding] * 4,
            strides=[stride, stride],
        )


def batch_norm(graph: GraphBuilder, x: Value, *, name: str, gain: float = 1.0) -> Value:
    """Batch normalization with the statistics that `x` is expected to have.

    Parameters
    ----------
    gain : float
        Factor on the scales. The last normalization of a residual branch takes `RESIDUAL_GAIN`.

    Raises
    ------
    ValueError
        If the moments of `x` are not known.
    """
    if x.moments is None:
        raise ValueError(f"batch normalization {name!r} needs the moments of {x.name!r}")
    channels = x.shape[1]
    scale = graph.uniform((channels,), *_SCALE_RANGE) * np.float32(gain)
    shift = graph.normal((channels,), _SHIFT_STD)
    mean = x.moments.mean.astype(np.float32)
    variance = x.moments.variance.astype(np.float32)
    normalized = variance.astype(np.float64) / (variance.astype(np.float64) + _BATCH_NORM_EPSILON)
    moments = Moments(
        mean=shift.astype(np.float64), variance=scale.astype(np.float64) ** 2 * normalized
    )
    with graph.scope(name):
        return graph.node(
            "BatchNormalization",
            [
                x,
                graph.parameter("weight", scale),
                graph.parameter("bias", shift),
                graph.parameter("running_mean", mean),
                graph.parameter("running_var", variance),
            ],
            x.shape,
            moments=moments,
            epsilon=_BATCH_NORM_EPSILON,
            momentum=0.9,
        )


def relu(graph: GraphBuilder, x: Value, *, name: str = "relu") -> Value:
    """Rectifier, max(x, 0)."""
    with graph.scope(name):
        moments = x.moments.clip() if x.moments is not None else None
        return graph.node("Relu", [x], x.shape, moments=moments)


def relu6(graph: GraphBuilder, x: Value, *, name: str) -> Value:
    """Rectifier with an upper end, min(max(x, 0), 6), as a Clip with constant ends."""
    with graph.scope(name):
        low = graph.parameter("min", np.array(0.0, np.float32))
        high = graph.parameter("max", np.array(6.0, np.float32))
        moments = x.moments.clip(6.0) if x.moments is not None else None
        return graph.node("Clip", [x, low, high], x.shape, moments=moments)


def add(graph: GraphBuilder, x: Value, y: Value) -> Value:
    """Residual sum of two activations of one shape."""
    moments = None
    if x.moments is not None and y.moments is not None:
        moments = x.moments.add(y.moments)
    return graph.node("Add", [x, y], x.shape, moments=moments)


def max_pool(
    graph: GraphBuilder, x: Value, kernel: int, *, stride: int, padding: int = 0, name: str
) -> Value:
    """Square 2-D max pooling with a kernel of 2 or 3."""
    batch, channels, height, width = x.shape
    out_height, _ = _positions(height, kernel, stride, padding)
    out_width, _ = _positions(width, kernel, stride, padding)
    with graph.scope(name):
        return graph.node(
            "MaxPool",
            [x],
            (batch, channels, out_height, out_width),
            moments=x.moments.max_pool(kernel * kernel) if x.moments is not None else None,
            ceil_mode=0,
            kernel_shape=[kernel, kernel],
            pads=[padding] * 4,
            strides=[stride, stride],
        )


def global_average_pool(graph: GraphBuilder, x: Value, *, name: str) -> Value:
    """Mean over the image, [N, C, H, W] → [N, C, 1, 1]."""
    batch, channels, height, width = x.shape
    with graph.scope(name):
        return graph.node(
            "GlobalAveragePool",
            [x],
            (batch, channels, 1, 1),
            moments=x.moments.average(height * width) if x.moments is not None else None,
        )


def flatten(graph: GraphBuilder, x: Value) -> Value:
    """[N, …] → [N, K]."""
    return graph.node("Flatten", [x], (x.shape[0], math.prod(x.shape[1:])), axis=1)


def linear(graph: GraphBuilder, x: Value, features: int, *, name: str) -> Value:
    """Fully connected layer with bias on the last axis, [..., K] → [..., features].

    A matrix gives one Gemm with the weight as [features, K]; more dimensions give MatMul and Add
    with the weight as [K, features].
    """
    fan_in = x.shape[-1]
    with graph.scope(name):
        if len(x.shape) == 2:
            weight = graph.parameter("weight", graph.he((features, fan_in), fan_in))
            bias = graph.parameter("bias", graph.normal((features,), _BIAS_STD))
            shape = (x.shape[0], features)
            return graph.node("Gemm", [x, weight, bias], shape, alpha=1.0, beta=1.0, transB=1)
        weight = graph.parameter("weight", graph.he((fan_in, features), fan_in))
        bias = graph.parameter("bias", graph.normal((features,), _BIAS_STD))
        product = graph.node("MatMul", [x, weight], (*x.shape[:-1], features))
        return graph.node("Add", [product, bias], product.shape)


def layer_norm(graph: GraphBuilder, x: Value, *, name: str, epsilon: float) -> Value:
    """Layer normalization over the last axis."""
    features = x.shape[-1]
    with graph.scope(name):
        scale = graph.parameter("weight", graph.uniform((features,), *_SCALE_RANGE))
        shift = graph.parameter("bias", graph.normal((features,), _SHIFT_STD))
        return graph.node(
            "LayerNormalization", [x, scale, shift], x.shape, axis=-1, epsilon=epsilon
        )


def gelu(graph: GraphBuilder, x: Value, *, name: str) -> Value:
    """Exact GELU, x (1 + erf(x / √2)) / 2, in the five nodes of an export below opset 20."""
    with graph.scope(name):
        root = graph.parameter("root_two", np.array(math.sqrt(2.0), np.float32))
        one = graph.parameter("one", np.array(1.0, np.float32))
        half = graph.parameter("half", np.array(0.5, np.float32))
        scaled = graph.node("Div", [x, root], x.shape)
        error = graph.node("Erf", [scaled], x.shape)
        shifted = graph.node("Add", [error, one], x.shape)
        product = graph.node("Mul", [x, shifted], x.shape)
        return graph.node("Mul", [product, half], x.shape)


def split_heads(graph: GraphBuilder, x: Value, heads: int) -> Value:
    """[N, T, heads · d] → [N, heads, T, d]."""
    batch, tokens, width = x.shape
    depth = width // heads
    target = graph.parameter("heads_shape", np.array([0, 0, heads, depth], np.int64))
    split = graph.node("Reshape", [x, target], (batch, tokens, heads, depth))
    return graph.node("Transpose", [split], (batch, heads, tokens, depth), perm=[0, 2, 1, 3])


def attention(
    graph: GraphBuilder, query: Value, key: Value, value: Value, *, mask: Value | None = None
) -> Value:
    """Scaled dot-product attention, three [N, heads, T, d] → [N, T, heads · d].

    softmax(Q Kᵀ / √d + mask) V (Vaswani et al., "Attention Is All You Need", 2017).
    """
    batch, heads, tokens, depth = query.shape
    scores_shape = (batch, heads, tokens, tokens)
    root = graph.parameter("root_depth", np.array(math.sqrt(depth), np.float32))
    merged = graph.parameter("merged_shape", np.array([0, 0, heads * depth], np.int64))
    transposed = graph.node("Transpose", [key], (batch, heads, depth, tokens), perm=[0, 1, 3, 2])
    scores = graph.node("MatMul", [query, transposed], scores_shape)
    scores = graph.node("Div", [scores, root], scores_shape)
    if mask is not None:
        scores = graph.node("Add", [scores, mask], scores_shape)
    weights = graph.node("Softmax", [scores], scores_shape, axis=-1)
    context = graph.node("MatMul", [weights, value], query.shape)
    swapped = graph.node("Transpose", [context], (batch, tokens, heads, depth), perm=[0, 2, 1, 3])
    return graph.node("Reshape", [swapped, merged], (batch, tokens, heads * depth))
