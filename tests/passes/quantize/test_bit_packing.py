from __future__ import annotations

import numpy as np
import pytest

from hone.passes.quantize.bit_packing import pack, pack_words, unpack


def levels_of(bits: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if bits == 1:
        return (2 * rng.integers(0, 2, shape) - 1).astype(np.int8)
    return rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape).astype(np.int8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("depth", [1, 2, 3, 7, 8, 9, 31, 32, 33, 64])
def test_unpacking_gives_back_what_was_packed(bits, depth, rng) -> None:
    levels = levels_of(bits, (3, depth), rng)
    packed = pack(levels, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (3, -(-depth * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, depth), levels)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("word_bits", [8, 16, 32])
def test_words_are_the_bytes_in_little_endian_order(bits, word_bits, rng) -> None:
    levels = levels_of(bits, (5, 64), rng)
    words = pack_words(levels, bits, word_bits)
    assert words.dtype == np.dtype(f"uint{word_bits}")
    np.testing.assert_array_equal(words.view(np.uint8), pack(levels, bits))


def test_the_documented_bytes() -> None:
    assert pack(np.array([-3, 5], np.int8), 4).tolist() == [93]
    assert pack(np.array([1, -1, 1], np.int8), 1).tolist() == [5]


def test_every_byte_is_unpacked_to_levels_that_pack_to_it() -> None:
    every = np.arange(256, dtype=np.uint8)[:, None]
    for bits in (1, 2, 4, 8):
        np.testing.assert_array_equal(pack(unpack(every, bits, 8 // bits), bits), every)
