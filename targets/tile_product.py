"""Products of tiles: what AMX's instructions multiply, and in which shapes.

A tile is a register of at most 16 rows of 64 bytes; there are eight. A product is
``[rows, groups] x [groups, 16 lanes] -> [rows, 16 lanes]``, where a group is four bytes of
consecutive input channels, and a lane four bytes of output channel: the same packing as that of the
vector instructions (`integer_dot`, `half_dot`). Importing this module imports nothing heavy.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from .target import Target

TILES = 8
TILE_ROWS = 16
ROW_BYTES = 64
GROUP_BYTES = 4
LANES = ROW_BYTES // GROUP_BYTES
"""Sums of one row of a tile."""


class TileProduct(StrEnum):
    """An instruction that multiplies two tiles and adds to a third."""

    TDPBUSD = "tdpbusd"
    """u8 x s8, four to a lane, summed in int32: exact."""
    TDPBF16PS = "tdpbf16ps"
    """Pairs of bfloat16, summed in float32, even and odd ones apart; denormals count as zero."""


@dataclass(frozen=True, kw_only=True)
class TileForm:
    """The element types of a product.

    Parameters
    ----------
    left, right, sums : str
        dtypes. TVM computes inner stages of bfloat16 in float32: they hold its bits, as uint16.
    stored : str
        dtype of a left operand that another kernel has stored, where it is read in place.
    group : int
        Elements of left and right in four bytes.
    feature : str
        LLVM's name of the extension.
    """

    left: str
    stored: str
    right: str
    sums: str
    group: int
    feature: str


FORMS: Mapping[TileProduct, TileForm] = {
    TileProduct.TDPBUSD: TileForm(
        left="uint8",
        stored="uint8",
        right="int8",
        sums="int32",
        group=4,
        feature="amx-int8",
    ),
    TileProduct.TDPBF16PS: TileForm(
        left="uint16",
        stored="bfloat16",
        right="uint16",
        sums="float32",
        group=2,
        feature="amx-bf16",
    ),
}


def has_product(target: Target, product: TileProduct) -> bool:
    """Say whether a processor has an instruction.

    Parameters
    ----------
    target : Target
    product : TileProduct
    """
    return {"amx-tile", FORMS[product].feature} <= set(target.features)


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """The tiles of one kernel.

    Parameters
    ----------
    product : TileProduct
        Multiplies them.
    rows : int
        Rows of the left operand and of the sums, at most 16.
    groups : int
        Groups of four bytes that one product sums, at most 16: columns of the left operand, rows
        of the right one.
    left_tiles, right_tiles : int
        Tiles of rows and tiles of lanes that share their loads; each pair has its own sums, so
        ``left_tiles x right_tiles`` is at most 4, and the sum of both too.
    """

    product: TileProduct
    rows: int
    groups: int
    left_tiles: int
    right_tiles: int

    @property
    def depth(self) -> int:
        """Input channels of one product."""
        return self.groups * FORMS[self.product].group

    @property
    def block_rows(self) -> int:
        """Rows whose sums are in tiles at once."""
        return self.rows * self.left_tiles

    @property
    def block_lanes(self) -> int:
        """Output channels whose sums are in tiles at once."""
        return LANES * self.right_tiles


# Sums are in tiles 0 to 3, the left operand from 4 on, the right one from 7 on downwards.
FIRST_LEFT, LAST_RIGHT = 4, 7


def tile_configuration(rows: int, groups: int, left_tiles: int) -> bytes:
    """Return the 64 bytes that ``ldtilecfg`` reads, for the numbering of this module.

    Byte 0 is the palette, from byte 16 on two bytes for each tile say how long its rows are, and
    from byte 48 on one byte how many rows it has. Worked number: 14 rows of 12 groups with two left
    tiles: tiles 0 to 3 are 14 x 64 bytes, 4 and 5 are 14 x 48, 6 and 7 are 12 x 64.

    Parameters
    ----------
    rows, groups, left_tiles : int
        See `TileShape`.
    """
    configuration = bytearray(64)
    configuration[0] = 1
    for tile in range(TILES):
        left = FIRST_LEFT <= tile < FIRST_LEFT + left_tiles
        right = tile >= FIRST_LEFT + left_tiles
        length = groups * GROUP_BYTES if left else ROW_BYTES
        configuration[16 + 2 * tile : 18 + 2 * tile] = length.to_bytes(2, "little")
        configuration[48 + tile] = groups if right else rows
    return bytes(configuration)
