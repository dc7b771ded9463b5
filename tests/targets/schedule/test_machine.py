"""The analytic model: what it chooses fits the machine, and divides what it must divide."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from hone.targets.schedule.machine import L2_BYTES_PER_CYCLE, Machine, choose_tasks
from hone.targets.schedule.tile_model import choose_pixels, choose_tile
from hone.targets.schedule.winograd_model import DIRECT, Form, choose_winograd

AVX512 = Machine(lanes=16, accumulators=28, l1_bytes=48 << 10, l2_bytes=1 << 20, threads=2)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_parts_divide_the_tiles_whatever_the_threads(threads: int) -> None:
    machine = Machine(lanes=8, accumulators=12, l1_bytes=1 << 15, l2_bytes=1 << 19, threads=threads)
    for rows, channels, weights in itertools.product((1, 7, 56), (1, 6, 16), (1 << 10, 1 << 24)):
        row_parts, channel_parts = choose_tasks(
            machine,
            batch=1,
            row_tiles=rows,
            channel_tiles=channels,
            weight_bytes=weights,
            input_bytes=1 << 16,
            row_bytes=1 << 12,
        )
        assert rows % row_parts == channels % channel_parts == 0


@pytest.mark.parametrize(("weights", "parts"), [(1 << 18, (2, 1)), ((1 << 18) + 1, (1, 2))])
def test_threads_share_the_weights_until_they_are_four_times_the_input(
    weights: int, parts: tuple[int, int]
) -> None:
    found = choose_tasks(
        AVX512,
        batch=1,
        row_tiles=14,
        channel_tiles=8,
        weight_bytes=weights,
        input_bytes=1 << 16,
        row_bytes=1 << 12,
    )
    assert found == parts


def test_every_option_that_was_asked_for_can_be_decided_and_fits() -> None:
    asked: dict[str, tuple[str, ...]] = {}
    machine = replace(AVX512, asked=asked)

    def pixels(machine: Machine) -> tuple[int, int]:
        return choose_pixels(
            machine, height=28, width=28, channels=128, depth=128, taps=9, vectors=2
        )

    def tasks(machine: Machine) -> tuple[int, int]:
        return choose_tasks(
            machine, batch=1, row_tiles=28, channel_tiles=4, weight_bytes=1 << 19,
            input_bytes=1 << 18, row_bytes=1 << 13,
        )  # fmt: skip

    first = pixels(machine), tasks(machine)
    assert set(asked) == {"pixels", "tasks"}
    tiles = [pixels(replace(AVX512, decided=(("pixels", name),))) for name in asked["pixels"]]
    parts = [tasks(replace(AVX512, decided=(("tasks", name),))) for name in asked["tasks"]]
    assert (tiles[0], parts[0]) == first
    assert len(set(tiles)) == len(tiles) > 3
    assert len(set(parts)) == len(parts) > 3
    for rows, columns in tiles:
        assert 28 % rows == 28 % columns == 0
        assert rows * columns * 2 <= AVX512.accumulators
    assert all(rows * channels % AVX512.threads == 0 for rows, channels in parts)


def test_points_of_the_lowering_are_named_after_the_layer() -> None:
    asked: dict[str, tuple[str, ...]] = {}
    machine = replace(AVX512, asked=asked)
    shape = {"height": 14, "width": 14, "channels": 256, "depth": 256}
    first = choose_tile(machine, taps=9, **shape)
    choose_winograd(machine, batch=1, **shape)
    pack, winograd = "pack 14x14x256x9 to 256", "winograd 1x14x14x256 to 256"
    assert asked[winograd] == ("4x4", "2x2", "direct")
    assert asked[pack][0] == f"{first.rows}x{first.columns}x{first.vectors}"
    assert len({name.split("x")[2] for name in asked[pack]}) > 1
    direct = replace(AVX512, decided=((winograd, "direct"),))
    assert choose_winograd(direct, batch=1, **shape) == DIRECT
    other = choose_tile(replace(AVX512, decided=((pack, asked[pack][1]),)), taps=9, **shape)
    assert other.vectors != first.vectors


def test_weights_that_stay_in_a_cache_are_streamed_from_there() -> None:
    half = AVX512.l2_bytes // 2
    assert AVX512.holding(half).weight_bytes_per_cycle == 2 * L2_BYTES_PER_CYCLE
    assert AVX512.holding(half + 1) == AVX512
    layer = {"batch": 1, "height": 4, "width": 4, "channels": 128, "depth": 64}
    assert choose_winograd(AVX512, **layer) == DIRECT
    assert choose_winograd(AVX512.holding(half), **layer) == Form(tile=2)
