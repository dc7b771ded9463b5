"""The model of ARM's small matrices: which layers take them, in register tiles that fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from hone.passes.lower.window import Window
from hone.passes.quantize.dot_kernels import Rows
from hone.targets.integer_dot import MATRIX_GROUP
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.matrix import REGISTERS, choose_matrix_tile, ranked_matrix_tiles
from hone.targets.schedule.tile_model import Tile
from hone.targets.target import resolve

MACHINE = Machine.of(resolve("graviton3"), 2)


@dataclass(frozen=True, kw_only=True)
class Layer:
    size: tuple[int, int]
    channels: int
    filters: int
    taps: int = 1

    def tile(self, machine: Machine) -> Tile | None:
        window = Window(
            shape=(1, *self.size, self.channels),
            taps=(self.taps, self.taps),
            strides=(1, 1),
            dilation=(1, 1),
            padding=(self.taps // 2,) * 4,
        )
        matrix, vector = Rows.of(window, MATRIX_GROUP), Rows.of(window)
        return choose_matrix_tile(
            machine,
            height=self.size[0],
            width=self.size[1],
            channels=self.filters,
            matrix=(matrix.groups, self.taps * matrix.taps),
            vector=(vector.groups, self.taps * vector.taps),
        )


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (Layer(size=(56, 56), channels=64, filters=64, taps=3), True),
        (Layer(size=(7, 7), channels=512, filters=512, taps=3), True),
        (Layer(size=(1, 784), channels=96, filters=24), True),
        (Layer(size=(1, 2), channels=256, filters=1000), True),
        # One row fills half of each product.
        (Layer(size=(1, 1), channels=256, filters=1000), False),
        # Four channels fill half of a group.
        (Layer(size=(1, 784), channels=4, filters=24), False),
    ],
    ids=str,
)
def test_matrices_are_for_layers_that_fill_them(layer: Layer, taken: bool) -> None:
    assert (layer.tile(MACHINE) is not None) == taken


def test_matrices_are_left_out_when_the_target_leaves_them_out() -> None:
    layer = Layer(size=(56, 56), channels=64, filters=64, taps=3)
    for name in ("graviton3,-i8mm", "rpi5", "rpi4"):
        assert layer.tile(Machine.of(resolve(name), 2)) is None


def test_tuning_may_take_vectors_instead() -> None:
    layer = Layer(size=(28, 28), channels=32, filters=64, taps=3)
    asked: dict[str, tuple[str, ...]] = {}
    layer.tile(replace(MACHINE, asked=asked))
    point, other = asked
    assert asked[point] == ("usmmla", "usdot")
    assert other.startswith("pack 28x28x4x9 to 64")
    assert layer.tile(replace(MACHINE, decided=((point, "usdot"),))) is None


@pytest.mark.parametrize("width", [1, 2, 7, 14, 56, 197])
def test_register_tiles_fit_the_registers_and_are_even(width: int) -> None:
    ranked = ranked_matrix_tiles(MACHINE, height=4, width=width, channels=100, depth=16, taps=9)
    assert [cost for cost, _ in ranked] == sorted(cost for cost, _ in ranked)
    for _, tile in ranked:
        pairs = tile.rows * tile.columns
        assert pairs + tile.vectors + pairs * tile.vectors <= REGISTERS
        assert tile.vectors % 2 == 0


def test_worked_number_is_what_the_model_says() -> None:
    shape = {"height": 1, "width": 6, "channels": 12, "depth": 1, "taps": 1}
    costs = {tile: cost for cost, tile in ranked_matrix_tiles(MACHINE, **shape)}
    # 18 products and 3 insertions, half a cycle for the loop, and 18 sums to be stored.
    assert costs[Tile(rows=1, columns=3, vectors=6)] == 10.5 + 0.5 + 18
