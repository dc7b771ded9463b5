"""Puts memory that each run streams through into large pages of the processor (Linux).

A run of ResNet-50 reads 130 MB of weights, which in pages of 4 KiB are 32 000 translations: more
than a core keeps, and a request ahead of use waits for its translation first. Pages of 2 MiB are
64. The kernel hands them out by itself only to those who ask
(``transparent_hugepage=madvise``), and allocations made before must be moved into them
(``MADV_COLLAPSE``, Linux 6.1). Where it cannot, the pages stay as they are.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

HUGE_BYTES = 2 << 20
_MADV_COLLAPSE = 25


def merged(ranges: Iterable[tuple[int, int]], *, gap: int = 1 << 16) -> list[tuple[int, int]]:
    """Return address ranges in order, those less than ``gap`` bytes apart as one.

    Parameters
    ----------
    ranges : iterable of (int, int)
        First byte and the byte behind the last one.
    gap : int
        In bytes. An allocator's headers and rounding lie between neighbours.
    """
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start - found[-1][1] < gap:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def use_huge_pages(ranges: Iterable[tuple[int, int]]) -> int:
    """Move what lies in whole large pages of some ranges into such pages.

    Parameters
    ----------
    ranges : iterable of (int, int)
        First byte and the byte behind the last one of memory that was written already.

    Returns
    -------
    int
        Bytes that lie in large pages now; 0 where the system has none to give.
    """
    if sys.platform != "linux":
        return 0
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for start, end in merged(ranges):
        first, last = -(-start // HUGE_BYTES) * HUGE_BYTES, end // HUGE_BYTES * HUGE_BYTES
        if last > first and advise(first, last - first, _MADV_COLLAPSE) == 0:
            moved += last - first
    return moved
