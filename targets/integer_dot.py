"""Which instruction of a processor multiplies bytes and sums neighbours.

A group is `GROUP` consecutive input channels of one output lane: unsigned levels times signed
weights, added to an int32. Importing this module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from .target import Target
from .tile_product import TileProduct, has_product

GROUP = 4
"""Bytes that share one int32 lane; weights are packed in groups of it on every processor."""

SIDE, MATRIX_GROUP = 2, 8
"""Pixels, and channels, of the sums of one product of matrices, and bytes that each of them sums:
``[2, 8] x [8, 2] -> [2, 2]``."""


class IntegerDot(StrEnum):
    """How a processor sums a group of products exactly.

    ``vpmaddubsw``, the only byte product before VNNI, is not among them: it saturates pairs at
    32767, and 255 × 127 × 2 is 64770.
    """

    VPDPBUSD = "vpdpbusd"
    """AVX512-VNNI or AVX-VNNI: u8 x s8, four to a lane, 64 products in a 512-bit vector."""
    VPMADDWD = "vpmaddwd"
    """AVX2 and AVX-512BW: bytes widened to int16, two products to a lane in each of two steps."""
    TDPBUSD = "tdpbusd"
    """AMX: u8 x s8 in tiles of 16 x 16 sums; layers too small for it take `VPDPBUSD`."""
    USMMLA = "usmmla"
    """ARM i8mm: u8 x s8, two pixels by two channels, eight to a sum: twice what `USDOT` multiplies,
    which layers take that cannot fill it."""
    USDOT = "usdot"
    """ARM i8mm: u8 x s8, four to a lane."""
    SDOT = "sdot"
    """ARM dotprod: s8 x s8, four to a lane; levels are read as ``level - 128``."""

    @property
    def vector(self) -> IntegerDot:
        """The instruction on vectors: this one, or what stands beside tiles and matrices."""
        others = {IntegerDot.TDPBUSD: IntegerDot.VPDPBUSD, IntegerDot.USMMLA: IntegerDot.USDOT}
        return others.get(self, self)


LEVEL_OFFSET: Mapping[IntegerDot | None, int] = {IntegerDot.SDOT: 128}
"""What an instruction subtracts from each unsigned level; the bias gives it back."""


def integer_dot_of(target: Target) -> IntegerDot | None:
    """Return the best instruction of a processor, None where it has none.

    Parameters
    ----------
    target : Target

    Returns
    -------
    IntegerDot or None
    """
    features = set(target.features)
    if target.arch == "aarch64":
        if "i8mm" in features:
            return IntegerDot.USMMLA
        return IntegerDot.SDOT if "dotprod" in features else None
    # LLVM selects the 512-bit form from avx512vnni, narrower ones from either.
    if "avx512vnni" in features or ("avxvnni" in features and target.vector_bits <= 256):
        # Every processor with AMX has VNNI; tiles without it are not worth a case of their own.
        tiles = has_product(target, TileProduct.TDPBUSD)
        return IntegerDot.TDPBUSD if tiles else IntegerDot.VPDPBUSD
    return IntegerDot.VPMADDWD if "avx2" in features else None
