from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hone.errors import ToolchainError
from hone.targets import arm, features, x86
from hone.targets.target import resolve

SKYLAKE = (
    "fpu vme cmov cx8 fxsr mmx sse sse2 syscall lm pni ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt "
    "xsave avx f16c lahf_lm abm bmi1 avx2 bmi2 avx512f avx512dq avx512cd avx512bw avx512vl"
)
SAPPHIRE_RAPIDS = SKYLAKE + (
    " avx512ifma avx512vbmi avx512_vbmi2 gfni avx512_vnni avx512_bitalg avx512_vpopcntdq "
    "avx_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8"
)
SSE, AVX, AVX512, AMX = 0x3, 0x7, 0xE7, 0x602E7
TILES = 1 << 18

# What the kernel calls a hwcap -> (word, bit), for the chips below.
HWCAPS = {
    "fp": (0, 0),
    "asimd": (0, 1),
    "evtstrm": (0, 2),
    "aes": (0, 3),
    "pmull": (0, 4),
    "sha1": (0, 5),
    "sha2": (0, 6),
    "crc32": (0, 7),
    "atomics": (0, 8),
    "fphp": (0, 9),
    "asimdhp": (0, 10),
    "cpuid": (0, 11),
    "asimdrdm": (0, 12),
    "jscvt": (0, 13),
    "fcma": (0, 14),
    "lrcpc": (0, 15),
    "dcpop": (0, 16),
    "sha3": (0, 17),
    "sm3": (0, 18),
    "sm4": (0, 19),
    "asimddp": (0, 20),
    "sha512": (0, 21),
    "sve": (0, 22),
    "asimdfhm": (0, 23),
    "dit": (0, 24),
    "uscat": (0, 25),
    "ilrcpc": (0, 26),
    "flagm": (0, 27),
    "ssbs": (0, 28),
    "sb": (0, 29),
    "paca": (0, 30),
    "pacg": (0, 31),
    "dcpodp": (1, 0),
    "sve2": (1, 1),
    "svebitperm": (1, 4),
    "flagm2": (1, 7),
    "frint": (1, 8),
    "svei8mm": (1, 9),
    "svebf16": (1, 12),
    "i8mm": (1, 13),
    "bf16": (1, 14),
    "dgh": (1, 15),
    "rng": (1, 16),
    "bti": (1, 17),
}
# Features of /proc/cpuinfo on the real boards, https://github.com/hrw/arm-socs-table.
BOARDS = {
    "rpi3": "fp asimd evtstrm crc32 cpuid",
    "rpi4": "fp asimd evtstrm crc32 cpuid",
    "rpi5": "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc "
    "dcpop asimddp",
    "graviton3": "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm "
    "jscvt fcma lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs "
    "paca pacg dcpodp svei8mm svebf16 i8mm bf16 dgh rng",
    "graviton4": "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm "
    "jscvt fcma lrcpc dcpop sha3 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca "
    "pacg dcpodp sve2 svebitperm flagm2 frint svei8mm svebf16 i8mm bf16 dgh rng bti",
}


def hwcaps(names: str) -> tuple[int, int]:
    words = [0, 0]
    for word, bit in (HWCAPS[name] for name in names.split()):
        words[word] |= 1 << bit
    return words[0], words[1]


@dataclass(frozen=True)
class Machine:
    id: str
    flags: str
    xcr0: int | None
    tiles: int
    level: str
    present: tuple[str, ...]
    absent: tuple[str, ...]


MACHINES = [
    Machine("everything", SAPPHIRE_RAPIDS, AMX, TILES, "x86-64-v4", ("amx-int8", "avx512vnni"), ()),
    Machine(
        "amx-not-permitted",
        SAPPHIRE_RAPIDS,
        AMX,
        AVX512,
        "x86-64-v4",
        ("avx512vnni", "avx512fp16", "avxvnni"),
        ("amx-tile", "amx-int8", "amx-bf16"),
    ),
    Machine(
        "amx-state-not-saved",
        SAPPHIRE_RAPIDS,
        AVX512,
        TILES,
        "x86-64-v4",
        ("avx512vnni",),
        ("amx-tile", "amx-int8", "amx-bf16"),
    ),
    Machine(
        "avx512-state-not-saved",
        SAPPHIRE_RAPIDS,
        AVX,
        0,
        "x86-64-v3",
        ("avx2", "fma", "avxvnni", "gfni"),
        ("avx512f", "avx512vnni", "amx-tile"),
    ),
    Machine(
        "no-vector-state-saved",
        SKYLAKE,
        SSE,
        0,
        "x86-64-v2",
        ("sse4.2", "bmi2", "movbe"),
        ("avx", "avx2", "fma", "f16c", "avx512f"),
    ),
    Machine("xgetbv-refused", SKYLAKE, None, 0, "x86-64-v4", ("avx512f",), ("avx512vnni",)),
    Machine("kernel-hides-avx", "cmov sse sse2 pni", 0, 0, "x86-64", ("sse3",), ("avx",)),
]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.id)
def test_x86_features_are_what_the_system_allows(machine):
    found = features.x86_features(machine.flags.split(), machine.xcr0, machine.tiles)
    assert set(machine.present) <= found
    assert not found & set(machine.absent)
    assert x86.level_of(found) == machine.level


@pytest.mark.parametrize("board", BOARDS)
def test_board_has_what_its_table_lists(board):
    target = resolve(board)
    found = features.arm_features(*hwcaps(BOARDS[board]))
    assert set(target.features) <= found
    assert not found & set(target.disabled)


def test_arm_features_need_every_bit_when_two_make_one():
    half, _ = hwcaps("fp asimd fphp aes")
    assert features.arm_features(half, 0) == {"fp-armv8", "neon"}


def test_parse_cpuinfo_keeps_what_all_processors_share():
    text = "processor\t: 0\nflags\t\t: sse sse2 avx\n\nprocessor\t: 1\nflags\t\t: sse2 sse\n"
    assert features.parse_cpuinfo(text) == {"sse", "sse2"}
    assert features.parse_cpuinfo("Features\t: fp asimd\n") == {"fp", "asimd"}
    assert features.parse_cpuinfo("") == frozenset()


def test_available_is_known_and_holds_the_baseline_on_this_machine():
    arch = features.machine()
    found = features.available(arch)
    assert found <= features.known(arch)
    baseline = {"x86_64": set(x86.LEVELS["x86-64"]), "aarch64": {"fp-armv8", "neon"}}
    assert baseline[arch] <= found


def test_available_is_empty_when_the_architecture_is_another():
    other = "aarch64" if features.machine() == "x86_64" else "x86_64"
    assert features.available(other) == frozenset()
    assert features.missing(["neon"], other) == (other,)
    assert features.missing([], other) == (other,)


def test_missing_names_what_is_not_there(monkeypatch):
    monkeypatch.setattr(features, "available", lambda arch: frozenset({"sse2", "avx2"}))
    arch = features.machine()
    assert features.missing(["avx2", "sse2"], arch) == ()
    assert features.missing(["avx512f", "avx2", "amx-tile"], arch) == ("amx-tile", "avx512f")
    assert features.missing(["a-feature-of-the-future"], arch) == ("a-feature-of-the-future",)


def test_available_says_what_to_do_when_cpuinfo_cannot_be_read(monkeypatch, tmp_path):
    monkeypatch.setattr(features, "machine", lambda: "x86_64")
    monkeypatch.setattr(features, "_CPUINFO", tmp_path / "cpuinfo")
    features.available.cache_clear()
    with pytest.raises(ToolchainError) as error:
        features.available("x86_64")
    assert str(error.value) == (
        f"the processor's features are read from {tmp_path}/cpuinfo, which cannot be read: "
        "No such file or directory.\n"
        "  hint: run hone on Linux with /proc mounted, or name the target: --target x86-64-v3."
    )
    features.available.cache_clear()


@pytest.mark.skipif(features.machine() != "x86_64", reason="xgetbv is an x86 instruction")
def test_xcr0_agrees_with_the_kernel():
    flags = features.parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    xcr0 = features._read_xcr0(flags)
    if xcr0 is None:
        pytest.skip("this system grants no executable page")
    assert xcr0 & 1, "x87 state is always enabled"
    # The kernel hides extensions whose state it does not save, so none of them may be lost here.
    tiles = features._tile_support()
    assert features.x86_features(flags, xcr0, tiles) == features.x86_features(flags, None, tiles)


def test_request_tiles_succeeds_only_when_tiles_are_there():
    assert features.request_tiles() == ("amx-tile" in features.available(features.machine()))


def test_request_tiles_is_refused_when_the_kernel_has_none(monkeypatch):
    class Kernel:
        @staticmethod
        def syscall(*_: object) -> int:
            return -1

    monkeypatch.setattr(features, "machine", lambda: "x86_64")
    monkeypatch.setattr(features, "available", lambda arch: frozenset({"amx-tile"}))
    monkeypatch.setattr(features, "_libc", Kernel)
    assert features.request_tiles() is False
    assert features._tile_support() == 0


def test_arm_machine_asks_the_auxiliary_vector(monkeypatch):
    words = dict(zip((16, 26), hwcaps(BOARDS["graviton3"]), strict=True))

    class Kernel:
        getauxval = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong)(words.__getitem__)

    monkeypatch.setattr(features, "machine", lambda: "aarch64")
    monkeypatch.setattr(features, "_libc", Kernel)
    features.available.cache_clear()
    try:
        assert set(resolve("graviton3").features) <= features.available("aarch64")
        assert features.missing(resolve("graviton4").features, "aarch64") == (
            *("altnzcv", "fptoint", "sb", "sve-bitperm", "sve2"),
        )
    finally:
        features.available.cache_clear()


def test_feature_tables_serve_every_named_part():
    assert set(arm.PARTS.values()) >= {"cortex-a72", "cortex-a76", "neoverse-v1"}


def test_features_import_nothing_heavy():
    code = (
        "import sys, hone.targets.features, hone.targets.target, hone.targets.host;"
        "print([m for m in ('tvm', 'tvm_ffi', 'onnx', 'numpy') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
