"""Which instruction of a processor multiplies pairs of 16-bit floats and adds them to a float32.

A pair is two consecutive input channels of one output lane, four bytes together: as large as a
float32, so that the schedules of float kernels hold with pairs for channels. Importing this module
imports nothing heavy.
"""

from __future__ import annotations

from enum import StrEnum

from .target import Target
from .tile_product import TileProduct, has_product

PAIR = 2
"""Channels that share one float32 lane."""

BFLOAT16 = "bfloat16"
FLOAT16 = "float16"
DTYPES = (BFLOAT16, FLOAT16)
"""The 16-bit floats: bfloat16 has the range of float32 and 8 bits of precision, float16 has 11."""


class HalfDot(StrEnum):
    """How a processor sums pairs of bfloat16 products in float32.

    float16 has no such instruction in the tables: ARM's ``fmlal`` does as many products as the
    float32 form, and ``fmla`` on eight lanes adds in float16, whose sums lose more than the storage
    does (docs/performance.md).
    """

    VDPBF16PS = "vdpbf16ps"
    """AVX512-BF16: 32 products in a 512-bit vector. Denormals count as zero."""
    TDPBF16PS = "tdpbf16ps"
    """AMX: tiles of 16 x 16 sums; layers too small for it take `VDPBF16PS`."""
    BFDOT = "bfdot"
    """ARM bf16: 8 products in a 128-bit vector."""

    @property
    def vector(self) -> HalfDot:
        """The instruction on vectors: this one, or what stands beside tiles."""
        return HalfDot.VDPBF16PS if self is HalfDot.TDPBF16PS else self


def half_dot_of(target: Target, dtype: str = BFLOAT16) -> HalfDot | None:
    """Return the instruction of a processor for a 16-bit float, None where it has none.

    Parameters
    ----------
    target : Target
    dtype : str
        One of `DTYPES`.

    Returns
    -------
    HalfDot or None
    """
    if dtype != BFLOAT16:
        return None
    features = set(target.features)
    if target.arch == "aarch64":
        return HalfDot.BFDOT if "bf16" in features else None
    if not {"avx512bf16", "avx512vl"} <= features:
        # Every processor with AMX has them; tiles without are not worth a case of their own.
        return None
    tiles = has_product(target, TileProduct.TDPBF16PS)
    return HalfDot.TDPBF16PS if tiles else HalfDot.VDPBF16PS
