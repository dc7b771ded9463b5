from __future__ import annotations

import itertools

import numpy as np
import pytest
from tvm import relax

from hone.errors import ModelError, UsageError
from hone.passes.quantize.adaptive_rounding import Rounding, learn_rounding
from hone.passes.quantize.gram import GramObserver
from hone.passes.quantize.qparams import INT8, PerAxis, QuantizedType, choose_qparams, quantize
from hone.passes.quantize.site import Kind, Site

INT4 = QuantizedType(bits=4, signed=True, narrow=True)


def learn(
    weight: np.ndarray, gram: np.ndarray, type_: QuantizedType = INT4, **options
) -> tuple[Rounding, np.ndarray, np.ndarray]:
    """Return what was learned, the levels to nearest and the scale ``[K, 1]``."""
    qparams = choose_qparams(
        weight.min(1), weight.max(1), type=type_, symmetric=True, granularity=PerAxis(axis=0)
    )
    scale = qparams.scale[:, None]
    options = {"steps": 300, **options}
    result = learn_rounding(weight, scale, np.zeros_like(scale, int), gram, type=type_, **options)
    return result, quantize(weight, qparams), scale


def inputs(rng, rows: int, depth: int, rank: int) -> np.ndarray:
    """Return correlated, non-negative inputs, as behind a ReLU."""
    mixed = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, depth))
    return np.maximum(mixed + 0.2 * rng.normal(size=(rows, depth)), 0.0).astype(np.float32)


def squared_error(x: np.ndarray, real: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.mean((x.astype(np.float64) @ (real.astype(np.float64) - wanted).T) ** 2))


def test_the_worked_number_is_right() -> None:
    result = learn_rounding(
        np.array([[0.4, 0.4, 0.4]], np.float32),
        np.ones((1, 1), np.float32),
        np.zeros((1, 1), int),
        np.ones((1, 3, 3)),
        type=INT4,
    )
    assert result.nearest_error == pytest.approx(1.44, rel=1e-5)
    assert result.error == pytest.approx(0.04, rel=1e-5)
    assert result.levels.sum() == 1
    assert result.kept == 0


@pytest.mark.parametrize("type_", [INT4, INT8], ids=["int4", "int8"])
def test_the_output_error_falls_by_half_when_inputs_are_correlated(type_, rng) -> None:
    x = inputs(rng, 500, 37, 6)
    weight = rng.normal(size=(11, 37)).astype(np.float32)
    result, nearest, scale = learn(weight, (x.T @ x / len(x))[None], type_)
    found = squared_error(x, result.levels * scale, weight)
    plain = squared_error(x, nearest * scale, weight)
    assert found < 0.5 * plain
    # The reported errors are those of the data, to the precision of float32 sums.
    assert result.error == pytest.approx(found, rel=1e-3)
    assert result.nearest_error == pytest.approx(plain, rel=1e-3)
    assert np.abs(result.levels - weight / scale).max() < 1.0001
    assert result.steps == 300


def test_the_best_choice_is_found_when_it_can_be_searched(rng) -> None:
    x = inputs(rng, 60, 7, 2)
    gram = (x.T @ x / len(x)).astype(np.float64)
    weight = rng.normal(size=(20, 7)).astype(np.float32)
    result, _, scale = learn(weight, gram[None], steps=1000)
    below = np.clip(np.floor(weight / scale), -7, 6)
    choices = np.array(list(itertools.product([0, 1], repeat=7)))
    change = (below[:, None] + choices) * scale[..., None] - weight[:, None]
    best = np.einsum("kcd,de,kce->kc", change, gram, change).min(1).mean()
    # The relaxation may end in a neighbour of the best of 128 choices.
    assert best <= result.error <= 1.5 * best
    assert result.error < 0.7 * result.nearest_error


def test_every_channel_stays_nearest_when_that_is_best(rng) -> None:
    weight = rng.normal(size=(5, 8)).astype(np.float32)
    result, nearest, _ = learn(weight, np.eye(8)[None])
    np.testing.assert_array_equal(result.levels, nearest)
    assert result.error == result.nearest_error
    assert result.kept == 5


def test_no_channel_is_worse_when_training_is_cut_short(rng) -> None:
    x = inputs(rng, 100, 12, 3)
    gram = (x.T @ x / len(x))[None]
    weight = rng.normal(size=(9, 12)).astype(np.float32)
    for options in ({"steps": 1}, {"seconds": 1e-9}, {"steps": 3}):
        result, nearest, scale = learn(weight, gram, **options)
        errors = [
            np.einsum("kd,de,ke->k", c, gram[0], c)
            for c in (result.levels * scale - weight, nearest * scale - weight)
        ]
        assert (errors[0] <= errors[1] + 1e-7).all()
        assert result.error <= result.nearest_error


def test_groups_are_learned_apart_with_zero_points_and_ends_of_the_range(rng) -> None:
    type_ = QuantizedType(bits=2, signed=True)
    weight = rng.normal(size=(6, 5)).astype(np.float32)
    x = [inputs(rng, 80, 5, 2) for _ in range(3)]
    gram = np.stack([part.T @ part / len(part) for part in x])
    scale = np.full((6, 5), 0.4, np.float32)
    point = np.full((6, 5), -1)
    both = learn_rounding(weight, scale, point, gram, type=type_, steps=200)
    for group in range(3):
        rows = slice(2 * group, 2 * group + 2)
        alone = learn_rounding(
            weight[rows], scale[rows], point[rows], gram[group][None], type=type_, steps=200
        )
        np.testing.assert_array_equal(both.levels[rows], alone.levels)
    assert both.levels.min() >= -2
    assert both.levels.max() <= 1
    assert both.levels.dtype == np.int8
    assert both.error < both.nearest_error


@pytest.mark.parametrize(
    ("weight", "gram", "options", "text"),
    [
        (
            np.zeros((4, 3), np.float32),
            np.zeros((1, 2, 2)),
            {},
            "rounding needs weights [K, D] and their inputs' products [G, D, D], given are "
            "[4, 3] and [1, 2, 2]",
        ),
        (
            np.zeros((4, 2), np.float32),
            np.zeros((3, 2, 2)),
            {},
            "4 output channels do not make 3 groups",
        ),
        (
            np.zeros((4, 2), np.float32),
            np.zeros((1, 2, 2)),
            {"steps": 0},
            "rounding needs steps and seconds above 0, not 0 and inf",
        ),
        (
            np.zeros((4, 2), np.float32),
            np.zeros((1, 2, 2)),
            {"seconds": 0.0},
            "rounding needs steps and seconds above 0, not 300 and 0.0",
        ),
    ],
    ids=["shape", "groups", "steps", "seconds"],
)
def test_error_when_arguments_do_not_fit(weight, gram, options, text: str) -> None:
    with pytest.raises(UsageError) as error:
        learn(weight, gram, **options)
    assert str(error.value) == text


def conv_site(rng, *, channels: int, groups: int, **attributes) -> Site:
    weight = rng.normal(size=(channels, 3, 2, 4 // groups)).astype(np.float32)
    x = relax.Var("x", relax.TensorType((2, 7, 9, 4), "float32"))
    call = relax.BlockBuilder().normalize(
        relax.op.nn.conv2d(
            x,
            relax.const(weight),
            groups=groups,
            data_layout="NHWC",
            kernel_layout="OHWI",
            **attributes,
        )
    )
    chain = (relax.Var("conv", call.ty),)
    return Site(kind=Kind.CONV2D, layer="conv", call=call, chain=chain, inputs=(x,))


@pytest.mark.parametrize(
    ("channels", "groups", "attributes"),
    [
        (5, 1, {}),
        (3, 1, {"strides": (2, 3), "padding": (1, 0, 2, 1)}),
        (2, 1, {"dilation": (2, 3), "padding": (1, 1, 1, 1)}),
        (4, 4, {"padding": (1, 1, 1, 1), "strides": (2, 1)}),
    ],
    ids=["plain", "strided", "dilated", "depthwise"],
)
def test_gram_gives_the_mean_squared_output_of_a_convolution(
    channels: int, groups: int, attributes, rng
) -> None:
    site = conv_site(rng, channels=channels, groups=groups, **attributes)
    observer = GramObserver(site)
    data = [rng.normal(size=(2, 7, 9, 4)).astype(np.float32) for _ in range(3)]
    for values in data:
        observer.update(values)
    rows = site.weight.reshape(groups, channels // groups, -1)
    found = np.einsum("gkd,gde,gke->gk", rows, observer.gram, rows).reshape(-1)
    wanted = np.mean([np.square(convolve(site, x)).mean((0, 1, 2)) for x in data], axis=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def convolve(site: Site, x: np.ndarray) -> np.ndarray:
    """NHWC convolution, one tap at a time, in float64."""
    attrs = site.call.attrs
    top, left, bottom, right = (int(p) for p in attrs.padding)
    padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    weight = site.weight.astype(np.float64)
    step_y, step_x = (int(s) for s in attrs.strides)
    gap_y, gap_x = (int(s) for s in attrs.dilation)
    out = np.zeros([int(extent) for extent in site.call.ty.shape])
    for oy, ox in np.ndindex(out.shape[1:3]):
        for ky, kx in np.ndindex(weight.shape[1:3]):
            pixel = padded[:, oy * step_y + ky * gap_y, ox * step_x + kx * gap_x]
            if int(attrs.groups) == 1:
                out[:, oy, ox] += pixel @ weight[:, ky, kx].T
            else:
                out[:, oy, ox] += pixel * weight[:, ky, kx, 0]
    return out


def test_gram_of_a_product_is_that_of_its_rows_and_its_memory_does_not_grow(rng) -> None:
    weight = rng.normal(size=(6, 5)).astype(np.float32)
    x = relax.Var("x", relax.TensorType((2, 4, 6), "float32"))
    call = relax.BlockBuilder().normalize(relax.op.matmul(x, relax.const(weight)))
    site = Site(
        kind=Kind.DENSE, layer="fc", call=call, chain=(relax.Var("fc", call.ty),), inputs=(x,)
    )
    observer = GramObserver(site)
    with pytest.raises(ModelError, match=r"^fc: calibration saw no value$"):
        _ = observer.gram
    data = [rng.normal(size=(2, 4, 6)).astype(np.float32) for _ in range(5)]
    sizes = set()
    for values in data:
        observer.update(values)
        sizes.add(sum(v.nbytes for v in vars(observer).values() if isinstance(v, np.ndarray)))
    assert sizes == {6 * 6 * 4}
    rows = np.concatenate(data).reshape(-1, 6).astype(np.float64)
    np.testing.assert_allclose(observer.gram, (rows.T @ rows / len(rows))[None], rtol=1e-4)
