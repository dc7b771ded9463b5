"""64-bit ARM boards and servers that hone compiles for.

LLVM is given the core's own name, whose pipeline model decides much on the small in-order cores,
plus every extension by name, and ``-name`` for what a chip left out of that core.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .target import Target

TRIPLE = "aarch64-linux-gnu"
# The wheels of the runtime that a board gets are manylinux_2_28.
GLIBC = "2.28"

_RPI = "https://www.raspberrypi.com/documentation/computers/processors.html: {}"
_TRM = "Arm {} Core Technical Reference Manual"
# Dumps of /proc/cpuinfo: what a chip's kernel reports, its missing cryptography included.
_CPUINFO = "https://github.com/hrw/arm-socs-table, cpuinfo-data/{}"
_GRAVITON = "https://github.com/aws/aws-graviton-getting-started/blob/main/README.md"
_LLVM = "LLVM 22, llvm/lib/Target/AArch64/AArch64Processors.td"

_V8 = ("crc", "fp-armv8", "neon")
_CRYPTO_FEATURES = ("aes", "sha2")
_V8_2 = (*_V8, *_CRYPTO_FEATURES, "ccpp", "dotprod", "fullfp16", "lse", "rcpc", "rdm")
_V1 = (
    *_V8_2,
    *("bf16", "ccdp", "complxnum", "dit", "flagm", "fp16fml", "i8mm", "jsconv", "lse2"),
    *("rcpc-immo", "sve"),
)
_NEOVERSE_V1 = (*_V1, "sha3", "sm4")
_NEOVERSE_V2 = (*_V1, "altnzcv", "fptoint", "sb", "sve-bitperm", "sve2")

# Best first: smmla does 32 multiply-adds per 128-bit instruction, sdot 16, bfmmla 16 of bf16.
_TENSOR = ("i8mm", "dotprod", "bf16")

# NEON has 32 registers of 128 bits (Arm ARM DDI 0487, B1.2.1). SVE is not used yet: code of fixed
# 128-bit vectors runs at the same width on Neoverse V2, and at half of it on V1.
VECTOR_BITS, VECTOR_REGISTERS = 128, 32

# MIDR_EL1 (implementer, part) as /proc/cpuinfo prints them -> LLVM name; from LLVM 22,
# llvm/lib/TargetParser/Host.cpp.
PARTS: Mapping[tuple[int, int], str] = {
    (0x41, 0xD03): "cortex-a53",
    (0x41, 0xD05): "cortex-a55",
    (0x41, 0xD07): "cortex-a57",
    (0x41, 0xD08): "cortex-a72",
    (0x41, 0xD09): "cortex-a73",
    (0x41, 0xD0A): "cortex-a75",
    (0x41, 0xD0B): "cortex-a76",
    (0x41, 0xD0C): "neoverse-n1",
    (0x41, 0xD0D): "cortex-a77",
    (0x41, 0xD40): "neoverse-v1",
    (0x41, 0xD41): "cortex-a78",
    (0x41, 0xD42): "cortex-a78ae",
    (0x41, 0xD44): "cortex-x1",
    (0x41, 0xD49): "neoverse-n2",
    (0x41, 0xD4F): "neoverse-v2",
    (0xC0, 0xAC3): "ampere1",
    (0xC0, 0xAC4): "ampere1a",
}

_KIB, _MIB = 1024, 1024 * 1024


def tensor_instructions_of(features: Collection[str]) -> tuple[str, ...]:
    """Dot product and matrix extensions, best first.

    Parameters
    ----------
    features : collection of str
        LLVM names.

    Returns
    -------
    tuple of str
    """
    return tuple(name for name in _TENSOR if name in features)


def _cpu(
    name: str,
    mcpu: str,
    features: tuple[str, ...],
    *,
    cores: int,
    l1d: int,
    l2: int,
    l3: int,
    sources: tuple[str, ...],
    disabled: tuple[str, ...] = (),
) -> Target:
    return Target(
        name=name,
        kind="cpu",
        arch="aarch64",
        triple=TRIPLE,
        mcpu=mcpu,
        features=tuple(sorted(features)),
        disabled=disabled,
        cores=cores,
        vector_bits=VECTOR_BITS,
        vector_registers=VECTOR_REGISTERS,
        l1d_bytes=l1d,
        l2_bytes=l2,
        l3_bytes=l3,
        tensor_instructions=tensor_instructions_of(features),
        glibc=GLIBC,
        sources=sources,
    )


# A level 2 cache shared by the four cores of a board counts a quarter for each.
TARGETS: tuple[Target, ...] = (
    _cpu(
        "rpi3",
        "cortex-a53",
        _V8,
        disabled=_CRYPTO_FEATURES,
        cores=4,
        l1d=32 * _KIB,
        l2=128 * _KIB,
        l3=0,
        sources=(
            _RPI.format("BCM2837"),
            _TRM.format("Cortex-A53"),
            _CPUINFO.format("raspberry-pi3b"),
            _LLVM,
        ),
    ),
    _cpu(
        "rpi4",
        "cortex-a72",
        _V8,
        disabled=_CRYPTO_FEATURES,
        cores=4,
        l1d=32 * _KIB,
        l2=256 * _KIB,
        l3=0,
        sources=(
            _RPI.format("BCM2711"),
            _TRM.format("Cortex-A72"),
            _CPUINFO.format("raspberry-pi4"),
            _LLVM,
        ),
    ),
    _cpu(
        "rpi5",
        "cortex-a76",
        _V8_2,
        cores=4,
        l1d=64 * _KIB,
        l2=512 * _KIB,
        l3=2 * _MIB,
        sources=(
            _RPI.format("BCM2712"),
            _TRM.format("Cortex-A76"),
            _CPUINFO.format("raspberry-pi5"),
            _LLVM,
        ),
    ),
    _cpu(
        "jetson-orin",
        "cortex-a78ae",
        _V8_2,
        cores=12,
        l1d=64 * _KIB,
        l2=256 * _KIB,
        l3=2 * _MIB,
        sources=(
            "NVIDIA Jetson AGX Orin Series Technical Brief v1.2",
            _TRM.format("Cortex-A78AE"),
            _LLVM,
        ),
    ),
    _cpu(
        "graviton2",
        "neoverse-n1",
        _V8_2,
        cores=64,
        l1d=64 * _KIB,
        l2=1 * _MIB,
        l3=32 * _MIB,
        sources=(_GRAVITON, _TRM.format("Neoverse N1"), _LLVM),
    ),
    _cpu(
        "graviton3",
        "neoverse-v1",
        _NEOVERSE_V1,
        cores=64,
        l1d=64 * _KIB,
        l2=1 * _MIB,
        l3=32 * _MIB,
        sources=(_GRAVITON, _CPUINFO.format("graviton3"), _LLVM),
    ),
    _cpu(
        "graviton4",
        "neoverse-v2",
        _NEOVERSE_V2,
        cores=96,
        l1d=64 * _KIB,
        l2=2 * _MIB,
        l3=36 * _MIB,
        sources=(
            _GRAVITON,
            _CPUINFO.format("graviton4"),
            _LLVM,
        ),
    ),
)
