"""Tiles are configured once in each thread, around the loops that use them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T  # noqa: N812

from hone.passes.lower.configure_tiles import ConfigureTiles
from hone.targets.tile_intrinsics import CONFIGURE
from hone.targets.tile_product import tile_configuration


def loops(kind: str) -> tvm.IRModule:
    @T.prim_func(s_tir=True)
    def parallel(a: T.Buffer((8, 4), "int32")):
        for i in T.parallel(8, annotations={CONFIGURE: [14, 12, 2]}):
            for j in range(4):
                a[i, j] = 1

    @T.prim_func(s_tir=True)
    def serial(a: T.Buffer((8, 4), "int32")):
        for i in T.serial(8, annotations={CONFIGURE: [14, 12, 2]}):
            for j in range(4):
                a[i, j] = 1

    @T.prim_func(s_tir=True)
    def plain(a: T.Buffer((8, 4), "int32")):
        for i in T.parallel(8):
            for j in range(4):
                a[i, j] = 1

    return tvm.IRModule({"main": {"parallel": parallel, "serial": serial, "plain": plain}[kind]})


def lines(module: tvm.IRModule) -> list[str]:
    return [line.strip() for line in module.script().splitlines()]


def position(module: tvm.IRModule, text: str) -> int:
    (found,) = (at for at, line in enumerate(lines(module)) if text in line)
    return found


def test_every_iteration_configures_when_a_loop_is_parallel() -> None:
    after = ConfigureTiles()(loops("parallel"))
    order = ["T.parallel(8)", "ldtilecfg", "in range(4)", "tilerelease"]
    assert sorted(order, key=lambda text: position(after, text)) == order
    assert CONFIGURE not in after.script()


def test_the_loop_is_configured_as_a_whole_when_it_is_serial() -> None:
    after = ConfigureTiles()(loops("serial"))
    order = ["ldtilecfg", "T.grid(8, 4)", "tilerelease"]
    assert sorted(order, key=lambda text: position(after, text)) == order


def test_words_of_the_configuration_are_stored_in_order() -> None:
    after = ConfigureTiles()(loops("serial"))
    words = np.frombuffer(tile_configuration(14, 12, 2), "<i4")
    stored = [line for line in lines(after) if line.startswith("tile_configuration[")]
    assert stored == [f"tile_configuration[{at}] = {word}" for at, word in enumerate(words)]


def test_function_is_left_alone_when_it_has_no_tiles() -> None:
    before = loops("plain")
    assert ConfigureTiles()(before)["main"].same_as(before["main"])


@pytest.mark.parametrize(("left", "right"), [(2, 2), (3, 1), (1, 3), (1, 1)])
def test_configuration_gives_every_operand_its_shape(left: int, right: int) -> None:
    content = np.frombuffer(tile_configuration(14, 12, left), np.uint8)
    shapes = [
        (int(rows), int(length))
        for rows, length in zip(content[48:56], content[16:32].view("<u2"), strict=True)
    ]
    assert content[0] == 1
    assert not content[1:16].any()
    assert shapes[:4] == [(14, 64)] * 4
    assert shapes[4 : 4 + left] == [(14, 48)] * left
    assert shapes[8 - right :] == [(12, 64)] * right
