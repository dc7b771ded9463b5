"""x86-64 processors that hone compiles for.

LLVM is always given a psABI level as the processor and every further extension by name, so that
the code uses exactly what a target lists: LLVM's list for a named processor also holds system
extensions and tuning flags, and a virtual machine may lack any of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .target import Target

TRIPLE = "x86_64-linux-gnu"

_PSABI = "x86-64 psABI 1.0, table 3.1 (micro-architecture levels)"
_INTEL = "Intel 64 and IA-32 Architectures Optimization Reference Manual, document 248966"
_AMD = "AMD, Software Optimization Guide for the {} Microarchitecture, document {}"
_ARK = "https://ark.intel.com: {}"
_EPYC = "https://www.amd.com/en/products/specifications/server-processor.html: {}"
_LLVM = "LLVM 22, llvm/lib/Target/X86/X86.td"
_ASSUMED = "cores and caches of a small client part, an assumption: a level names no processor"

_V1 = ("cmov", "cx8", "fxsr", "mmx", "sse", "sse2")
_V2 = (*_V1, "crc32", "cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
LEVELS: Mapping[str, tuple[str, ...]] = {
    "x86-64": _V1,
    "x86-64-v2": _V2,
    "x86-64-v3": _V3,
    "x86-64-v4": _V4,
}

# Best first: tiles do 2048 int8 operations per cycle, VNNI 256 per 512-bit unit.
_TENSOR = ("amx-int8", "amx-bf16", "avx512vnni", "avxvnni", "avx512bf16")

_ICELAKE = (
    *("avx512bitalg", "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512vnni"),
    *("avx512vpopcntdq", "gfni"),
)
_SAPPHIRE_RAPIDS = (
    *_ICELAKE,
    *("amx-bf16", "amx-int8", "amx-tile", "avx512bf16", "avx512fp16", "avxvnni"),
)
_ZEN4 = (*_ICELAKE, "avx512bf16")

_KIB, _MIB = 1024, 1024 * 1024


def level_of(features: Collection[str]) -> str:
    """Highest psABI level that is wholly present.

    Parameters
    ----------
    features : collection of str
        LLVM names.

    Returns
    -------
    str
        ``"x86-64"`` to ``"x86-64-v4"``.
    """
    # The baseline itself is taken for granted: there is no x86-64 processor without it.
    return next(name for name in reversed(tuple(LEVELS)) if set(LEVELS[name]) <= {*_V1, *features})


def vectors_of(features: Collection[str]) -> tuple[int, int]:
    """Width and number of the vector registers that generated code uses.

    Parameters
    ----------
    features : collection of str
        LLVM names.

    Returns
    -------
    tuple of int
        Bits, and registers of that width (Intel SDM volume 1, chapter 15: 32 with AVX-512VL's
        encoding, 16 before).
    """
    if {"avx512f", "avx512vl"} <= set(features):
        return 512, 32
    return (256, 16) if "avx2" in features else (128, 16)


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
    level: str,
    extra: tuple[str, ...] = (),
    *,
    cores: int,
    l1d: int,
    l2: int,
    l3: int,
    sources: tuple[str, ...],
) -> Target:
    features = tuple(sorted({*LEVELS[level], *extra}))
    vector_bits, vector_registers = vectors_of(features)
    return Target(
        name=name,
        kind="cpu",
        arch="x86_64",
        triple=TRIPLE,
        mcpu=level,
        features=features,
        cores=cores,
        vector_bits=vector_bits,
        vector_registers=vector_registers,
        l1d_bytes=l1d,
        l2_bytes=l2,
        l3_bytes=l3,
        tensor_instructions=tensor_instructions_of(features),
        sources=sources,
    )


def _level(name: str, level: str) -> Target:
    return _cpu(
        name,
        level,
        cores=4,
        l1d=32 * _KIB,
        l2=256 * _KIB,
        l3=8 * _MIB,
        sources=(_PSABI, _ASSUMED),
    )


TARGETS: tuple[Target, ...] = (
    _level("generic", "x86-64"),
    _level("x86-64-v2", "x86-64-v2"),
    _level("x86-64-v3", "x86-64-v3"),
    _level("x86-64-v4", "x86-64-v4"),
    _cpu(
        "skylake-avx512",
        "x86-64-v4",
        cores=28,
        l1d=32 * _KIB,
        l2=1 * _MIB,
        l3=39_424 * _KIB,
        sources=(_INTEL, _ARK.format("Xeon Platinum 8180"), _LLVM),
    ),
    _cpu(
        "cascadelake",
        "x86-64-v4",
        ("avx512vnni",),
        cores=28,
        l1d=32 * _KIB,
        l2=1 * _MIB,
        l3=39_424 * _KIB,
        sources=(_INTEL, _ARK.format("Xeon Platinum 8280"), _LLVM),
    ),
    _cpu(
        "icelake-server",
        "x86-64-v4",
        _ICELAKE,
        cores=40,
        l1d=48 * _KIB,
        l2=1_280 * _KIB,
        l3=60 * _MIB,
        sources=(_INTEL, _ARK.format("Xeon Platinum 8380"), _LLVM),
    ),
    _cpu(
        "sapphirerapids",
        "x86-64-v4",
        _SAPPHIRE_RAPIDS,
        cores=60,
        l1d=48 * _KIB,
        l2=2 * _MIB,
        l3=115_200 * _KIB,
        sources=(_INTEL, _ARK.format("Xeon Platinum 8490H"), _LLVM),
    ),
    _cpu(
        "zen3",
        "x86-64-v3",
        cores=64,
        l1d=32 * _KIB,
        l2=512 * _KIB,
        l3=32 * _MIB,
        sources=(_AMD.format("Zen 3", 56665), _EPYC.format("EPYC 7763"), _LLVM),
    ),
    _cpu(
        "zen4",
        "x86-64-v4",
        _ZEN4,
        cores=96,
        l1d=32 * _KIB,
        l2=1 * _MIB,
        l3=32 * _MIB,
        sources=(_AMD.format("Zen 4", 57647), _EPYC.format("EPYC 9654"), _LLVM),
    ),
    _cpu(
        "zen5",
        "x86-64-v4",
        (*_ZEN4, "avxvnni"),
        cores=128,
        l1d=48 * _KIB,
        l2=1 * _MIB,
        l3=32 * _MIB,
        sources=(_AMD.format("Zen 5", 58455), _EPYC.format("EPYC 9755"), _LLVM),
    ),
)
