"""The machine that hone runs on, as a target.

Its instruction set is what :mod:`hone.targets.features` finds usable; its cores are what the
scheduler and the container's limits leave to this process; its caches are what sysfs reports.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from hone.errors import ToolchainError

from . import arm, x86
from .container import cpu_quota
from .features import available, known, machine
from .target import Target

_SYSTEM = Path("/")
_UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3}
# What every 64-bit x86 and ARM core of the last ten years has at least.
_LEAST_L1D_BYTES, _LEAST_L2_BYTES = 32 * 1024, 256 * 1024


@dataclass(frozen=True, kw_only=True)
class Caches:
    """Data caches of one core, in bytes; 0 where there is none or none is reported.

    Parameters
    ----------
    l1d_bytes : int
        First level.
    l2_bytes : int
        Second level, divided by the cores that share it.
    l3_bytes : int
        Last level, whole.
    """

    l1d_bytes: int = 0
    l2_bytes: int = 0
    l3_bytes: int = 0


def parse_cpu_list(text: str) -> frozenset[int]:
    """Processors of a kernel list such as ``"0-3,8"``.

    Parameters
    ----------
    text : str
        Contents of a ``*_list`` file in sysfs.

    Returns
    -------
    frozenset of int
    """
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def parse_size(text: str) -> int:
    """Bytes of a cache size such as ``"48K"``.

    Parameters
    ----------
    text : str
        Contents of a ``size`` file in sysfs.

    Returns
    -------
    int
        Bytes.
    """
    size = text.strip()
    unit = _UNITS.get(size[-1:], 1)
    return int(size.rstrip("".join(_UNITS))) * unit


def _read(path: Path) -> str | None:
    """Read a small kernel file; None where this kernel or container has no such file."""
    try:
        return path.read_text()
    except OSError:
        return None


def _cpu(root: Path, processor: int) -> Path:
    return root / "sys/devices/system/cpu" / f"cpu{processor}"


def _siblings(root: Path, processor: int) -> frozenset[int]:
    """Hardware threads of the core that `processor` belongs to."""
    topology = _cpu(root, processor) / "topology"
    # The first name replaced the second in Linux 5.5.
    text = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
    return parse_cpu_list(text) if text else frozenset({processor})


def physical_cores(processors: Collection[int], root: Path = _SYSTEM) -> int:
    """Cores behind a set of processors, hardware threads of one core counted once.

    Parameters
    ----------
    processors : collection of int
        Processor numbers.
    root : pathlib.Path
        Where ``sys`` is; for tests.

    Returns
    -------
    int
    """
    return len({_siblings(root, processor) for processor in processors})


def usable_cores(root: Path = _SYSTEM) -> int:
    """Physical cores that this process may keep busy.

    Parameters
    ----------
    root : pathlib.Path
        Where ``sys`` and ``proc`` are; for tests.

    Returns
    -------
    int
        Cores of the affinity mask, at most the container's quota rounded up; at least 1.
    """
    cores = physical_cores(os.sched_getaffinity(0), root)
    quota = cpu_quota(root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def caches(processor: int, root: Path = _SYSTEM) -> Caches:
    """Read the data caches of a processor's core.

    Parameters
    ----------
    processor : int
        Processor number.
    root : pathlib.Path
        Where ``sys`` is; for tests.

    Returns
    -------
    Caches
    """
    sizes: dict[int, int] = {}
    for index in sorted((_cpu(root, processor) / "cache").glob("index*")):
        kind, level, size = (_read(index / name) for name in ("type", "level", "size"))
        if kind is None or level is None or size is None or kind.strip() == "Instruction":
            continue
        shared = parse_cpu_list(_read(index / "shared_cpu_list") or "")
        sharers = physical_cores(shared, root) if level.strip() == "2" and shared else 1
        sizes[int(level)] = parse_size(size) // sharers
    return Caches(l1d_bytes=sizes.get(1, 0), l2_bytes=sizes.get(2, 0), l3_bytes=sizes.get(3, 0))


def arm_core(cpuinfo: str) -> str:
    """LLVM name of the ARM core that /proc/cpuinfo describes.

    Parameters
    ----------
    cpuinfo : str
        The file's contents.

    Returns
    -------
    str
        ``"generic"`` for a core that is not in the table, and for cores of several kinds.
    """
    implementers = re.findall(r"^CPU implementer\s*: (0x[0-9a-f]+)", cpuinfo, re.MULTILINE)
    parts = re.findall(r"^CPU part\s*: (0x[0-9a-f]+)", cpuinfo, re.MULTILINE)
    cores = {
        arm.PARTS.get((int(implementer, 16), int(part, 16)), "generic")
        for implementer, part in zip(implementers, parts, strict=True)
    }
    return cores.pop() if len(cores) == 1 else "generic"


def has_separate_adders(cpuinfo: str) -> bool:
    """Say whether an x86 processor adds vectors on units beside those that multiply and add.

    AMD's Zen 5 (family 26) does, in two pairs of 512 bits each (Software Optimization Guide for
    the AMD Zen5 Microarchitecture, "Floating-Point Unit"; measured, docs/performance.md).

    Parameters
    ----------
    cpuinfo : str
        Contents of /proc/cpuinfo.
    """
    vendor = re.search(r"^vendor_id\s*: (\S+)", cpuinfo, re.MULTILINE)
    family = re.search(r"^cpu family\s*: (\d+)", cpuinfo, re.MULTILINE)
    return (
        vendor is not None
        and family is not None
        and (vendor[1], int(family[1])) == ("AuthenticAMD", 26)
    )


class _Facts(TypedDict):
    """What is found out the same way on every architecture."""

    cores: int
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    sources: tuple[str, ...]


def _x86(usable: frozenset[str], facts: _Facts) -> Target:
    vector_bits, vector_registers = x86.vectors_of(usable)
    return Target(
        name="host",
        kind="cpu",
        arch="x86_64",
        triple=x86.TRIPLE,
        mcpu=x86.level_of(usable),
        features=tuple(sorted({*usable, *x86.LEVELS["x86-64"]})),
        vector_bits=vector_bits,
        vector_registers=vector_registers,
        tensor_instructions=x86.tensor_instructions_of(usable),
        separate_adders=has_separate_adders(_read(Path("/proc/cpuinfo")) or ""),
        **facts,
    )


def _arm(usable: frozenset[str], facts: _Facts) -> Target:
    return Target(
        name="host",
        kind="cpu",
        arch="aarch64",
        triple=arm.TRIPLE,
        mcpu=arm_core(_read(Path("/proc/cpuinfo")) or ""),
        features=tuple(sorted(usable)),
        disabled=tuple(sorted(known("aarch64") - usable)),
        vector_bits=arm.VECTOR_BITS,
        vector_registers=arm.VECTOR_REGISTERS,
        tensor_instructions=arm.tensor_instructions_of(usable),
        **facts,
    )


def detect() -> Target:
    """Target that stands for this machine.

    Returns
    -------
    Target
        Named ``"host"``; every extension in it is one that this process may use now.

    Raises
    ------
    ToolchainError
        If this is neither x86-64 nor 64-bit ARM Linux, or the system does not say what it has.
    """
    arch = machine()
    if arch not in ("x86_64", "aarch64"):
        raise ToolchainError(
            f"hone generates code for x86_64 and aarch64, and this machine is {arch!r}.",
            hint="compile for a named target instead; `hone target list` shows them all.",
        )
    usable = available(arch)
    found = caches(min(os.sched_getaffinity(0)))
    sources = ["xgetbv", "arch_prctl"] if arch == "x86_64" else ["getauxval"]
    sources += ["/proc/cpuinfo", "/sys/devices/system/cpu", "sched_getaffinity", "cgroup cpu limit"]
    if not found.l1d_bytes or not found.l2_bytes:
        sources.append("caches: not reported by sysfs, the least that such cores have")
    facts = _Facts(
        cores=usable_cores(),
        l1d_bytes=found.l1d_bytes or _LEAST_L1D_BYTES,
        l2_bytes=found.l2_bytes or _LEAST_L2_BYTES,
        l3_bytes=found.l3_bytes,
        sources=tuple(sources),
    )
    return _x86(usable, facts) if arch == "x86_64" else _arm(usable, facts)
