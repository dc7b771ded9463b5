"""Levels of a few bits, several to a byte or word. Numerics: exact."""

from __future__ import annotations

import numpy as np


def pack(levels: np.ndarray, bits: int) -> np.ndarray:
    """Pack levels along the last axis, the first one in the lowest bits of a byte.

    Worked number: the 4-bit levels -3 and 5 are 13 and 5 in two's complement, and make the byte
    13 + 16 × 5 = 93. The 1-bit levels 1, -1, 1 (bits 1, 0, 1) make 5.

    Parameters
    ----------
    levels : numpy.ndarray
        int8 ``[..., D]``: two's complement of ``bits`` bits; of 1 bit: -1 or 1.
    bits : {8, 4, 2, 1}
        Of a level.

    Returns
    -------
    numpy.ndarray
        uint8 ``[..., ceil(D × bits / 8)]``; what is left of the last byte is 0.
    """
    return pack_words(levels, bits, 8)


def pack_words(levels: np.ndarray, bits: int, word_bits: int) -> np.ndarray:
    """Pack levels along the last axis as `pack` does, into words of 8, 16 or 32 bits.

    Parameters
    ----------
    levels : numpy.ndarray
        int8 ``[..., D]``.
    bits : {8, 4, 2, 1}
        Of a level.
    word_bits : {8, 16, 32}
        Of a word.

    Returns
    -------
    numpy.ndarray
        Unsigned integers ``[..., ceil(D × bits / word_bits)]``.
    """
    each = word_bits // bits
    depth = levels.shape[-1]
    words = -(-depth // each)
    fields = np.zeros((*levels.shape[:-1], words * each), np.uint32)
    if bits == 1:
        fields[..., :depth] = levels > 0
    else:
        fields[..., :depth] = levels.astype(np.int32) & ((1 << bits) - 1)
    shifted = fields.reshape(*levels.shape[:-1], words, each) << np.arange(
        0, word_bits, bits, dtype=np.uint32
    )
    return np.asarray(np.bitwise_or.reduce(shifted, axis=-1), f"uint{word_bits}")


def unpack(packed: np.ndarray, bits: int, depth: int) -> np.ndarray:
    """Return the levels that `pack` packed.

    Parameters
    ----------
    packed : numpy.ndarray
        uint8 ``[..., ceil(depth × bits / 8)]``.
    bits : {8, 4, 2, 1}
        Of a level.
    depth : int
        Levels in the last axis.

    Returns
    -------
    numpy.ndarray
        int8 ``[..., depth]``.
    """
    fields = packed[..., None].astype(np.int32) >> np.arange(0, 8, bits)
    fields = fields.reshape(*packed.shape[:-1], -1)[..., :depth] & ((1 << bits) - 1)
    if bits == 1:
        return np.asarray(2 * fields - 1, np.int8)
    sign = 1 << (bits - 1)
    return np.asarray((fields ^ sign) - sign, np.int8)
