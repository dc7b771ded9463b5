from __future__ import annotations

import numpy as np
import pytest

from hone.passes.lower.weight_words import Words


@pytest.mark.parametrize(
    ("bits", "run", "fields", "word_bits", "rounded"),
    [
        (4, 64, True, 32, 64),
        (4, 12, True, 16, 12),
        (4, 3, True, 16, 4),
        (4, 7, False, 32, 8),
        (8, 64, True, 32, 64),
        (8, 64, False, 8, 64),
        (8, 3, True, 8, 3),
        (2, 24, False, 16, 24),
        (1, 24, True, 8, 24),
        (1, 1, False, 8, 8),
    ],
)
def test_words_are_the_widest_that_waste_the_least(bits, run, fields, word_bits, rounded) -> None:
    words = Words.of(bits=bits, run=run, fields=fields)
    assert (words.word_bits, words.rounded) == (word_bits, rounded)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("run", [8, 24, 32])
def test_fields_hold_levels_and_the_offset_but_for_the_last(bits, run, rng) -> None:
    words = Words.of(bits=bits, run=run, fields=True)
    if bits == 1:
        levels = (2 * rng.integers(0, 2, (3, run)) - 1).astype(np.int8)
        stored = (levels - 1) // 2
    else:
        levels = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (3, run)).astype(np.int8)
        stored = levels
    packed = words.pack(levels).astype(np.int64)
    assert packed.shape == (3, run // words.held)
    for place in range(words.held):
        if place == words.held - 1:
            field = packed >> (place * bits)
        else:
            field = ((packed >> (place * bits)) & ((1 << bits) - 1)) - words.offset
        np.testing.assert_array_equal(field, stored[:, place :: words.held])


def test_the_documented_bytes() -> None:
    levels = np.array([[-3, 5]], np.int8)
    assert Words(bits=4, word_bits=8, run=2).pack(levels).view(np.uint8).tolist() == [[93]]
    fields = Words(bits=4, word_bits=8, run=2, fields=True)
    assert fields.pack(levels).view(np.uint8).tolist() == [[5 + 16 * 5]]
