"""Large pages for weights: which ranges, and that what lies in them stays as it is."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from hone.packaging.huge_pages import HUGE_BYTES, merged, use_huge_pages

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")


def test_neighbours_are_one_range_and_others_are_not() -> None:
    ranges = [(900, 1000), (0, 100), (150, 200), (140, 160), (5000, 5001)]
    assert merged(ranges, gap=64) == [(0, 200), (900, 1000), (5000, 5001)]
    assert merged([]) == []


def _huge_bytes(address: int) -> int:
    """Return how much of the mapping around an address lies in large pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


@ON_LINUX
def test_memory_keeps_its_contents_in_large_pages() -> None:
    memory = mmap.mmap(-1, 5 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint32)
    array[:] = np.arange(array.size, dtype=np.uint32)
    start = array.ctypes.data
    moved = use_huge_pages([(start, start + array.nbytes)])
    # A system without such pages moves nothing, and says so.
    assert moved % HUGE_BYTES == 0
    assert _huge_bytes(-(-start // HUGE_BYTES) * HUGE_BYTES) >= moved
    np.testing.assert_array_equal(array, np.arange(array.size, dtype=np.uint32))


@ON_LINUX
def test_memory_that_is_not_there_or_small_is_passed_over() -> None:
    memory = ctypes.create_string_buffer(4096)
    address = ctypes.addressof(memory)
    assert use_huge_pages([(address, address + 4096), (1 << 46, (1 << 46) + 4 * HUGE_BYTES)]) == 0
