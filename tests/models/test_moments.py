from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from onnx import numpy_helper

from hone.models.builder import GraphBuilder
from hone.models.layers import batch_norm, conv, linear
from hone.models.moments import Moments

SAMPLES = 200_000
# Four standard errors of a mean and of a variance (Gaussian: √(2 / n)) of unit-variance samples.
TOLERANCE = 4 * np.sqrt(2.0 / SAMPLES)


def gaussian(moments: Moments, rng: np.random.Generator, taps: int = 1) -> np.ndarray:
    draw = rng.standard_normal((taps, SAMPLES, len(moments.mean)))
    return moments.mean + np.sqrt(moments.variance) * draw


def uneven() -> Moments:
    return Moments(mean=np.array([0.0, -0.7, 1.3]), variance=np.array([1.0, 0.5, 2.0]))


def assert_moments_of(moments: Moments, samples: np.ndarray) -> None:
    scale = samples.std(axis=0).max()
    np.testing.assert_allclose(moments.mean, samples.mean(axis=0), atol=TOLERANCE * scale)
    # Rectified values have heavier tails than a Gaussian: twice its standard error.
    np.testing.assert_allclose(moments.variance, samples.var(axis=0), atol=2 * TOLERANCE * scale**2)


def test_clip_gives_the_rectified_normal() -> None:
    after = Moments.of(1).clip()
    np.testing.assert_allclose([after.mean[0], after.variance[0]], [0.3989, 0.3408], atol=5e-5)


@pytest.mark.parametrize("high", [np.inf, 6.0, 1.5])
def test_clip_agrees_with_samples(high: float) -> None:
    samples = gaussian(uneven(), np.random.default_rng(0))[0]
    assert_moments_of(uneven().clip(high), np.clip(samples, 0.0, high))


def test_max_pool_gives_the_tabulated_largest_of_four() -> None:
    after = Moments.of(1).max_pool(4)
    np.testing.assert_allclose([after.mean[0], after.variance[0]], [1.02938, 0.49172], atol=1e-3)


@pytest.mark.parametrize("rectify", [False, True])
def test_max_pool_agrees_with_samples(rectify: bool) -> None:
    samples = gaussian(uneven(), np.random.default_rng(1), taps=9)
    moments = uneven()
    if rectify:
        samples, moments = np.maximum(samples, 0.0), moments.clip()
    assert_moments_of(moments.max_pool(9), samples.max(axis=0))


def test_add_and_average_agree_with_samples() -> None:
    rng = np.random.default_rng(2)
    first, second = gaussian(uneven(), rng, taps=2)
    assert_moments_of(uneven().add(uneven()), first + second)
    assert_moments_of(uneven().average(2), (first + second) / 2)


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 2)])
def test_running_statistics_agree_with_samples_when_the_image_is_padded(
    groups: int, stride: int
) -> None:
    before = Moments(mean=np.array([0.5, -1.0, 0.2, 2.0]), variance=np.array([1.0, 0.3, 2.0, 0.7]))
    graph = GraphBuilder("padded", 0)
    image = graph.input("image", (1, 4, 5, 6), moments=before)
    result = conv(graph, image, 6, 3, stride=stride, groups=groups, name="conv")
    model = graph.model({"y": batch_norm(graph, result, name="bn")})
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}

    count = 10_000
    noise = np.random.default_rng(3).standard_normal((count, 4, 5, 6))
    images = before.mean[:, None, None] + np.sqrt(before.variance)[:, None, None] * noise
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
    windows = windows.reshape(count, groups, 4 // groups, *windows.shape[2:])
    filters = values["conv.weight"].reshape(groups, 6 // groups, 4 // groups, 3, 3)
    outputs = np.einsum("ngchwrs,gmcrs->ngmhw", windows, filters, optimize=True)
    outputs = outputs.reshape(count, 6, *outputs.shape[3:])
    assert outputs.shape[1:] == result.shape[1:]

    spread = outputs.var(axis=(0, 2, 3))
    # Four standard errors; neighbouring positions are correlated, so only the images count.
    error = 4 * np.sqrt(spread / count)
    assert (np.abs(values["bn.running_mean"] - outputs.mean(axis=(0, 2, 3))) < error).all()
    # Taps are taken as independent, while those beyond one border are missing together: with
    # means as large as the spread the variance is right to a factor, not to a digit.
    ratio = values["bn.running_var"] / spread
    assert (ratio > 0.4).all()
    assert (ratio < 1.6).all()


def test_batch_norm_is_refused_when_the_moments_are_unknown() -> None:
    graph = GraphBuilder("unknown", 0)
    image = graph.input("image", (1, 4, 5, 6))
    with pytest.raises(ValueError, match="'bn' needs the moments of 'image'"):
        batch_norm(graph, image, name="bn")


def test_parameter_is_refused_when_the_name_is_taken() -> None:
    graph = GraphBuilder("twice", 0)
    x = linear(graph, graph.input("x", (1, 3)), 3, name="fc")
    with pytest.raises(ValueError, match=r"parameter 'fc.weight' exists already"):
        linear(graph, x, 3, name="fc")
