"""Whether this machine has what hone needs, what it lacks, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hone.environment import THREAD_VARIABLES, clock_source, cpu_model, governor, version
from hone.errors import ToolchainError
from hone.targets import features
from hone.targets.container import cpu_quota, memory_limit
from hone.targets.target import resolve
from hone.targets.toolchain import INSTALL_ZIG, find_linker

_DISTRIBUTION = "hone-compiler"
_GIB = 1024**3
# A build of ResNet-50 keeps its records, packages and scratch files in less than a gigabyte, and
# LLVM's workers want about half of one each.
_LEAST_DISK_BYTES = 2 * _GIB
_LEAST_MEMORY_BYTES = 2 * _GIB
# Clocks read without entering the kernel (arch/x86/entry/vdso, arch/arm64/kernel/vdso).
_FAST_CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page")
_BACKENDS = ("x86_64", "aarch64")


class Status(StrEnum):
    """How a check went."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Parameters
    ----------
    name : str
        What it is about.
    status : Status
        ``missing`` when it is absent or unusable, ``warning`` when it works but harms results.
    detail : str
        What was found.
    fix : str or None
        What to do about it; None when nothing needs doing.
    required : bool
        Whether hone cannot compile or run at all without it.
    """

    name: str
    status: Status
    detail: str
    fix: str | None = None
    required: bool = False


def _ok(name: str, detail: str, *, required: bool = False) -> Check:
    return Check(name=name, status=Status.OK, detail=detail, required=required)


def _warning(name: str, detail: str, fix: str) -> Check:
    return Check(name=name, status=Status.WARNING, detail=detail, fix=fix)


def _missing(name: str, detail: str, fix: str, *, required: bool = False) -> Check:
    return Check(name=name, status=Status.MISSING, detail=detail, fix=fix, required=required)


def _requirements() -> Iterator[tuple[str, str, str | None]]:
    """Name, version condition and extra of what the installed package requires."""
    form = re.compile(r"([\w.-]+)([^;]*)(?:;.*extra == [\"']([\w-]+)[\"'].*)?")
    for line in importlib.metadata.requires(_DISTRIBUTION) or ():
        if (match := form.fullmatch(line)) is not None and match[3] != "dev":
            yield match[1], match[2].strip(), match[3]


def _dependencies() -> Iterator[Check]:
    """Distributions that the installed package requires, pins compared to the letter."""
    for name, wanted, extra in _requirements():
        found = version(name)
        pin = wanted.removeprefix("==") if wanted.startswith("==") else None
        if found is None and extra is not None:
            install = f"pip install '{_DISTRIBUTION}[{extra}]'"
            yield _missing(name, f"not installed (extra {extra!r})", install)
        elif found is None:
            yield _missing(name, "not installed", f"pip install '{name}{wanted}'", required=True)
        elif pin is not None and found != pin:
            detail = f"{found} is installed, and hone is built for {pin} alone"
            yield _missing(name, detail, f"pip install '{name}=={pin}'", required=True)
        else:
            yield _ok(name, found, required=extra is None)


def _python() -> Iterator[Check]:
    yield _ok("python", f"{platform.python_version()} on {platform.system()}", required=True)


def _compiler() -> Iterator[Check]:
    try:
        from tvm.target import codegen
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        yield _missing(
            "tvm compiler",
            f"apache-tvm is installed but cannot be loaded: {error}",
            "pip install --force-reinstall "
            + " ".join(f"'{name}{pin}'" for name, pin, _ in _requirements() if "tvm" in name),
            required=True,
        )
        return
    backends = set(codegen.llvm_get_targets())
    llvm = f"LLVM {codegen.llvm_version_major()}"
    for arch in _BACKENDS:
        if arch in backends:
            yield _ok(f"code for {arch}", llvm, required=arch == features.machine())
        else:
            yield _missing(
                f"code for {arch}",
                f"{llvm} of this apache-tvm has no {arch} backend",
                "install apache-tvm from the package index",
                required=arch == features.machine(),
            )


def _processor() -> Iterator[Check]:
    try:
        target = resolve("host")
    except ToolchainError as error:
        yield _missing("processor", error.message, error.hint or "", required=True)
        return
    instructions = ", ".join(target.tensor_instructions) or "no dot product instructions"
    detail = (
        f"{cpu_model()}: {target.mcpu}, {target.vector_bits}-bit vectors, {instructions}, "
        f"{target.cores} cores"
    )
    if target.arch == "x86_64" and target.vector_bits < 256:
        yield _warning(
            "processor",
            detail,
            "in a virtual machine, pass the host's processor model through: code for 128-bit "
            "vectors is several times slower",
        )
    else:
        yield _ok("processor", detail, required=True)
    if target.arch == "x86_64":
        flags = features.parse_cpuinfo(Path("/proc/cpuinfo").read_text())
        every_state = ~0
        withheld = features.x86_features(flags, every_state, every_state) - set(target.features)
        if withheld:
            yield _warning(
                "operating system",
                f"does not let processes use {', '.join(sorted(withheld))}, which the processor "
                "has",
                "update the kernel (AMX needs Linux 5.16), or have the hypervisor pass XCR0 "
                "through",
            )
    quota, processors = cpu_quota(), len(os.sched_getaffinity(0))
    if quota is not None and quota < processors:
        yield _warning(
            "container",
            f"grants {quota:g} processors' time on {processors} processors, so that threads are "
            "stopped in the middle of a measurement",
            "start the container with --cpuset-cpus instead of --cpus",
        )


def _linkers() -> Iterator[Check]:
    for title, name, required in (("linker", "host", True), ("linker for boards", "rpi4", False)):
        try:
            linker = find_linker(resolve(name))
        except ToolchainError as error:
            yield _missing(title, error.message, error.hint or INSTALL_ZIG, required=required)
        else:
            yield _ok(title, f"{linker.name} {linker.version}", required=required)


def _emulator() -> Iterator[Check]:
    program = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if program is None:
        yield _missing(
            "emulator of ARM",
            "no qemu-aarch64-static; packages for boards are not run here",
            "apt-get install qemu-user-static libc6-arm64-cross libstdc++6-arm64-cross",
        )
    else:
        yield _ok("emulator of ARM", program)


def _space() -> Iterator[Check]:
    for title, folder in (("disk", Path.cwd()), ("scratch disk", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        detail = f"{free / _GIB:.1f} GiB free in {folder}"
        if free < _LEAST_DISK_BYTES:
            yield _warning(title, detail, f"free {_LEAST_DISK_BYTES // _GIB} GiB, or set TMPDIR")
        else:
            yield _ok(title, detail)
    available = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    limits = [int(available[1]) * 1024 if available else None, memory_limit()]
    memory = min(limit for limit in limits if limit is not None)
    detail = f"{memory / _GIB:.1f} GiB available"
    if memory < _LEAST_MEMORY_BYTES:
        yield _warning("memory", detail, "close other programs, or tune with fewer workers")
    else:
        yield _ok("memory", detail)


def _measuring() -> Iterator[Check]:
    """Look for what makes timings untrustworthy."""
    # `import hone` itself sets TVM_NUM_THREADS to this, so that TVM does not take half of it.
    own = {"TVM_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    for name in THREAD_VARIABLES:
        value = os.environ.get(name)
        if value is not None and value != own.get(name):
            yield _warning(
                name,
                f"is set to {value!r}, and bounds or changes the threads of whatever hone measures",
                f"unset {name}, and use --threads",
            )
    governed = governor()
    if governed is None or governed == "performance":
        yield _ok("frequency governor", governed or "not reported by this system")
    else:
        yield _warning(
            "frequency governor",
            f"{governed}: the frequency moves with the load, and timings with it",
            "cpupower frequency-set --governor performance",
        )
    clock = clock_source()
    if clock is None or clock in _FAST_CLOCKS:
        yield _ok("clock", clock or "not reported by this system")
    else:
        yield _warning(
            "clock",
            f"{clock}: reading it enters the kernel, which adds about a microsecond to a timing",
            "boot with clocksource=tsc where the processor's tsc is reliable",
        )
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    # One busy core is hone's own, so that only a second one tells of company.
    if load > 1 and load > cores / 2:
        yield _warning(
            "load",
            f"{load:.1f} processes were running on {cores} processors in the last minute",
            "stop them before measuring: intervals grow, and small gains are not seen",
        )
    else:
        yield _ok("load", f"{load:.1f} on {cores} processors")


_CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    _python,
    _dependencies,
    _compiler,
    _processor,
    _linkers,
    _emulator,
    _space,
    _measuring,
)


def diagnose() -> list[Check]:
    """Look at everything that hone depends on; compiles and measures nothing.

    Loads TVM's compiler, which takes a second or two.

    Returns
    -------
    list of Check
        In a fixed order, those that went well included. hone cannot work when one of them is both
        ``required`` and ``missing``.
    """
    return [check for look in _CHECKS for check in look()]
