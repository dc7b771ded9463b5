"""The emulator of AMX against numpy, with instructions put together by hand."""

from __future__ import annotations

import ctypes
import mmap
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

import numpy as np
import pytest

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
NP, P66, PF3, PF2 = range(4)
RET = b"\xc3"
TILERELEASE = b"\xc4\xe2\x78\x49\xc0"
PRODUCTS = {"tdpbssd": PF2, "tdpbsud": PF3, "tdpbusd": P66, "tdpbuud": NP}


def vex(prefix: int, opcode: int, tail: bytes, *, vvvv: int = 0, extended: int = 0) -> bytes:
    """Encode a three-byte VEX instruction of map 0F38; ``extended`` has bits R, X, B as 4, 2, 1."""
    return bytes([0xC4, (7 - extended) << 5 | 2, (15 - vvvv) << 3 | prefix, opcode]) + tail


def memory(
    prefix: int,
    opcode: int,
    reg: int,
    base: int | None,
    index: int | None = None,
    *,
    scale: int = 0,
    displacement: int = 0,
) -> bytes:
    """Encode an instruction with a SIB operand ``[base + index << scale + displacement]``."""
    extended = (2 if index is not None and index > 7 else 0) | (1 if (base or 0) > 7 else 0)
    sib_index = 4 if index is None else index & 7
    if base is None:
        mode, place = 0, displacement.to_bytes(4, "little", signed=True)
    elif displacement == 0 and base & 7 != RBP:
        mode, place = 0, b""
    elif -128 <= displacement < 128:
        mode, place = 1, displacement.to_bytes(1, "little", signed=True)
    else:
        mode, place = 2, displacement.to_bytes(4, "little", signed=True)
    sib = scale << 6 | sib_index << 3 | (5 if base is None else base & 7)
    return vex(prefix, opcode, bytes([mode << 6 | reg << 3 | 4, sib]) + place, extended=extended)


def ldtilecfg(base: int) -> bytes:
    return vex(NP, 0x49, bytes([base]))


def sttilecfg(base: int) -> bytes:
    return vex(P66, 0x49, bytes([base]))


def tilezero(tile: int) -> bytes:
    return vex(PF2, 0x49, bytes([0xC0 | tile << 3]))


def load(tile: int, base: int, index: int = RAX, **rest: int) -> bytes:
    return memory(PF2, 0x4B, tile, base, index, **rest)


def store(tile: int, base: int, index: int = RAX, **rest: int) -> bytes:
    return memory(PF3, 0x4B, tile, base, index, **rest)


def product(prefix: int, sums: int, left: int, right: int, opcode: int = 0x5E) -> bytes:
    return vex(prefix, opcode, bytes([0xC0 | sums << 3 | left]), vvvv=right)


def set_rax(value: int) -> bytes:
    return b"\x48\xc7\xc0" + value.to_bytes(4, "little")


def configuration(shapes: dict[int, tuple[int, int]], *, palette: int = 1) -> np.ndarray:
    """Return 64 bytes for tiles of ``(rows, bytes of a row)``."""
    bytes_ = np.zeros(64, np.uint8)
    bytes_[0] = palette
    for tile, (rows, length) in shapes.items():
        bytes_[16 + 2 * tile : 18 + 2 * tile] = np.frombuffer(
            length.to_bytes(2, "little"), np.uint8
        )
        bytes_[48 + tile] = rows
    return bytes_


class Code:
    """A page of machine code, called with the addresses of arrays in rdi, rsi, rdx, rcx."""

    def __init__(self, *instructions: bytes) -> None:
        self._page = mmap.mmap(
            -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
        self._page.write(b"".join([*instructions, RET]))

    def __call__(self, *arrays: np.ndarray) -> None:
        anchor = ctypes.c_char.from_buffer(self._page)
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(arrays))(
            ctypes.addressof(anchor)
        )
        function(*[array.ctypes.data for array in arrays])


@pytest.fixture
def emulated(amx) -> None:
    if amx.native:
        pytest.skip("this processor has tiles of its own: nothing is emulated")


def multiplied(
    prefix: int, left: np.ndarray, right: np.ndarray, sums: np.ndarray, opcode: int = 0x5E
) -> np.ndarray:
    """Run one product of tiles 5 and 2 into 7, whose rows are those of the arrays."""
    shapes = {
        7: (len(sums), sums.shape[1] * 4),
        5: (len(left), left.nbytes // len(left)),
        2: (len(right), right.nbytes // len(right)),
    }
    padded = {}
    for name, array in {"left": left, "right": right, "sums": sums}.items():
        padded[name] = np.zeros((16, 64), np.uint8)
        rows = array.reshape(len(array), -1).view(np.uint8)
        padded[name][: len(rows), : rows.shape[1]] = rows
    Code(
        ldtilecfg(RDI),
        set_rax(64),
        load(5, RSI),
        load(2, RDX),
        load(7, RCX),
        product(prefix, 7, 5, 2, opcode),
        store(7, RCX),
        TILERELEASE,
    )(configuration(shapes), padded["left"], padded["right"], padded["sums"])
    got = padded["sums"][: len(sums), : sums.shape[1] * 4]
    return np.ascontiguousarray(got).view(sums.dtype)


@pytest.mark.parametrize("shape", [(16, 16, 16), (7, 3, 5), (1, 1, 1), (16, 2, 11)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_bytes_equal_numpy_for_every_signedness(amx, rng, name, shape) -> None:
    rows, groups, lanes = shape
    left_type = np.int8 if name[4] == "s" else np.uint8
    right_type = np.int8 if name[5] == "s" else np.uint8
    left = rng.integers(0, 256, (rows, groups * 4)).astype(np.uint8).view(left_type)
    right = rng.integers(0, 256, (groups, lanes * 4)).astype(np.uint8).view(right_type)
    sums = rng.integers(-(2**31), 2**31, (rows, lanes)).astype(np.int32)
    got = multiplied(PRODUCTS[name], left, right, sums)
    matrix = right.reshape(groups, lanes, 4).transpose(0, 2, 1).reshape(groups * 4, lanes)
    want = sums.astype(np.int64) + left.astype(np.int64) @ matrix.astype(np.int64)
    np.testing.assert_array_equal(got, want.astype(np.int32))  # sums wrap around


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def flushed(values: np.ndarray) -> np.ndarray:
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values).astype(np.float32)


def half_oracle(left: np.ndarray, right: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Sum even and odd products apart, each step rounded once, as the manual writes it."""
    rows, lanes = sums.shape
    pairs = left.shape[1] // 2
    right = right.reshape(pairs, lanes, 2)
    parts = []
    for odd in (0, 1):
        part = np.zeros((rows, lanes), np.float32)
        for k in range(pairs):
            # float64 holds the product of two 12-bit numbers and, for the values used here, its sum
            # with a float32, exactly: rounding to float32 is the one of a fused operation.
            exact = left[:, 2 * k + odd, None].astype(np.float64) * right[None, k, :, odd]
            part = flushed((exact + part).astype(np.float32))
        parts.append(part)
    return flushed(flushed(sums) + flushed(parts[0] + parts[1]))


def test_products_of_bfloat16_round_as_the_manual_says(amx, rng) -> None:
    left = bfloat16(rng.normal(size=(9, 14)))
    right = bfloat16(rng.normal(size=(7, 24)))
    sums = rng.normal(size=(9, 12)).astype(np.float32)
    widened = [(x.astype(np.uint32) << 16).view(np.float32) for x in (left, right)]
    got = multiplied(PF3, left, right, sums, opcode=0x5C)
    np.testing.assert_array_equal(got, half_oracle(*widened, sums))
    assert not np.array_equal(got, sums)


def test_denormals_are_zeros_when_products_are_of_bfloat16(amx) -> None:
    tiny = np.float32(2.0**-130)  # no normal number in float32, nor in bfloat16
    left = bfloat16(np.array([[tiny, 1.0, 2.0**-70, 1.0]]))
    right = bfloat16(np.array([[2.0**100, 3.0], [2.0**-70, 0.0]]))
    sums = np.array([[tiny]], np.float32)
    # 2**-130 × 2**100 is gone, 1 × 3 is there, 2**-140 is flushed, the denormal sum too.
    np.testing.assert_array_equal(multiplied(PF3, left, right, sums, opcode=0x5C), [[3.0]])


def test_products_of_float16_keep_denormals_when_they_go_in(emulated, rng) -> None:
    left = rng.normal(size=(4, 6)).astype(np.float16)
    right = rng.normal(size=(3, 10)).astype(np.float16)
    left[0, 0], right[0, 0] = np.float16(2.0**-24), np.float16(2.0)
    sums = np.zeros((4, 5), np.float32)
    want = half_oracle(left.astype(np.float32), right.astype(np.float32), sums)
    got = multiplied(PF2, left.view(np.uint16), right.view(np.uint16), sums, opcode=0x5C)
    np.testing.assert_array_equal(got, want)


def test_loads_and_stores_move_the_bytes_of_a_tile_and_no_others(amx, rng) -> None:
    full = rng.integers(1, 256, (16, 64)).astype(np.uint8)
    out = np.full((16, 64), 9, np.uint8)
    Code(ldtilecfg(RDI), set_rax(64), load(3, RSI), store(3, RDX), TILERELEASE)(
        configuration({3: (5, 20)}), full, out
    )
    np.testing.assert_array_equal(out[:5, :20], full[:5, :20])
    assert (out[5:] == 9).all()
    assert (out[:, 20:] == 9).all()


def test_tilezero_clears_and_a_configuration_is_read_back(amx, rng) -> None:
    wanted = configuration({0: (3, 8), 6: (16, 64)})
    stored = np.zeros(64, np.uint8)
    out = rng.integers(1, 256, (3, 64)).astype(np.uint8)
    Code(
        ldtilecfg(RDI),
        sttilecfg(RSI),
        set_rax(64),
        load(0, RDX),
        tilezero(0),
        store(0, RDX),
        TILERELEASE,
    )(wanted, stored, out)
    np.testing.assert_array_equal(stored, wanted)
    assert not out[:, :8].any()
    assert out[:, 8:].all()


def test_released_tiles_have_no_configuration(amx) -> None:
    stored = np.ones(64, np.uint8)
    Code(ldtilecfg(RDI), TILERELEASE, sttilecfg(RSI))(configuration({0: (1, 4)}), stored)
    assert not stored.any()


MOVES = {
    # mov r, rsi for every base that an operand may have
    RSI: b"",
    RBX: b"\x48\x89\xf3",
    RBP: b"\x48\x89\xf5",
    8: b"\x49\x89\xf0",
    12: b"\x49\x89\xf4",
    13: b"\x49\x89\xf5",
}
# Registers that belong to the caller.
SAVE = b"\x53\x55\x41\x54\x41\x55"  # push rbx, rbp, r12, r13
RESTORE = b"\x41\x5d\x41\x5c\x5d\x5b"


@pytest.mark.parametrize("displacement", [0, 5, -7, 300])
@pytest.mark.parametrize("base", MOVES)
def test_operands_are_found_for_every_base_and_displacement(amx, rng, base, displacement) -> None:
    data = rng.integers(0, 256, 4096).astype(np.uint8)
    out = np.zeros((4, 16), np.uint8)
    Code(
        SAVE,
        MOVES[base],
        ldtilecfg(RDI),
        set_rax(24),
        load(1, base, RAX, scale=1, displacement=displacement),
        set_rax(16),
        store(1, RDX),
        TILERELEASE,
        RESTORE,
    )(configuration({1: (4, 12)}), data[1024:], out)
    rows = [data[1024 + displacement + 48 * row :][:12] for row in range(4)]
    np.testing.assert_array_equal(out[:, :12], np.stack(rows))


@pytest.mark.parametrize("index", [RCX, 9, 12])
def test_strides_are_found_for_every_index(amx, rng, index) -> None:
    data = rng.integers(0, 256, 1024).astype(np.uint8)
    out = np.zeros((3, 64), np.uint8)
    move = {RCX: b"\x48\x89\xc1", 9: b"\x49\x89\xc1", 12: b"\x49\x89\xc4"}[index]  # mov index, rax
    Code(
        SAVE,
        set_rax(20),
        move,
        ldtilecfg(RDI),
        load(1, RSI, index, scale=2),
        set_rax(64),
        store(1, RDX),
        TILERELEASE,
        RESTORE,
    )(configuration({1: (3, 64)}), data, out)
    np.testing.assert_array_equal(out, np.stack([data[80 * row :][:64] for row in range(3)]))


def test_every_row_is_the_same_when_an_operand_has_no_index(amx, rng) -> None:
    data = rng.integers(0, 256, 64).astype(np.uint8)
    out = np.zeros((3, 64), np.uint8)
    without = memory(PF2, 0x4B, 1, RSI, None)
    Code(ldtilecfg(RDI), without, set_rax(64), store(1, RDX), TILERELEASE)(
        configuration({1: (3, 64)}), data, out
    )
    np.testing.assert_array_equal(out, np.stack([data] * 3))


def test_threads_have_tiles_of_their_own(amx) -> None:
    mine, other = configuration({0: (2, 8)}), np.ones(64, np.uint8)
    Code(ldtilecfg(RDI))(mine)
    thread = threading.Thread(target=Code(sttilecfg(RDI)), args=(other,))
    thread.start()
    thread.join()
    assert not other.any()
    Code(sttilecfg(RDI), TILERELEASE)(other)
    np.testing.assert_array_equal(other, mine)


def test_instructions_are_counted(amx, emulated) -> None:
    before = amx.counts()
    Code(ldtilecfg(RDI), tilezero(0), tilezero(0), TILERELEASE)(configuration({0: (1, 4)}))
    after = amx.counts()
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {
        "ldtilecfg": 1,
        "tilezero": 2,
        "tilerelease": 1,
    }


CHILD = """
import ctypes, mmap, sys
library = ctypes.CDLL(sys.argv[1])
library.amx_emulator_install()
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex(sys.argv[2]))
config = ctypes.create_string_buffer(bytes.fromhex(sys.argv[3]), 64)
anchor = ctypes.c_char.from_buffer(page)
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(anchor))(ctypes.addressof(config))
"""


def child(amx, instructions: Sequence[bytes], config: np.ndarray) -> subprocess.CompletedProcess:
    code = b"".join([*instructions, RET]).hex()
    arguments = [sys.executable, "-c", CHILD, str(amx.emulator.path), code, config.tobytes().hex()]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=30)


ODD_ONES = {
    "unconfigured": ([tilezero(0)], {}),
    "tile without a shape": ([ldtilecfg(RDI), tilezero(1)], {0: (1, 4)}),
    "same tile twice": ([ldtilecfg(RDI), product(NP, 0, 0, 1)], {0: (4, 16), 1: (4, 16)}),
    "rows of sums and left": (
        [ldtilecfg(RDI), product(NP, 0, 1, 2)],
        {0: (4, 16), 1: (5, 16), 2: (4, 16)},
    ),
    "columns of left and rows of right": (
        [ldtilecfg(RDI), product(NP, 0, 1, 2)],
        {0: (4, 16), 1: (4, 16), 2: (5, 16)},
    ),
    "columns of sums and right": (
        [ldtilecfg(RDI), product(NP, 0, 1, 2)],
        {0: (4, 16), 1: (4, 16), 2: (4, 20)},
    ),
    "no whole groups": (
        [ldtilecfg(RDI), product(NP, 0, 1, 2)],
        {0: (4, 18), 1: (4, 16), 2: (4, 18)},
    ),
    "not one of ours": ([b"\x0f\x0b"], {}),  # ud2
}


@pytest.mark.parametrize("case", ODD_ONES)
def test_process_ends_by_sigill_when_the_manual_says_undefined(amx, emulated, case) -> None:
    instructions, shapes = ODD_ONES[case]
    done = child(amx, instructions, configuration(shapes))
    assert done.returncode == -signal.SIGILL, done.stderr
    assert ("(#UD)" in done.stderr) == (case != "not one of ours")


def broken(position: int, value: int) -> np.ndarray:
    bytes_ = configuration({0: (2, 8)})
    bytes_[position] = value
    return bytes_


@pytest.mark.parametrize(
    "config",
    [
        configuration({0: (2, 8)}, palette=2),
        configuration({0: (17, 8)}),
        configuration({0: (2, 68)}),
        configuration({0: (2, 0)}),
        configuration({0: (0, 8)}),
        broken(5, 1),
        broken(40, 1),
        broken(60, 1),
    ],
    ids=["palette", "rows", "columns", "no columns", "no rows", "byte 5", "tile 12", "row 12"],
)
def test_process_ends_by_sigsegv_when_a_configuration_is_refused(amx, emulated, config) -> None:
    done = child(amx, [ldtilecfg(RDI)], config)
    assert done.returncode == -signal.SIGSEGV
    assert "ldtilecfg: a configuration that palette 1 forbids (#GP)" in done.stderr
