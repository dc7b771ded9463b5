"""What a measurement depends on: the processor, the limits, the versions, the machine's state."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from hone.targets import features
from hone.targets.container import cpu_quota, memory_limit
from hone.targets.host import parse_cpu_list, usable_cores

_SYSTEM = Path("/")
# Whose versions a result depends on; absent ones are reported as null.
PACKAGES = (
    *("hone-compiler", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnxruntime"),
    *("openvino", "xgboost", "ziglang"),
)
THREAD_VARIABLES = ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_AFFINITY")


def _read(path: Path) -> str | None:
    """Read a kernel file; None where this kernel or container has no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def version(package: str) -> str | None:
    """Version of an installed distribution.

    Parameters
    ----------
    package : str
        Name on the package index.

    Returns
    -------
    str or None
        None where it is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model(root: Path = _SYSTEM) -> str:
    """Name of the processor.

    Parameters
    ----------
    root : pathlib.Path
        Where ``proc`` and ``sys`` are; for tests.

    Returns
    -------
    str
        ``model name`` of /proc/cpuinfo; on ARM, which has none, the board's model or the core's
        implementer and part; the architecture where neither is known.
    """
    text = _read(root / "proc/cpuinfo") or ""
    fields = dict(re.findall(r"^([\w ]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE))
    if "model name" in fields:
        return str(fields["model name"])
    board = _read(root / "sys/firmware/devicetree/base/model")
    if board:
        return board.rstrip("\0")
    if "CPU part" in fields:
        return f"implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    return features.machine()


def governor(root: Path = _SYSTEM) -> str | None:
    """Frequency governor of the online processors.

    Parameters
    ----------
    root : pathlib.Path
        Where ``sys`` is; for tests.

    Returns
    -------
    str or None
        Names joined with a comma where they differ; None where the system does not say, as in most
        virtual machines.
    """
    folder = root / "sys/devices/system/cpu"
    online = parse_cpu_list(_read(folder / "online") or "")
    found = {_read(folder / f"cpu{cpu}/cpufreq/scaling_governor") for cpu in online}
    return ",".join(sorted(name for name in found if name)) or None


def clock_source(root: Path = _SYSTEM) -> str | None:
    """Hardware clock that the kernel reads time from.

    Parameters
    ----------
    root : pathlib.Path
        Where ``sys`` is; for tests.

    Returns
    -------
    str or None
        Such as ``"tsc"``; None where the system does not say.
    """
    return _read(root / "sys/devices/system/clocksource/clocksource0/current_clocksource")


def features_digest() -> str:
    """Hash of the instruction set extensions that code may use here.

    Returns
    -------
    str
        First 16 hexadecimal digits of the sha256 of the sorted names.
    """
    names = " ".join(sorted(features.available(features.machine())))
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def fingerprint(threads: int) -> dict[str, Any]:
    """Everything about this machine that a measured number depends on, as JSON-able data.

    Names neither the machine nor its user nor the time.

    Parameters
    ----------
    threads : int
        Threads that the measurement runs on.

    Returns
    -------
    dict
        ``cpu``, ``arch``, ``features`` (hash), ``cores`` (physical, after the limits),
        ``processors`` (in the affinity mask), ``threads``, ``hypervisor``, ``cpu_quota``
        (processors' worth of time, or null), ``memory_bytes``, ``memory_limit_bytes``,
        ``governor``, ``clock_source``, ``load_average`` (1, 5 and 15 minutes), ``kernel``,
        ``python``, ``packages`` (name to version or null), ``variables`` (those that set threads).
    """
    cpuinfo = _read(Path("/proc/cpuinfo")) or ""
    return {
        "cpu": cpu_model(),
        "arch": features.machine(),
        "features": features_digest(),
        "cores": usable_cores(),
        "processors": len(os.sched_getaffinity(0)),
        "threads": threads,
        "hypervisor": "hypervisor" in features.parse_cpuinfo(cpuinfo),
        "cpu_quota": cpu_quota(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "memory_limit_bytes": memory_limit(),
        "governor": governor(),
        "clock_source": clock_source(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }
