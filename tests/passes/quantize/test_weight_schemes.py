from __future__ import annotations

import numpy as np
import pytest

from hone.errors import ModelError, UsageError
from hone.passes.quantize.weight_schemes import (
    Granularity,
    Scheme,
    WeightOptions,
    power_of_two_scales,
    quantize_weights,
)

GRANULARITIES = list(Granularity)


def matrix(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_integer_levels_are_off_by_at_most_half_a_scale(granularity, symmetric, bits, rng) -> None:
    weight = rng.standard_normal((7, 53)).astype(np.float32)
    options = WeightOptions(bits=bits, granularity=granularity, group_size=16, symmetric=symmetric)
    quantized = quantize_weights(weight, options)
    groups = {Granularity.TENSOR: (1, 1), Granularity.CHANNEL: (7, 1), Granularity.GROUP: (7, 4)}
    assert quantized.scale.shape == groups[granularity]
    assert (quantized.zero_point is None) == symmetric
    half = 0.5 * np.repeat(quantized.scale, quantized.group, axis=1)[:, :53]
    # An asymmetric zero point is rounded too, which may push one end out by another half step.
    bound = half if symmetric else 2 * half
    assert (np.abs(weight - quantized.real()) <= bound + 1e-6).all()
    assert quantized.levels.min() >= -(1 << (bits - 1)) + symmetric
    assert quantized.levels.max() <= (1 << (bits - 1)) - 1


def test_symmetric_four_bits_as_documented() -> None:
    quantized = quantize_weights(matrix([1.4, 0.45, -0.09]), WeightOptions(bits=4))
    np.testing.assert_allclose(quantized.scale, [[0.2]], rtol=1e-6)
    assert quantized.levels.tolist() == [[7, 2, 0]]


def test_asymmetric_four_bits_as_documented() -> None:
    quantized = quantize_weights(matrix([-0.6, 2.4, 0.45]), WeightOptions(bits=4, symmetric=False))
    np.testing.assert_allclose(quantized.scale, [[0.2]], rtol=1e-6)
    assert quantized.zero_point is not None
    assert quantized.zero_point.tolist() == [[-5]]
    assert quantized.levels[0, 2] == -3


def test_ternary_levels_as_documented() -> None:
    quantized = quantize_weights(
        matrix([0.1, -0.5, 0.9, -0.2]), WeightOptions(scheme=Scheme.TERNARY)
    )
    assert quantized.levels.tolist() == [[0, -1, 1, 0]]
    np.testing.assert_allclose(quantized.scale, [[0.7]], rtol=1e-6)
    assert quantized.bits == 2


def test_binary_levels_as_documented() -> None:
    quantized = quantize_weights(
        matrix([0.1, -0.5, 0.9, -0.2]), WeightOptions(scheme=Scheme.BINARY)
    )
    assert quantized.levels.tolist() == [[1, -1, 1, -1]]
    np.testing.assert_allclose(quantized.scale, [[0.425]], rtol=1e-6)
    assert quantized.bits == 1


@pytest.mark.parametrize("scheme", [Scheme.TERNARY, Scheme.BINARY])
def test_the_short_last_group_has_the_mean_of_what_is_there(scheme) -> None:
    options = WeightOptions(scheme=scheme, granularity=Granularity.GROUP, group_size=2)
    quantized = quantize_weights(matrix([0.5, -0.5, 0.25]), options)
    np.testing.assert_array_equal(quantized.scale, [[0.5, 0.25]])
    np.testing.assert_array_equal(quantized.real(), [[0.5, -0.5, 0.25]])


def test_a_group_larger_than_the_depth_is_the_channel() -> None:
    weight = matrix([0.5, -1.0, 0.25], [2.0, 1.0, 0.0])
    wide = WeightOptions(bits=4, granularity=Granularity.GROUP, group_size=64)
    channel = quantize_weights(weight, WeightOptions(bits=4))
    np.testing.assert_array_equal(quantize_weights(weight, wide).real(), channel.real())


@pytest.mark.parametrize("scheme", list(Scheme))
def test_an_all_zero_channel_stays_zero(scheme) -> None:
    weight = matrix([0.0, 0.0, 0.0], [1.0, -1.0, 1.0])
    quantized = quantize_weights(weight, WeightOptions(scheme=scheme, bits=4))
    np.testing.assert_array_equal(quantized.real()[0], 0.0)
    np.testing.assert_allclose(quantized.real()[1], weight[1], rtol=1e-6)


@pytest.mark.parametrize("scheme", list(Scheme))
@pytest.mark.parametrize("constant", [0.3, -0.3])
def test_a_constant_channel_is_exact_but_for_rounding(scheme, constant) -> None:
    weight = np.full((1, 5), constant, np.float32)
    quantized = quantize_weights(weight, WeightOptions(scheme=scheme, bits=4))
    np.testing.assert_allclose(quantized.real(), weight, rtol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "symmetric"),
    [
        (Scheme.INTEGER, True),
        (Scheme.INTEGER, False),
        (Scheme.TERNARY, True),
        (Scheme.BINARY, True),
    ],
)
def test_scales_are_powers_of_two_when_asked_for(scheme, symmetric, rng) -> None:
    weight = rng.standard_normal((9, 40)).astype(np.float32)
    options = WeightOptions(scheme=scheme, bits=4, symmetric=symmetric, power_of_two=True)
    quantized = quantize_weights(weight, options)
    mantissa, _ = np.frexp(quantized.scale)
    np.testing.assert_array_equal(mantissa, 0.5)
    free = quantize_weights(weight, WeightOptions(scheme=scheme, bits=4, symmetric=symmetric))
    ratio = quantized.scale / free.scale
    assert ((ratio > 0.5) & (ratio < 2.0)).all()


def test_the_better_power_of_two_is_taken() -> None:
    low, high = power_of_two_scales(np.array([0.3]))
    assert (low[0], high[0]) == (0.25, 0.5)
    # Clipping one weight of 0.26 × 7 costs less than coarser steps for all others.
    weight = np.full((1, 100), 0.25, np.float32)
    weight[0, 0] = 0.26 * 7
    quantized = quantize_weights(weight, WeightOptions(bits=4, power_of_two=True))
    assert quantized.scale[0, 0] == 0.25


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", list(Scheme))
def test_weights_that_are_not_finite_are_refused(value, scheme) -> None:
    weight = matrix([1.0, value, 2.0])
    with pytest.raises(ModelError) as caught:
        quantize_weights(weight, WeightOptions(scheme=scheme), layer="fc")
    assert caught.value.message == ("finite weights are required, but 1 of 3 are NaN or infinite")
    assert caught.value.where == "fc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "weights have 2 to 8 bits, not 9"),
        ({"group_size": 0}, "a group holds at least 1 weight, not 0"),
        (
            {"scheme": Scheme.TERNARY, "symmetric": False},
            "ternary levels are symmetric: they have no zero point",
        ),
    ],
)
def test_options_without_meaning_are_refused(options, message) -> None:
    with pytest.raises(UsageError) as caught:
        WeightOptions(**options)
    assert caught.value.message == message


def test_coarser_schemes_lose_more(rng) -> None:
    weight = rng.standard_normal((16, 256)).astype(np.float32)
    errors = [
        float(np.square(weight - quantize_weights(weight, options).real()).sum())
        for options in (
            WeightOptions(bits=8),
            WeightOptions(bits=4),
            WeightOptions(bits=2, symmetric=False),
            WeightOptions(scheme=Scheme.BINARY),
        )
    ]
    assert errors == sorted(errors)
    finer = WeightOptions(bits=4, granularity=Granularity.GROUP, group_size=16)
    assert np.square(weight - quantize_weights(weight, finer).real()).sum() < errors[1]
