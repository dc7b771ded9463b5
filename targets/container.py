"""Limits that a container's control groups put on this process, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_SYSTEM = Path("/")


def _read(path: Path) -> str:
    """Read a control file; empty where the group has none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of each control group from this process's own to the topmost visible."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        inside = top / group.lstrip("/")
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(top):
                break
            yield (1 if controllers else 2), folder


def cpu_quota(root: Path = _SYSTEM) -> float | None:
    """Processors' worth of time that the container grants.

    Parameters
    ----------
    root : pathlib.Path
        Where ``sys`` and ``proc`` are; for tests.

    Returns
    -------
    float or None
        The smallest limit on the way to the top; None without a limit.
    """
    limits: list[float] = []
    for version, folder in _groups("cpu", root):
        if version == 2:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        else:
            quota = _read(folder / "cpu.cfs_quota_us")
            period = _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # neither "max" nor "-1"
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit(root: Path = _SYSTEM) -> int | None:
    """Memory that the container grants, in bytes.

    Parameters
    ----------
    root : pathlib.Path
        Where ``sys`` and ``proc`` are; for tests.

    Returns
    -------
    int or None
        The smallest limit on the way to the top; None without a limit.
    """
    # Version 1 says "no limit" with the largest multiple of a page below 2^63.
    unlimited = 1 << 60
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    texts = [_read(folder / names[version]) for version, folder in _groups("memory", root)]
    return min(
        (int(text) for text in texts if text.isdecimal() and int(text) < unlimited), default=None
    )
