"""The model of Winograd's forms: what it chooses for the layers that were measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hone.targets.schedule.machine import Machine
from hone.targets.schedule.winograd_model import (
    DIRECT,
    Form,
    choose_winograd,
    tile_rows,
    winograd_cycles,
)

AVX512 = Machine(lanes=16, accumulators=28, l1_bytes=48 << 10, l2_bytes=1 << 20, threads=2)


def choose(machine: Machine, size: int, channels: int, *, batch: int = 1, rows: bool = True) -> str:
    return choose_winograd(
        machine, batch=batch, height=size, width=size, channels=channels, depth=channels, rows=rows
    ).name


@pytest.mark.parametrize(
    ("size", "channels", "form"),
    [(56, 64, "4x4"), (28, 128, "4x4"), (14, 256, "4x4"), (7, 512, "2x2")],
)
def test_form_is_the_one_measured_best_for_each_stage_of_resnet18(
    size: int, channels: int, form: str
) -> None:
    assert choose(AVX512, size, channels) == form
    assert choose(AVX512, size, channels, rows=False) == form


def test_weights_by_rows_are_tried_first_where_points_wait_longest_for_memory() -> None:
    asked: dict[str, tuple[str, ...]] = {}
    slow = replace(AVX512, weight_bytes_per_cycle=8, asked=asked)
    assert choose(slow, 14, 256) == "4x4 rows"
    assert asked["winograd 1x14x14x256 to 256"][0] == "4x4 rows"


def test_weights_are_points_when_a_batch_uses_them_often() -> None:
    assert choose(AVX512, 14, 256, batch=8) == "4x4"
    assert choose(AVX512, 7, 512, batch=8) == "4x4"


def test_weights_are_points_when_threads_cannot_share_the_channels() -> None:
    def offered(machine: Machine, channels: int) -> bool:
        layer = {"batch": 1, "height": 14, "width": 14, "channels": channels, "depth": 256}
        return any(form.rows for form in winograd_cycles(machine, **layer, rows=True))

    assert offered(AVX512, 256)
    assert not offered(AVX512, 256 + 16)
    assert offered(replace(AVX512, threads=1), 256 + 16)
    # The transformed data of 590 KB would not stay in half of the cache.
    assert not offered(replace(AVX512, l2_bytes=512 << 10), 256)
    # Weights that stay in the cache are transformed once and for all.
    assert not offered(replace(AVX512, l2_bytes=16 << 20), 256)


def test_weights_are_points_when_too_few_tiles_hide_the_latency_of_their_sums() -> None:
    forms = winograd_cycles(AVX512, batch=1, height=7, width=7, channels=512, depth=512, rows=True)
    assert Form(tile=2, rows=True) in forms
    assert Form(tile=4, rows=True) not in forms


def test_a_tile_by_rows_takes_all_sums_that_registers_hold() -> None:
    form = Form(tile=4, rows=True)
    assert tile_rows(AVX512, form, 16) == 16
    assert tile_rows(AVX512, form, 49) == 25
    assert tile_rows(replace(AVX512, accumulators=12), form, 16) == 8


def test_forms_by_rows_can_be_decided() -> None:
    point = "winograd 1x14x14x256 to 256"
    for name in ("4x4 rows", "2x2", "4x4", "direct"):
        assert choose(replace(AVX512, decided=((point, name),)), 14, 256) == name


def test_forms_count_what_is_kept_of_the_weights() -> None:
    assert [Form(tile=m, rows=rows).weights for m in (2, 4) for rows in (False, True)] == [
        16, 12, 36, 18,
    ]  # fmt: skip
    assert DIRECT.weights == 9


def test_convolution_stays_direct_when_there_are_few_input_channels() -> None:
    layer = {"batch": 1, "height": 112, "width": 112, "channels": 32, "depth": 3}
    assert choose_winograd(AVX512, **layer) == DIRECT


def test_convolution_stays_direct_when_weights_are_read_for_one_pixel() -> None:
    assert choose(AVX512, 1, 512) == "direct"
