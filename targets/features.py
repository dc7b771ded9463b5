"""Instruction set extensions that this machine really offers, by their LLVM names.

Pure Python and ctypes: the package runtime asks here before it maps any code.

On x86 the kernel's ``flags`` in /proc/cpuinfo are what cpuid reports minus what the kernel turned
off; the register state that the operating system saves (XCR0) is asked for by executing xgetbv,
and AMX, which a process must be granted, through arch_prctl. On ARM the kernel's hwcaps say it.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from hone.errors import ToolchainError

_CPUINFO = Path("/proc/cpuinfo")

# LLVM name -> flag in /proc/cpuinfo (arch/x86/include/asm/cpufeatures.h of Linux 6.12). Only what
# code generated for tensors can come to use: no system, virtualization or cryptography extensions.
X86_FLAGS: Mapping[str, str] = {
    "cmov": "cmov",
    "cx8": "cx8",
    "fxsr": "fxsr",
    "mmx": "mmx",
    "sse": "sse",
    "sse2": "sse2",
    "crc32": "sse4_2",
    "cx16": "cx16",
    "popcnt": "popcnt",
    "sahf": "lahf_lm",
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "ssse3": "ssse3",
    "avx": "avx",
    "avx2": "avx2",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "f16c": "f16c",
    "fma": "fma",
    "lzcnt": "abm",
    "movbe": "movbe",
    "xsave": "xsave",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512f": "avx512f",
    "avx512vl": "avx512vl",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512fp16": "avx512_fp16",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxifma": "avx_ifma",
    "avxvnni": "avx_vnni",
    "gfni": "gfni",
    "amx-bf16": "amx_bf16",
    "amx-fp16": "amx_fp16",
    "amx-int8": "amx_int8",
    "amx-tile": "amx_tile",
}

# LLVM name -> (auxiliary vector entry, bits that must all be set), from Linux 6.12
# arch/arm64/include/uapi/asm/hwcap.h. FEAT_FP16 and FEAT_AES are two hwcaps each.
_HWCAP, _HWCAP2 = 16, 26
ARM_HWCAPS: Mapping[str, tuple[int, int]] = {
    "fp-armv8": (_HWCAP, 1 << 0),
    "neon": (_HWCAP, 1 << 1),
    "aes": (_HWCAP, 1 << 3 | 1 << 4),
    "sha2": (_HWCAP, 1 << 5 | 1 << 6),
    "crc": (_HWCAP, 1 << 7),
    "lse": (_HWCAP, 1 << 8),
    "fullfp16": (_HWCAP, 1 << 9 | 1 << 10),
    "rdm": (_HWCAP, 1 << 12),
    "jsconv": (_HWCAP, 1 << 13),
    "complxnum": (_HWCAP, 1 << 14),
    "rcpc": (_HWCAP, 1 << 15),
    "ccpp": (_HWCAP, 1 << 16),
    "sha3": (_HWCAP, 1 << 17 | 1 << 21),
    "sm4": (_HWCAP, 1 << 18 | 1 << 19),
    "dotprod": (_HWCAP, 1 << 20),
    "sve": (_HWCAP, 1 << 22),
    "fp16fml": (_HWCAP, 1 << 23),
    "dit": (_HWCAP, 1 << 24),
    "lse2": (_HWCAP, 1 << 25),
    "rcpc-immo": (_HWCAP, 1 << 26),
    "flagm": (_HWCAP, 1 << 27),
    "sb": (_HWCAP, 1 << 29),
    "ccdp": (_HWCAP2, 1 << 0),
    "sve2": (_HWCAP2, 1 << 1),
    "sve-bitperm": (_HWCAP2, 1 << 4),
    "altnzcv": (_HWCAP2, 1 << 7),
    "fptoint": (_HWCAP2, 1 << 8),
    "f32mm": (_HWCAP2, 1 << 10),
    "f64mm": (_HWCAP2, 1 << 11),
    "i8mm": (_HWCAP2, 1 << 13),
    "bf16": (_HWCAP2, 1 << 14),
}

# XCR0 bits that the operating system must have set (Intel SDM volume 1, 13.3): SSE and AVX state;
# with AVX-512 also opmask, ZMM_Hi256 and Hi16_ZMM; with AMX XTILECFG and XTILEDATA.
_AVX_STATE = 1 << 1 | 1 << 2
_AVX512_STATE = _AVX_STATE | 1 << 5 | 1 << 6 | 1 << 7
_TILE_DATA = 18
_AMX_STATE = 1 << 17 | 1 << _TILE_DATA
# Features outside the avx*/amx* names that use ymm registers.
_VEX_CODED = frozenset({"f16c", "fma"})

# arch_prctl(2) of Linux 5.16 and later, Documentation/arch/x86/xstate.rst.
_SYS_ARCH_PRCTL = 158
_ARCH_GET_XCOMP_SUPP = 0x1021
_ARCH_REQ_XCOMP_PERM = 0x1023

# xor ecx, ecx; xgetbv; shl rdx, 32; or rax, rdx; ret
_XGETBV = bytes.fromhex("31c9 0f01d0 48c1e220 4809d0 c3")


def machine() -> str:
    """Instruction set of this machine.

    Returns
    -------
    str
        ``"x86_64"``, ``"aarch64"``, or what the kernel calls it.
    """
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def known(arch: str) -> frozenset[str]:
    """Extensions that hone can look for.

    Parameters
    ----------
    arch : {"x86_64", "aarch64"}
        Instruction set.

    Returns
    -------
    frozenset of str
        LLVM names; empty for another architecture.
    """
    return frozenset({"x86_64": X86_FLAGS, "aarch64": ARM_HWCAPS}.get(arch, {}))


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Read the flags that every processor of a /proc/cpuinfo has.

    Parameters
    ----------
    text : str
        The file's contents.

    Returns
    -------
    frozenset of str
        The kernel's names (``flags`` on x86, ``Features`` on ARM).
    """
    rows = [
        frozenset(value.split())
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key.strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*rows) if rows else frozenset()


def x86_features(flags: Iterable[str], xcr0: int | None, tile_permission: int) -> frozenset[str]:
    """Extensions of an x86 processor that its operating system lets a process use.

    Parameters
    ----------
    flags : iterable of str
        Names in /proc/cpuinfo.
    xcr0 : int or None
        Register state that the operating system saves; None where it could not be read, and the
        kernel's flags alone decide.
    tile_permission : int
        Mask of ``ARCH_GET_XCOMP_SUPP``; bit 18 says that AMX tiles are granted on request.

    Returns
    -------
    frozenset of str
        LLVM names.
    """
    present = frozenset(flags)

    def usable(name: str) -> bool:
        if name.startswith("amx"):
            needed = _AMX_STATE
            if not tile_permission >> _TILE_DATA & 1:
                return False
        elif name.startswith("avx512"):
            needed = _AVX512_STATE
        elif name.startswith("avx") or name in _VEX_CODED:
            needed = _AVX_STATE
        else:
            needed = 0
        return xcr0 is None or xcr0 & needed == needed

    return frozenset(name for name, flag in X86_FLAGS.items() if flag in present and usable(name))


def arm_features(hwcap: int, hwcap2: int) -> frozenset[str]:
    """Extensions of an ARM processor that its kernel lets a process use.

    Parameters
    ----------
    hwcap, hwcap2 : int
        ``AT_HWCAP`` and ``AT_HWCAP2`` of the auxiliary vector.

    Returns
    -------
    frozenset of str
        LLVM names.
    """
    words = {_HWCAP: hwcap, _HWCAP2: hwcap2}
    return frozenset(
        name for name, (word, bits) in ARM_HWCAPS.items() if words[word] & bits == bits
    )


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _read_xcr0(flags: frozenset[str]) -> int | None:
    """XCR0, or None where it cannot be read: no xsave, or no executable page is granted."""
    if "xsave" not in flags:
        return 0
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    with page:
        page.write(_XGETBV)
        anchor = ctypes.c_char.from_buffer(page)
        xgetbv = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
        value = int(xgetbv())
        del anchor  # the page cannot be unmapped while a pointer into it is exported
    return value


def _tile_support() -> int:
    """Mask of ``ARCH_GET_XCOMP_SUPP``; 0 on a kernel without the call."""
    mask = ctypes.c_uint64(0)
    failed = _libc().syscall(_SYS_ARCH_PRCTL, _ARCH_GET_XCOMP_SUPP, ctypes.byref(mask))
    return 0 if failed else mask.value


def request_tiles() -> bool:
    """Ask the kernel for AMX tiles; the first tile instruction kills a process that did not.

    Once per process suffices, and asking again does no harm.

    Returns
    -------
    bool
        Whether tiles may be used from here on.
    """
    if machine() != "x86_64" or "amx-tile" not in available("x86_64"):
        return False
    return int(_libc().syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA)) == 0


@cache
def available(arch: str) -> frozenset[str]:
    """Extensions that code on this machine may use.

    Parameters
    ----------
    arch : {"x86_64", "aarch64"}
        Instruction set.

    Returns
    -------
    frozenset of str
        LLVM names; empty when this machine is of another architecture.

    Raises
    ------
    ToolchainError
        If the operating system does not say.
    """
    if arch != machine():
        return frozenset()
    if arch == "aarch64":
        getauxval = _libc().getauxval
        getauxval.restype = ctypes.c_ulong
        getauxval.argtypes = [ctypes.c_ulong]
        return arm_features(getauxval(_HWCAP), getauxval(_HWCAP2))
    try:
        flags = parse_cpuinfo(_CPUINFO.read_text())
    except OSError as error:
        raise ToolchainError(
            f"the processor's features are read from {_CPUINFO}, which cannot be read: "
            f"{error.strerror}.",
            hint="run hone on Linux with /proc mounted, or name the target: --target x86-64-v3.",
        ) from error
    return x86_features(flags, _read_xcr0(flags), _tile_support())


def missing(features: Iterable[str], arch: str) -> tuple[str, ...]:
    """Extensions that code needs and this machine lacks.

    Parameters
    ----------
    features : iterable of str
        LLVM names that the code may use.
    arch : str
        Instruction set that the code is written in.

    Returns
    -------
    tuple of str
        Sorted names; `arch` alone when this machine is of another architecture; empty when the
        code can run here.
    """
    if arch != machine():
        return (arch,)
    return tuple(sorted(set(features) - available(arch)))
