"""Winograd in integers: bit for bit against numpy, and refused where that is not proven."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from tvm import relax

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.lower.window import Window
from hone.passes.quantize import operators, winograd_lowering
from hone.passes.quantize.arithmetic import GUARD_BITS
from hone.passes.quantize.legalize import rules
from hone.passes.quantize.winograd_kernels import F2, F4, IntegerTransform, pack
from hone.passes.quantize.winograd_lowering import choose_transform
from hone.targets.features import missing
from hone.targets.integer_dot import IntegerDot
from hone.targets.schedule.cpu import Decision, ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target, resolve

BOTH = pytest.mark.parametrize("transform", [F2, F4], ids=["F2", "F4"])


def with_features(name: str, *extra: str) -> Target:
    base = resolve(name)
    return replace(base, features=tuple(sorted({*base.features, *extra})))


FORMS = {
    "vnni_512": with_features("x86-64-v4", "avx512vnni"),
    "vnni_256": with_features("x86-64-v3", "avxvnni"),
    "words_512": resolve("x86-64-v4"),
    "words_256": resolve("x86-64-v3"),
}


def target_of(form: str) -> Target:
    target = FORMS[form]
    lacking = missing(target.features, target.arch)
    if lacking:
        pytest.skip(f"this machine lacks {', '.join(lacking)}")
    return target


@BOTH
def test_transforms_are_integers_and_give_the_scaled_convolution_of_one_tile(
    transform: IntegerTransform, rng: np.random.Generator
) -> None:
    data = rng.integers(0, 256, (transform.side, transform.side))
    taps = rng.integers(-127, 128, (3, 3))
    to_points = np.array(transform.points.data)
    assert np.array_equal(to_points, to_points.astype(int))
    points = (transform.weight @ taps @ transform.weight.T) * (to_points @ data @ to_points.T)
    result = np.array(transform.result)
    scaled = (result @ points @ result.T).astype(np.int64)
    factors = np.array([transform.odd << shift for shift in transform.shifts])
    exact = sum(
        taps[r, s] * data[r : r + transform.tile, s : s + transform.tile]
        for r in range(3)
        for s in range(3)
    )
    np.testing.assert_array_equal(scaled, exact * np.outer(factors, factors))


@BOTH
def test_both_operands_of_the_products_fit_int16_whatever_the_levels(
    transform: IntegerTransform,
) -> None:
    rows = np.array(transform.points.data).astype(int)
    windows = [np.outer(a, b) for a in rows for b in rows]
    most = max(255 * window[window > 0].sum() for window in windows)
    least = min(255 * window[window < 0].sum() for window in windows)
    assert least >= -(2**15)
    assert most < 2**15
    assert 128 * np.abs(transform.weight).sum(1).max() ** 2 < 2**15


def test_a_layer_fits_up_to_the_bits_that_the_power_of_two_leaves() -> None:
    # 2^25 / 255 = 131585.99, and 131586 x 255 is 2^25 - 2: so much of one sign a filter may hold.
    weight = np.zeros((2, 3, 3, 116), np.int8)
    weight[1].reshape(-1)[:1036] = -127
    weight[1].reshape(-1)[1036] = -14
    assert F4.fits(weight)
    weight[1].reshape(-1)[1036] = -15
    assert not F4.fits(weight)
    assert F2.fits(weight)


def test_weights_are_pairs_of_channels_in_words(rng: np.random.Generator) -> None:
    weight = rng.integers(-127, 128, (5, 3, 3, 4)).astype(np.int8)
    packed = pack(weight, F4, 4)
    assert packed.shape == (6, 6, 2, 2, 4)
    halves = packed.view(np.int16).reshape(6, 6, 2, 2, 4, 2)
    # The first and last points hold the corner taps, six times along either side.
    np.testing.assert_array_equal(halves[0, 0, 0, 1, 3], 36 * weight[3, 0, 0, 2:].astype(int))
    np.testing.assert_array_equal(halves[5, 0, 1, 0, 0], 36 * weight[4, 2, 0, :2].astype(int))
    assert not halves[:, :, 1, :, 1:].any()


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    shape: tuple[int, int, int, int]
    filters: int
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    transform: IntegerTransform = F4
    way: str | None = None
    residual: bool = False
    out: str = "uint8"
    extreme: bool = False


CASES = [
    Case(name="whole_tiles", shape=(1, 8, 8, 32), filters=32),
    Case(name="prime_image", shape=(2, 7, 11, 6), filters=10),
    Case(name="one_pixel", shape=(3, 1, 1, 4), filters=5),
    Case(name="uneven_padding", shape=(1, 9, 6, 8), filters=17, padding=(0, 2, 1, 0)),
    Case(name="small_tiles", shape=(1, 7, 7, 16), filters=24, transform=F2),
    Case(name="small_tiles_prime", shape=(3, 5, 3, 2), filters=7, transform=F2),
    Case(name="rows", shape=(2, 8, 8, 4), filters=32, way="rows"),
    Case(name="cells", shape=(1, 12, 8, 4), filters=64, way="cells"),
    Case(name="images", shape=(3, 8, 8, 4), filters=64, way="images"),
    Case(name="loops", shape=(1, 8, 8, 4), filters=32, way="loops"),
    Case(name="residual", shape=(1, 6, 5, 8), filters=9, residual=True),
    Case(name="signed_output", shape=(1, 5, 5, 4), filters=6, out="int8"),
    # Sums of the transformed domain leave int32: 18 products of 16 x 17340 x 6223 and more.
    Case(name="extreme", shape=(1, 8, 8, 64), filters=16, extreme=True, out="float32"),
    Case(name="float_output", shape=(1, 4, 6, 4), filters=6, out="float32"),
]


def conv_sums(case: Case, data: np.ndarray, weight: np.ndarray, zero_point: int) -> np.ndarray:
    top, left, bottom, right = case.padding
    padded = np.pad(
        data.astype(np.int64),
        ((0, 0), (top, bottom), (left, right), (0, 0)),
        constant_values=zero_point,
    )
    height, width = padded.shape[1] - 2, padded.shape[2] - 2
    return sum(
        padded[:, r : r + height, s : s + width] @ weight[:, r, s].astype(np.int64).T
        for r in range(3)
        for s in range(3)
    )


def oracle(acc, multiplier, levels, out, residual=None, residual_multiplier=None) -> np.ndarray:
    """Requantize by the text of the specification in `arithmetic`."""
    scaled = acc.astype(np.int32).astype(np.float32) * multiplier
    if out == "float32":
        return scaled
    zero_point, low, high = (int(x) for x in levels[1:4])
    steps = np.rint(scaled).astype(np.int64)
    if residual is not None:
        other = (residual.astype(np.int32) - levels[4]).astype(np.float32) * residual_multiplier
        total = steps + np.rint(other).astype(np.int64)
        steps = np.floor_divide(total + 2 ** (GUARD_BITS - 1), 2**GUARD_BITS)
    return np.clip(steps + zero_point, low, high).astype(out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conv2d_equals_the_oracle_for_every_instruction(
    case: Case, form: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(form)
    monkeypatch.setattr(winograd_lowering, "choose_transform", lambda *_: case.transform)
    data = rng.integers(0, 256, case.shape).astype(np.uint8)
    weight = rng.integers(-127, 128, (case.filters, 3, 3, case.shape[3])).astype(np.int8)
    if case.extreme:
        # What makes one transformed window, and its filter, as large as they become.
        rows = np.array(F4.points.data).astype(int)
        data[:, :6, :6] = 255 * (np.outer(rows[1], rows[1]) > 0)[None, :, :, None]
        weight[:] = 127
        weight[1::2] = -127
    assert case.transform.fits(weight)
    zero_point = int(rng.integers(0, 256))
    bias = rng.integers(-5000, 5000, case.filters).astype(np.int32)
    acc = conv_sums(case, data, weight, zero_point) + bias
    multiplier = (rng.uniform(0.5, 1.5, case.filters) * 60 / np.abs(acc).max()).astype(np.float32)
    levels, rest = [zero_point], []
    if case.out != "float32":
        info = np.iinfo(case.out)
        levels += [int(rng.integers(info.min + 60, info.max - 60)), info.min + 9, info.max - 8]
    if case.residual:
        guard = np.float32(2**GUARD_BITS)
        multiplier = multiplier * guard
        levels.append(77)
        residual = rng.integers(0, 256, acc.shape).astype(np.uint8)
        rest = [residual, np.array([0.37], np.float32) * guard]
    arrays = [data, bias, multiplier, np.array(levels, np.int32), *rest]

    params = [
        relax.Var(f"p{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)
    ]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            call = operators.conv2d_int8(
                params[0],
                relax.const(weight),
                *params[1:],
                padding=case.padding,
                out_dtype=case.out,
            )
            out = builder.emit_output(call)
        builder.emit_func_output(out)
    decided = (("way", case.way),) if case.way else ()
    machine = replace(Machine.of(target, 2), decided=decided)
    module = apply(builder.get(), relax.transform.LegalizeOps(rules(machine)))
    decisions: list[Decision] = []
    module = ScheduleModule(machine, on_decision=decisions.append)(module)
    assert [(d.rule, d.reason) for d in decisions] == [("winograd", "")]
    vm = relax.VirtualMachine(pipeline.build_executable(module, target, threads=2), tvm.cpu())
    got = vm["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy()
    want = oracle(acc, multiplier, arrays[3], case.out, *rest)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("compact", [False, True])
def test_compact_lowering_keeps_the_direct_form_and_its_smaller_weights(compact: bool) -> None:
    weight = np.ones((64, 3, 3, 64), np.int8)
    arrays = {
        "data": ((1, 56, 56, 64), "uint8"),
        "bias": ((64,), "int32"),
        "multiplier": ((64,), "float32"),
        "levels": ((4,), "int32"),
    }
    data, *rest = (
        relax.Var(name, relax.TensorType(shape, dtype)) for name, (shape, dtype) in arrays.items()
    )
    builder = relax.BlockBuilder()
    with builder.function("main", [data, *rest]):
        call = operators.conv2d_int8(
            data, relax.const(weight), *rest, padding=(1, 1, 1, 1), out_dtype="uint8"
        )
        builder.emit_func_output(builder.emit(call))
    machine = Machine.of(FORMS["vnni_512"], 2)
    chosen = rules(machine, compact=compact)
    lowered = apply(builder.get(), relax.transform.LegalizeOps(chosen))
    names = [variable.name_hint for variable in lowered.get_global_vars()]
    assert any("winograd" in name for name in names) is not compact


def resnet_layer(side: int, channels: int) -> tuple[Window, np.ndarray]:
    window = Window(
        shape=(1, side, side, channels),
        taps=(3, 3),
        strides=(1, 1),
        dilation=(1, 1),
        padding=(1, 1, 1, 1),
    )
    return window, np.ones((channels, 3, 3, channels), np.int8)


@pytest.mark.parametrize(
    ("side", "channels", "expected"),
    [(56, 64, F4), (28, 128, F4), (14, 256, None), (7, 512, None)],
)
def test_weights_that_grow_beyond_the_caches_keep_the_direct_form(
    side: int, channels: int, expected: IntegerTransform | None
) -> None:
    # Inside ResNet-18 the third stage loses what it gains alone (docs/performance.md).
    machine = Machine.of(with_features("x86-64-v4", "avx512vnni"), 2)
    window, weight = resnet_layer(side, channels)
    assert choose_transform(machine, window, weight) is expected
    # Weights that no cache holds are read anew for every image of a batch.
    batch = replace(window, shape=(8, *window.shape[1:]))
    assert choose_transform(machine, batch, weight) is expected


def test_transform_is_refused_where_it_does_not_apply() -> None:
    machine = Machine.of(with_features("x86-64-v4", "avx512vnni"), 2)
    window, weight = resnet_layer(56, 64)
    assert choose_transform(machine, window, weight) is F4
    assert choose_transform(machine, replace(window, strides=(2, 2)), weight) is None
    assert choose_transform(machine, replace(window, dilation=(2, 2)), weight) is None
    odd = replace(window, shape=(1, 56, 56, 63))
    assert choose_transform(machine, odd, weight[..., :63]) is None
    for dot in (None, IntegerDot.USDOT, IntegerDot.SDOT):
        other = replace(machine, integer_dot=dot)
        assert choose_transform(other, window, weight) is None
    large = np.full((64, 3, 3, 120), 127, np.int8)
    unproven = choose_transform(machine, replace(window, shape=(1, 56, 56, 120)), large)
    assert unproven is not F4
