"""What this machine can do, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hone.errors import HoneError
from hone.targets.target import resolve
from hone.targets.toolchain import find_linker

PINNED = ("apache-tvm", "apache-tvm-ffi")
"""Versions that must be exactly those of the package's metadata."""

EXTRAS = {
    "jinja2": ("HTML reports", "report"),
    "openvino": ("bench --vs openvino", "compare"),
    "ziglang": ("compiling for other machines", "cross"),
}


class Status(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """hone works, but something is missing, or makes measurements worse."""
    FAILED = "failed"
    """hone cannot compile here."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    name : str
        What it is.
    status : Status
        Whether it is as it should be.
    detail : str
        What was found.
    hint : str
        What to do about it; empty when there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    hint: str = ""


def diagnose() -> list[Finding]:
    """Look at everything that hone depends on; nothing is compiled or measured."""
    return [
        *_versions(),
        _runtime(),
        _host(),
        _linker("host"),
        _linker("rpi4"),
        *_extras(),
        *_clock(),
    ]


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding(name="python", status=Status.OK, detail=python)
    required = _requirements()
    for name in (*PINNED, "onnx", "onnxruntime", "xgboost"):
        installed = _version(name)
        wanted = required.get(name, "")
        if installed is None:
            yield Finding(
                name=name,
                status=Status.FAILED,
                detail="not installed",
                hint=f"pip install '{name}{wanted}'",
            )
        elif name in PINNED and wanted != f"=={installed}":
            yield Finding(
                name=name,
                status=Status.FAILED,
                detail=f"{installed}, required is {wanted}",
                hint=f"pip install '{name}{wanted}'",
            )
        else:
            yield Finding(name=name, status=Status.OK, detail=installed)
    if _version("torch") is not None:
        yield Finding(
            name="torch",
            status=Status.WARNING,
            detail="installed: tvm_ffi imports it, so every start and tuning worker is slower",
            hint="use an environment without torch",
        )


def _requirements() -> dict[str, str]:
    """Return the version that hone's own metadata requires, by distribution."""
    found = {}
    for line in importlib.metadata.requires("hone-compiler") or ():
        match = re.match(r"([A-Za-z0-9._-]+)\s*([^;]*)", line)
        if match is not None and "extra" not in line:
            found[match[1]] = match[2].strip()
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _runtime() -> Finding:
    from hone.tvm_runtime import tvm_runtime

    try:
        tvm_runtime()
    except (HoneError, OSError, ImportError) as error:
        return Finding(
            name="runtime", status=Status.FAILED, detail=str(error), hint="reinstall apache-tvm"
        )
    return Finding(name="runtime", status=Status.OK, detail="libtvm_runtime loads")


def _host() -> Finding:
    try:
        host = resolve("host")
    except HoneError as error:
        return Finding(
            name="processor", status=Status.FAILED, detail=error.message, hint=error.hint or ""
        )
    units = ", ".join(host.tensor_instructions) or "no tensor instructions"
    detail = f"{host.arch}, {host.cores} cores, {host.vector_bits}-bit vectors, {units}"
    return Finding(name="processor", status=Status.OK, detail=detail)


def _linker(target: str) -> Finding:
    name = f"linker for {target}"
    try:
        linker = find_linker(resolve(target))
    except HoneError as error:
        status = Status.FAILED if target == "host" else Status.WARNING
        return Finding(name=name, status=status, detail=error.message, hint=error.hint or "")
    return Finding(name=name, status=Status.OK, detail=f"{linker.name} {linker.version}")


def _extras() -> Iterator[Finding]:
    for module, (purpose, extra) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(
                name=module,
                status=Status.WARNING,
                detail=f"not installed; needed for {purpose}",
                hint=f"pip install 'hone-compiler[{extra}]'",
            )
        else:
            detail = _version(module) or "installed"
            yield Finding(name=module, status=Status.OK, detail=f"{detail}, for {purpose}")


def _clock() -> Iterator[Finding]:
    """Look at what makes measurements unsteady."""
    governors = {
        path.read_text(encoding="ascii").strip()
        for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    }
    if governors - {"performance"}:
        yield Finding(
            name="clock",
            status=Status.WARNING,
            detail=f"frequency governor {', '.join(sorted(governors))}: timings will swing",
            hint="cpupower frequency-set -g performance",
        )
    allowed = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    if load > allowed / 2:
        yield Finding(
            name="load",
            status=Status.WARNING,
            detail=f"{load:.1f} on {allowed} cores: other work disturbs measurements",
            hint="measure on an idle machine",
        )
