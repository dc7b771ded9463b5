"""Weights and words of depthwise integer kernels in pairs of rows; sums: test_dot_kernels."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import te

from hone.passes.lower.window import Window
from hone.passes.quantize import depthwise_kernels
from hone.targets.schedule.machine import Machine


def test_weights_of_a_window_that_begins_inside_a_word_are_moved_down() -> None:
    weight = np.array([3, -1, 2], np.int8).reshape(3, 1, 1)
    packed = depthwise_kernels.pack(weight)
    halves = packed.view(np.int16).reshape(2, 2, 2)
    np.testing.assert_array_equal(halves, [[[3, -1], [2, 0]], [[0, 3], [-1, 2]]])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"strides": (2, 1)}, False),
        ({"dilation": (2, 1)}, False),
        ({"taps": (1, 3)}, False),
    ],
)
def test_pairs_of_rows_are_for_windows_one_below_the_other(changes, expected) -> None:
    machine = Machine(lanes=16, accumulators=28, l1_bytes=48 << 10, l2_bytes=1 << 20, threads=2)
    geometry = {"taps": (3, 3), "strides": (1, 1), "dilation": (1, 1), **changes}
    window = Window(shape=(1, 9, 9, 32), padding=(1, 1, 1, 1), **geometry)
    assert depthwise_kernels.in_pairs(machine, window) is expected


def test_words_hold_the_rows_that_windows_read() -> None:
    window = Window(
        shape=(1, 7, 4, 16), taps=(3, 3), strides=(1, 1), dilation=(1, 1), padding=(1, 1, 1, 1)
    )
    data = te.placeholder(window.shape, "uint8", name="data")
    levels = te.placeholder((4,), "int32", name="levels")
    words = depthwise_kernels._words(data, window, levels[0])
    assert [int(extent) for extent in words.shape] == [1, 5, 6, 16]
