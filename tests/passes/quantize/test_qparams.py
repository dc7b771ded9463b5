from __future__ import annotations

import numpy as np
import pytest

from hone.errors import ModelError
from hone.passes.quantize.qparams import (
    INT8,
    UINT8,
    PerAxis,
    PerTensor,
    QParams,
    QuantizedType,
    choose_qparams,
    dequantize,
    quantize,
)


def asymmetric(minimum: float, maximum: float) -> QParams:
    return choose_qparams(minimum, maximum, type=UINT8, symmetric=False)


def symmetric(minimum, maximum) -> QParams:
    return choose_qparams(
        minimum, maximum, type=INT8, symmetric=True, granularity=PerAxis(axis=0), layer="conv1"
    )


def test_levels_follow_from_the_type() -> None:
    assert (INT8.quant_min, INT8.quant_max, INT8.dtype) == (-127, 127, "int8")
    assert (UINT8.quant_min, UINT8.quant_max, UINT8.dtype) == (0, 255, "uint8")
    int4 = QuantizedType(bits=4, signed=True)
    assert (int4.quant_min, int4.quant_max) == (-8, 7)


def test_asymmetric_parameters_match_the_worked_number() -> None:
    qparams = asymmetric(-1.0, 3.0)
    assert qparams.scale == np.float32(4 / 255)
    assert qparams.zero_point == 64
    assert qparams.granularity == PerTensor()
    assert quantize(np.array([-1.0, 0.0, 3.0], np.float32), qparams).tolist() == [0, 64, 255]


def test_quantize_rounds_ties_to_even() -> None:
    qparams = QParams(
        scale=np.float32(0.5), zero_point=np.int32(3), type=UINT8, granularity=PerTensor()
    )
    x = np.array([0.25, 0.75, 1.25, -0.25], np.float32)
    assert quantize(x, qparams).tolist() == [3, 5, 5, 3]
    assert dequantize(np.array([5], np.uint8), qparams).tolist() == [1.0]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (-0.02, 0.001), (2.0, 9.0)])
def test_round_trip_is_within_half_a_step_when_inside_the_range(low: float, high: float) -> None:
    qparams = asymmetric(low, high)
    x = np.linspace(low, high, 1001, dtype=np.float32)
    error = np.abs(dequantize(quantize(x, qparams), qparams) - x)
    # Half a step; a quarter more at the ends, where the zero point's own rounding clips.
    assert error.max() <= 0.5 * qparams.scale * 1.001 + (0.5 * qparams.scale) * (low < 0 < high)
    assert error.max() > 0.4 * qparams.scale, "the bound must be tight enough to mean something"


def test_range_is_extended_when_it_does_not_contain_zero() -> None:
    above, below = asymmetric(2.0, 9.0), asymmetric(-9.0, -2.0)
    assert (above.zero_point, below.zero_point) == (0, 255)
    for qparams in (above, below):
        assert dequantize(qparams.zero_point, qparams) == 0.0


@pytest.mark.parametrize("value", [3.7, -0.2])
def test_constant_tensor_is_exact_when_quantized(value: float) -> None:
    qparams = asymmetric(value, value)
    got = dequantize(quantize(np.float32(value), qparams), qparams)
    # Only the float32 rounding of scale, product and reciprocal is left.
    assert got == pytest.approx(value, rel=3e-7)


def test_scale_is_one_when_the_tensor_is_all_zero() -> None:
    qparams = asymmetric(0.0, 0.0)
    assert (qparams.scale, qparams.zero_point) == (1.0, 0)
    assert dequantize(quantize(np.zeros(3), qparams), qparams).tolist() == [0.0] * 3


def test_scale_is_one_when_a_channel_has_no_weights() -> None:
    qparams = symmetric(np.array([0.0, -0.5]), np.array([0.0, 0.25]))
    assert qparams.scale.tolist() == [1.0, np.float32(0.5 / 127)]
    weight = np.array([[0.0, 0.0], [-0.5, 0.25]], np.float32)
    assert quantize(weight, qparams).tolist() == [[0, 0], [-127, 64]]


def test_scale_has_a_finite_reciprocal_when_the_range_is_subnormal() -> None:
    qparams = asymmetric(0.0, 1e-43)
    assert np.isfinite(np.float32(1) / qparams.scale)
    assert quantize(np.array([1e-43], np.float32), qparams).tolist() == [0]


def test_scale_is_finite_when_the_range_spans_all_of_float32() -> None:
    largest = np.finfo(np.float32).max
    qparams = asymmetric(-largest, largest)
    assert np.isfinite(qparams.scale)
    assert quantize(np.array([largest, -largest]), qparams).tolist() == [255, 0]


def test_infinities_become_the_ends_of_the_range() -> None:
    x = np.array([np.inf, -np.inf], np.float32)
    assert quantize(x, asymmetric(-1.0, 1.0)).tolist() == [255, 0]


def test_scale_is_per_axis_when_asked_for() -> None:
    weight = np.array([[1.0, -2.0], [0.5, 0.25]], np.float32)
    for axis, extremes in ((0, [2.0, 0.5]), (1, [1.0, 2.0])):
        qparams = choose_qparams(
            weight.min(1 - axis),
            weight.max(1 - axis),
            type=INT8,
            symmetric=True,
            granularity=PerAxis(axis=axis),
        )
        np.testing.assert_allclose(qparams.scale, np.array(extremes) / 127, rtol=1e-7)
        back = dequantize(quantize(weight, qparams), qparams)
        assert np.abs(back - weight).max() <= qparams.scale.max() / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_error_names_the_layer_when_a_range_is_not_finite(bad: float) -> None:
    with pytest.raises(ModelError) as error:
        symmetric(np.array([0.0]), np.array([bad]))
    assert str(error.value) == (
        f"conv1: a quantization range must be finite, but it is [0, {bad:g}]"
    )


def test_error_when_a_range_is_reversed() -> None:
    with pytest.raises(ModelError) as error:
        asymmetric(1.0, -1.0)
    assert str(error.value) == "a quantization range must not end below its start: [1, -1]"


def test_error_when_symmetric_levels_are_unsigned() -> None:
    with pytest.raises(ModelError) as error:
        choose_qparams(-1.0, 1.0, type=UINT8, symmetric=True)
    assert str(error.value) == "symmetric quantization needs a signed type"


def test_error_when_a_value_is_nan() -> None:
    with pytest.raises(ModelError) as error:
        quantize(np.array([0.0, np.nan]), asymmetric(0.0, 1.0))
    assert str(error.value) == "NaN has no quantized level"
