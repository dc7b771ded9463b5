from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from tvm import relax

from hone.errors import ModelError
from hone.passes.quantize.bias_correction import InputMeans, MeanObserver, correct_bias
from hone.passes.quantize.integer_layer import quantize_weights
from hone.passes.quantize.qparams import UINT8, QParams, choose_qparams, dequantize, quantize
from hone.passes.quantize.site import Kind, Site


def levels_of(low: float, high: float) -> QParams:
    return choose_qparams(low, high, type=UINT8, symmetric=False)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A convolution in NHWC, all extents different."""

    name: str
    channels: int
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


CASES = [
    Case(name="plain", channels=5),
    Case(name="padded", channels=2, padding=(1, 2, 0, 1)),
    Case(name="strided", channels=3, strides=(2, 3), padding=(1, 1, 1, 1)),
    Case(name="dilated", channels=4, dilation=(2, 1)),
    Case(name="depthwise", channels=3, groups=3, padding=(1, 1, 1, 1)),
]


def conv_site(case: Case, rng: np.random.Generator) -> Site:
    weight = rng.normal(size=(case.channels, 3, 2, 3 // case.groups)).astype(np.float32)
    x = relax.Var("x", relax.TensorType((2, 7, 9, 3), "float32"))
    call = relax.BlockBuilder().normalize(
        relax.op.nn.conv2d(
            x,
            relax.const(weight),
            strides=case.strides,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.groups,
            data_layout="NHWC",
            kernel_layout="OHWI",
        )
    )
    result = relax.Var("conv1", call.ty)
    bias = rng.normal(size=case.channels)
    return Site(kind=Kind.CONV2D, layer="conv1", call=call, chain=(result,), inputs=(x,), bias=bias)


def convolve(case: Case, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``[N, OH, OW, K]`` in float64, tap by tap."""
    top, left, bottom, right = case.padding
    x = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    channels, taps_y, taps_x, _ = weight.shape
    height = (x.shape[1] - (taps_y - 1) * case.dilation[0] - 1) // case.strides[0] + 1
    width = (x.shape[2] - (taps_x - 1) * case.dilation[1] - 1) // case.strides[1] + 1
    out = np.zeros((len(x), height, width, channels))
    for oy in range(height):
        for ox in range(width):
            for ky in range(taps_y):
                for kx in range(taps_x):
                    pixel = x[
                        :,
                        oy * case.strides[0] + ky * case.dilation[0],
                        ox * case.strides[1] + kx * case.dilation[1],
                    ]
                    if case.groups == 1:
                        out[:, oy, ox] += pixel @ weight[:, ky, kx].T
                    else:
                        out[:, oy, ox] += pixel * weight[:, ky, kx, 0]
    return out


def observed(batches: list[np.ndarray], qparams: QParams) -> InputMeans:
    observer = MeanObserver(layer="x", qparams=qparams)
    for batch in batches:
        observer.update(batch)
    return observer.means


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_mean_output_is_that_of_float_after_correction(case: Case, rng) -> None:
    site = conv_site(case, rng)
    data = [(rng.normal(size=(2, 7, 9, 3)) + 0.4).astype(np.float32) for _ in range(4)]
    qparams = levels_of(-1.0, 1.2)  # saturates a good part
    corrected = correct_bias(site, qparams, observed(data, qparams))
    x = np.concatenate(data)
    x_q = dequantize(quantize(x, qparams), qparams)
    w_q = dequantize(*quantize_weights(site, qparams))
    wanted = convolve(case, x, site.weight).mean((0, 1, 2)) + site.bias
    plain = convolve(case, x_q, w_q).mean((0, 1, 2))
    assert np.abs(plain + site.bias - wanted).min() > 1e-4
    # Sums in float64 of numbers around 1.
    np.testing.assert_allclose(plain + corrected.bias, wanted, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 6)], ids=str)
def test_mean_product_is_that_of_float_after_correction(shape: tuple[int, ...], rng) -> None:
    weight = rng.normal(size=(6, 5)).astype(np.float32)
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    call = relax.BlockBuilder().normalize(relax.op.matmul(x, relax.const(weight)))
    site = Site(
        kind=Kind.DENSE, layer="fc", call=call, chain=(relax.Var("fc", call.ty),), inputs=(x,)
    )
    data = [rng.exponential(size=shape).astype(np.float32) for _ in range(3)]
    qparams = levels_of(0.0, 2.0)
    corrected = correct_bias(site, qparams, observed(data, qparams))
    rows = np.concatenate(data).reshape(-1, 6)
    w_q = dequantize(*quantize_weights(site, qparams)).astype(np.float64)
    found = (dequantize(quantize(rows, qparams), qparams) @ w_q.T).mean(0) + corrected.bias
    np.testing.assert_allclose(found, (rows.astype(np.float64) @ weight).mean(0), atol=1e-6)


def test_only_the_weights_are_corrected_when_the_levels_changed_meanwhile(rng) -> None:
    case = CASES[0]
    site = conv_site(case, rng)
    data = [rng.normal(size=(2, 7, 9, 3)).astype(np.float32)]
    taken, used = levels_of(-0.5, 0.5), levels_of(-4.0, 4.0)
    corrected = correct_bias(site, used, observed(data, taken))
    w_q = dequantize(*quantize_weights(site, used)).astype(np.float64)
    error = convolve(case, data[0], w_q - site.weight).mean((0, 1, 2))
    np.testing.assert_allclose(corrected.bias, site.bias - error, atol=1e-9)


def test_memory_does_not_grow_with_the_data(rng) -> None:
    observer = MeanObserver(layer="x", qparams=levels_of(0.0, 1.0))
    sizes = set()
    for count in (1, 5, 9):
        observer.update(rng.random(size=(count, 4, 2)).astype(np.float32))
        sizes.add(
            sum(np.asarray(v).nbytes for k, v in vars(observer).items() if k[1:] != "qparams")
        )
    assert len(sizes) == 1
    assert observer.means.real.shape == observer.means.quantized.shape == (4, 2)


def test_error_names_the_tensor_when_nothing_was_seen() -> None:
    with pytest.raises(ModelError, match=r"^x: calibration saw no value$"):
        observed([], levels_of(0.0, 1.0))
