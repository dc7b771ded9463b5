"""How levels of a few bits lie in the words that a kernel loads, and how they come out again.

Levels that follow each other along the sum share a word, and words of neighbouring output channels
share a vector: ``[ceil(K / tk), words, tk]``. There are two ways out, each a few operations for a
vector of levels:

- *shifts*: to the top and arithmetically back down, then to float;
- *fields*: all bits but those of one level are masked away, and what stands there, ``2^(b i)``
  times too large, becomes a float; the activation that it multiplies was made ``2^(b i)`` times
  smaller before, which is exact. They hold ``level + 2^(b-1)``, and the sum of the activations
  corrects for it. Only the last field is shifted down, and holds the level itself. The levels
  -1 and 1 of one bit are ``2 q + 1``, and what is stored is q, -1 or 0.

Worked number: the 4-bit levels -3 and 5 in a byte of shifts are 13 + 16 × 5 = 93; in a byte of
fields 5 + 16 × 5 = 85, and 85 & 0xF = 5 = -3 + 8, and 85 & 0xF0 = 80 = 16 × 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import relax, tirx

from hone.passes.quantize.bit_packing import pack_words
from hone.passes.quantize.decode_operator import Decoded

WORD_BITS = (32, 16, 8)
ONE, SIGN = 0x3F800000, -0x80000000
MANTISSA_BITS, EXPONENT_BIAS = 23, 127


@dataclass(frozen=True, kw_only=True)
class Words:
    """How runs of levels along the sum are cut into words.

    Parameters
    ----------
    bits : int
        Of a level.
    word_bits : int
        Of a word. The widest that wastes the least: a run is filled up to whole words.
    run : int
        Levels of one run: a group of a matrix product, the input channels of a convolution.
    fields : bool
        Levels come out as fields, else by shifts.
    """

    bits: int
    word_bits: int
    run: int
    fields: bool = False

    @classmethod
    def of(cls, *, bits: int, run: int, fields: bool = False) -> Words:
        """Return the cut of runs of a length."""
        if bits == 8 and not fields:
            return cls(bits=8, word_bits=8, run=run)
        each = {word: word // bits for word in WORD_BITS}
        best = min(WORD_BITS, key=lambda word: (-(-run // each[word]) * each[word], -word))
        return cls(bits=bits, word_bits=best, run=run, fields=fields)

    @property
    def held(self) -> int:
        """Levels in a word."""
        return self.word_bits // self.bits

    @property
    def rounded(self) -> int:
        """Levels of a run with those that fill its last word."""
        return -(-self.run // self.held) * self.held

    def pack(self, levels: np.ndarray) -> np.ndarray:
        """Pack int8 ``[..., run]`` into signed words ``[..., rounded / held]``."""
        if self.bits == 1:
            # A bit is the sign: of the float that it becomes, or of the -1 or 0 in a field.
            levels = -levels
        packed = pack_words(levels, self.bits, self.word_bits)
        if self.fields:
            tops = (1 << (at * self.bits + self.bits - 1) for at in range(self.held - 1))
            packed = packed ^ packed.dtype.type(sum(tops))
        return packed.view(f"int{self.word_bits}")

    @property
    def offset(self) -> int:
        """What all fields but the last are larger than their levels."""
        return 1 << (self.bits - 1)

    def field(self, word: tirx.Expr, at: tirx.Expr) -> tirx.Expr:
        """Return a field of a word as float32, ``2^(b × at)`` times too large but for the last."""
        word, place = tirx.Cast("int32", word), tirx.Cast("int32", at)
        # Unsigned, since TVM builds the mask of the last field too before it drops it.
        shift = tirx.Cast("uint32", place * self.bits)
        mask = tirx.const((1 << self.bits) - 1, "uint32") << shift
        field = tirx.Cast("int32", tirx.Cast("uint32", word) & mask)
        last = word >> (self.word_bits - self.bits)
        return tirx.Cast("float32", tirx.Select(place == self.held - 1, last, field))

    def share(self, at: tirx.Expr) -> tirx.Expr:
        """Return ``2^-(b × at)`` as float32, 1 for the last field."""
        place = tirx.Cast("int32", at)
        return power_of_two(tirx.Select(place == self.held - 1, 0, place * -self.bits))

    def level(self, word: tirx.Expr, at: tirx.Expr) -> tirx.Expr:
        """Return one level of a word as float32.

        Two shifts bring the sign of the level to the top and the level back down; of one bit, the
        shifted sign is put on 1.0.
        """
        if self.bits == 8:
            return tirx.Cast("float32", word)
        word, at = tirx.Cast("int32", word), tirx.Cast("int32", at)
        if self.bits == 1:
            sign = (word << (31 - at)) & tirx.const(SIGN, "int32")
            return tirx.reinterpret("float32", sign | tirx.const(ONE, "int32"))
        top = word << (32 - self.bits - at * self.bits)
        return tirx.Cast("float32", top >> (32 - self.bits))


def power_of_two(exponent: tirx.Expr) -> tirx.Expr:
    """Return two to an int32 exponent of [-126, 127] as float32."""
    return tirx.reinterpret("float32", (exponent + EXPONENT_BIAS) << MANTISSA_BITS)


def scale_value(scale: tirx.Expr) -> tirx.Expr:
    """Return a scale as float32; an int8 one is an exponent of two."""
    return scale if scale.dtype == "float32" else power_of_two(tirx.Cast("int32", scale))


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """The constants of a kernel.

    Parameters
    ----------
    words : numpy.ndarray
        Signed integers ``[ceil(K / tk), ..., tk]``.
    scale : numpy.ndarray
        float32 or int8 ``[ceil(K / tk), G, tk]``.
    zero_point : numpy.ndarray or None
        int8, the shape of ``scale``.
    """

    words: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None

    @classmethod
    def of(cls, decoded: Decoded, words: np.ndarray, tile: int) -> Packed:
        """Tile words ``[K, ...]`` and the scales that belong to them by output channels."""
        levels = decoded.levels
        channels = len(words)
        shape = (channels, levels.scale.shape[1])
        scale = np.broadcast_to(levels.scale, shape)
        if levels.power_of_two:
            scale = np.log2(scale).astype(np.int8)
        zero = levels.zero_point
        return cls(
            words=tiled(words, tile),
            scale=tiled(scale, tile),
            zero_point=None if zero is None else tiled(np.broadcast_to(zero, shape), tile),
        )

    def constants(self) -> list[relax.Constant]:
        """Return them as arguments of a call."""
        arrays = [self.words, self.scale]
        if self.zero_point is not None:
            arrays.append(self.zero_point)
        return [relax.const(array, str(array.dtype)) for array in arrays]


def tiled(values: np.ndarray, tile: int) -> np.ndarray:
    """Return ``[K, ...]`` as ``[ceil(K / tile), ..., tile]`` with zeros in the rounding."""
    channels = len(values)
    rounded = -(-channels // tile) * tile
    padded = np.zeros((rounded, *values.shape[1:]), values.dtype)
    padded[:channels] = values
    blocked = padded.reshape(rounded // tile, tile, *values.shape[1:])
    return np.ascontiguousarray(np.moveaxis(blocked, 1, -1))
