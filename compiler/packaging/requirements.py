"""What a package requires of the machine, of TVM's runtime and of the process that runs it."""

from __future__ import annotations

import os
import platform
import warnings

from hone.errors import PackageError
from hone.targets import features

from .manifest import Manifest
from .tvm_runtime import TVMRuntime


def check_machine(manifest: Manifest, where: str | None) -> None:
    """Refuse code that this processor or its C library cannot run.

    Parameters
    ----------
    manifest : Manifest
        Of the package.
    where : str, optional
        The package's path, for messages.

    Raises
    ------
    PackageError
        Another architecture, missing features of the processor, or an older glibc.
    """
    target = manifest.target
    rebuild = "rebuild it for this machine: `hone compile --target host`."
    if (machine := features.machine()) != target.arch:
        raise PackageError(
            f"the package was built for {target.arch} (target {target.name}); this machine is "
            f"{machine}.",
            where=where,
            hint=rebuild,
        )
    if missing := features.missing(target.features, target.arch):
        raise PackageError(
            f"the package was built for {', '.join(target.features)} (target {target.name}); "
            f"this CPU lacks {', '.join(missing)}.",
            where=where,
            hint=f"{rebuild[:-1]}, or for a named one: `--target x86-64-v3`."
            if target.arch == "x86_64"
            else rebuild,
        )
    name, version = platform.libc_ver()
    if target.glibc is not None and (name != "glibc" or _release(version) < _release(target.glibc)):
        raise PackageError(
            f"the package needs glibc {target.glibc} or newer; this machine has "
            f"{name or 'another C library'} {version}".rstrip()
            + ".",
            where=where,
            hint=rebuild,
        )


def request_tiles(manifest: Manifest, where: str | None) -> None:
    """Ask the kernel for AMX tiles where the code uses them: without, it ends the process.

    Parameters
    ----------
    manifest : Manifest
        Of the package.
    where : str, optional
        The package's path, for messages.

    Raises
    ------
    PackageError
        The operating system refuses them.
    """
    if "amx-tile" not in manifest.target.features or features.request_tiles():
        return
    raise PackageError(
        "the package's code uses AMX tiles, and the operating system refuses them to this process "
        "(arch_prctl ARCH_REQ_XCOMP_PERM).",
        where=where,
        hint="allow the call where a seccomp filter forbids it, and give every thread's alternate "
        "signal stack the size that getauxval(AT_MINSIGSTKSZ) asks for; or rebuild the package "
        f"without tiles: `--target {manifest.target.name},-amx-tile`.",
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def check_version(manifest: Manifest, runtime: TVMRuntime, where: str | None) -> None:
    """Require the TVM that wrote the code: its formats change between releases.

    Parameters
    ----------
    manifest : Manifest
        Of the package.
    runtime : TVMRuntime
        What is installed.
    where : str, optional
        The package's path, for messages.

    Raises
    ------
    PackageError
        Another version is installed.
    """
    required = manifest.versions.tvm
    if runtime.version != required:
        raise PackageError(
            f"the package was built with TVM {required}; TVM {runtime.version} is installed.",
            where=where,
            hint=f"pip install apache-tvm=={required} "
            f"apache-tvm-ffi=={manifest.versions.tvm_ffi}, or rebuild the package.",
        )


def grant_threads(requested: int | None, default: int) -> int:
    """Return how many threads a runner gets, and say so when these are fewer than wanted.

    The warning names the caller of the caller.

    Parameters
    ----------
    requested : int, optional
        What was asked for.
    default : int
        The manifest's.
    """
    wanted = default if requested is None else requested
    usable = len(os.sched_getaffinity(0))
    if wanted <= usable:
        return wanted
    source = "the package's default is" if requested is None else "asked were"
    warnings.warn(
        f"{source} {wanted} threads; this process may use {usable} processors and runs on so "
        "many threads.",
        RuntimeWarning,
        stacklevel=3,
    )
    return usable
