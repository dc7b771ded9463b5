"""The model of register tiles: what it chooses fits the machine, and is what was measured best."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest

from hone.targets.schedule.machine import FMA_LATENCY, FMA_PER_CYCLE, Machine
from hone.targets.schedule.tile_model import (
    CLOSE,
    Tile,
    choose_pixels,
    choose_tile,
    least_cycles,
    most_sums,
    ranked_tiles,
)

AVX512 = Machine(lanes=16, accumulators=28, l1_bytes=48 << 10, l2_bytes=1 << 20, threads=2)
AVX2 = Machine(lanes=8, accumulators=12, l1_bytes=32 << 10, l2_bytes=512 << 10, threads=2)
NEON = Machine(lanes=4, accumulators=28, l1_bytes=32 << 10, l2_bytes=512 << 10, threads=4)
MACHINES = pytest.mark.parametrize("machine", [AVX512, AVX2, NEON], ids=["avx512", "avx2", "neon"])


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A product of the reference networks."""

    height: int
    width: int
    depth: int
    channels: int
    taps: int = 1

    @property
    def shape(self) -> dict[str, int]:
        """The layer as the model takes it."""
        return {
            "height": self.height,
            "width": self.width,
            "channels": self.channels,
            "depth": self.depth,
            "taps": self.taps,
        }

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.depth}x{self.taps} to {self.channels}"


WIDE = [
    Layer(height=56, width=56, depth=64, channels=64),
    Layer(height=56, width=56, depth=64, channels=256),
    Layer(height=56, width=56, depth=64, channels=64, taps=9),
    Layer(height=28, width=28, depth=128, channels=128, taps=9),
    Layer(height=28, width=28, depth=512, channels=128),
    Layer(height=28, width=28, depth=128, channels=512),
    Layer(height=14, width=14, depth=1024, channels=256),
    Layer(height=1, width=128, depth=256, channels=1024),
    Layer(height=1, width=197, depth=192, channels=576),
]


def _pixels(machine: Machine, layer: Layer, tile: Tile) -> tuple[int, int]:
    shape = {**layer.shape, "width": -(-layer.width // tile.columns) * tile.columns}
    return choose_pixels(machine, **shape, vectors=tile.vectors)


@MACHINES
def test_accumulators_of_every_tile_fit_the_registers(machine: Machine) -> None:
    for height, width, channels, depth, taps in itertools.product(
        (1, 7, 13), (1, 14, 197), (1, 17, 64, 1000), (1, 3, 256), (1, 9)
    ):
        layer = Layer(height=height, width=width, channels=channels, depth=depth, taps=taps)
        tile = choose_tile(machine, **layer.shape)
        assert tile.rows * tile.columns * tile.vectors <= most_sums(machine, tile.vectors)
        rounded = -(-width // tile.columns) * tile.columns
        rows, columns = _pixels(machine, layer, tile)
        assert height % rows == rounded % columns == 0
        assert rows * columns * tile.vectors <= most_sums(machine, tile.vectors)


@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        (Layer(height=56, width=56, depth=64, channels=256), (4, 4)),
        (Layer(height=56, width=56, depth=256, channels=128), (8, 2)),
        (Layer(height=28, width=28, depth=512, channels=256), (7, 2)),
        (Layer(height=28, width=28, depth=32, channels=192), (4, 4)),
        (Layer(height=14, width=14, depth=1024, channels=256), (14, 2)),
        (Layer(height=14, width=14, depth=256, channels=1024), (14, 2)),
        (Layer(height=1, width=128, depth=256, channels=256), (8, 2)),
        (Layer(height=1, width=197, depth=192, channels=192), (9, 3)),
        (Layer(height=1, width=197, depth=192, channels=768), (9, 3)),
        (Layer(height=1, width=197, depth=768, channels=192), (9, 3)),
    ],
    ids=str,
)
def test_tile_is_the_one_measured_best_when_vectors_have_16_lanes(
    layer: Layer, tile: tuple[int, int]
) -> None:
    chosen = choose_tile(AVX512, **layer.shape)
    assert (chosen.rows, chosen.columns, chosen.vectors) == (1, *tile)
    assert _pixels(AVX512, layer, chosen) == (1, tile[0])


@MACHINES
@pytest.mark.parametrize("layer", WIDE, ids=str)
def test_sums_keep_the_units_busy_where_the_image_is_large(machine: Machine, layer: Layer) -> None:
    tile = choose_tile(machine, **layer.shape)
    pixels = tile.rows * tile.columns
    # More sums than just those that wait for themselves, and fewer loads than products.
    assert pixels * tile.vectors > FMA_LATENCY * FMA_PER_CYCLE
    assert pixels + tile.vectors < pixels * tile.vectors
    rounded = -(-layer.width // tile.columns) * tile.columns
    assert rounded <= 1.1 * layer.width


@MACHINES
def test_cycles_lie_between_the_products_and_twice_as_many(machine: Machine) -> None:
    for layer in WIDE:
        products = layer.height * layer.width * layer.depth * layer.taps * layer.channels
        least = products / (machine.lanes * FMA_PER_CYCLE)
        assert least < least_cycles(machine, **layer.shape) < 2 * least


def test_threads_get_equal_parts_where_tiles_are_few() -> None:
    # One row of 63 vectors: 9 tiles of 7, of which one thread gets 5, or 32 of 2.
    layer = Layer(height=1, width=1, depth=512, channels=1000)
    assert choose_tile(AVX512, **layer.shape).vectors == 2
    # Alone, nobody waits: the fewer chains, the more each waits for itself.
    assert choose_tile(replace(AVX512, threads=1), **layer.shape).vectors != 2


def test_rows_are_shared_evenly_where_threads_share_them() -> None:
    # 33 tiles of 6 rows would be cut by channels instead, and every thread read the whole input.
    layer = Layer(height=1, width=197, depth=192, channels=192)
    tile = choose_tile(AVX512, **layer.shape)
    assert -(-layer.width // tile.columns) % AVX512.threads == 0


def test_tiles_of_other_widths_are_offered_where_they_are_close() -> None:
    layer = Layer(height=1, width=197, depth=192, channels=576)
    tiles = ranked_tiles(AVX512, **layer.shape)
    rounded = {(t.vectors, -(-layer.width // t.columns) * t.columns) for t in tiles}
    assert len(rounded) == len(tiles) > len({t.vectors for t in tiles}) == 8
    assert tiles[0] == choose_tile(AVX512, **layer.shape)


def test_tiles_that_are_not_close_are_offered_once_for_each_number_of_vectors() -> None:
    layer = Layer(height=7, width=7, depth=128, channels=128)
    best, *others = ranked_tiles(AVX512, **layer.shape)
    assert best.vectors == 2
    assert len({tile.vectors for tile in others}) == len(others)
    assert CLOSE > 1


def test_a_decided_option_that_does_not_exist_any_more_is_ignored() -> None:
    machine = replace(AVX512, decided=(("pixels", "99x99"),))
    assert choose_pixels(
        machine, height=1, width=1, channels=16, depth=8, taps=1, vectors=1
    ) == (1, 1)  # fmt: skip
