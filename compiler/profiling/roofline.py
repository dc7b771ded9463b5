"""What this machine can do at most, measured: operations and bytes in a second, kept in a cache.

The roofline of a kernel (Williams, Waterman and Patterson 2009) is the least time that its
operations and its bytes need: ``max(operations / peak, bytes / bandwidth)``. The bandwidth depends
on which cache holds the bytes, so that it is measured for each one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hone.environment import cpu_model, version
from hone.targets.container import cpu_quota
from hone.targets.target import Target

PER_SECOND = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Raised when what is measured changes, so that older files are not read.
_REVISION = 2


class Bound(StrEnum):
    """What keeps a kernel from being faster."""

    COMPUTE = "compute"
    MEMORY = "memory"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Level(_Entry):
    """A cache, or the memory behind all of them.

    Parameters
    ----------
    name : str
        ``L1``, ``L2``, ``L3`` or ``memory``.
    capacity_bytes : int or None
        Of all threads together; None for memory.
    footprint_bytes : int
        What was read and written to measure it.
    bytes_per_second : float
        The larger of reading alone and of the triad ``c = a + s b``, all threads together.
    """

    name: str
    capacity_bytes: int | None
    footprint_bytes: int
    bytes_per_second: PER_SECOND


class Peak(_Entry):
    """Most operations of one data type in a second, all threads together.

    Parameters
    ----------
    instruction : str
        What was measured, in registers.
    operations_per_second : float
        A multiply-add counts as two.
    """

    instruction: str
    operations_per_second: PER_SECOND


class Roofline(_Entry):
    """The measured limits of this machine for a number of threads.

    Parameters
    ----------
    threads : int
        Threads that were measured together.
    peaks : dict of str to Peak
        By data type: ``float32``; ``int8`` and ``bfloat16`` where the processor has a dot product
        of them.
    levels : tuple of Level
        From the fastest to the slowest.
    quiet : bool
        Whether the threads had their processors for themselves; if not, limits may be too low.
    """

    threads: int
    peaks: dict[str, Peak]
    levels: tuple[Level, ...]
    quiet: bool

    def peak(self, dtype: str) -> tuple[str, Peak]:
        """Return the peak that a data type is held against, and the type it was measured with.

        8-bit integers are held against the dot product of bytes and bfloat16 against that of pairs,
        where the processor has one; everything else against float32.
        """
        name = "int8" if dtype == "uint8" else dtype
        name = name if name in self.peaks else "float32"
        return name, self.peaks[name]

    def level(self, size_bytes: int) -> Level:
        """Return the fastest level that holds so many bytes."""
        return next(
            level
            for level in self.levels
            if level.capacity_bytes is None or size_bytes <= level.capacity_bytes
        )

    def floor_s(
        self,
        *,
        dtype: str,
        operations: float,
        weight_bytes: int,
        activation_bytes: int,
        model_bytes: int,
    ) -> tuple[float, Bound]:
        """Return the least seconds that a kernel needs, and what needs them.

        Parameters
        ----------
        dtype : str
            What its operations work on.
        operations : float
            Additions and multiplications.
        weight_bytes : int
            Constants that it reads. They come from the level that holds the whole model, since
            all the others were read since.
        activation_bytes : int
            What else it reads and writes. This comes from the level that holds just that.
        model_bytes : int
            Weights and activations of the whole model.
        """
        compute = operations / self.peak(dtype)[1].operations_per_second
        memory = weight_bytes / self.level(model_bytes).bytes_per_second
        memory += activation_bytes / self.level(activation_bytes).bytes_per_second
        return max(compute, memory), Bound.COMPUTE if compute >= memory else Bound.MEMORY

    def best_of(self, other: Roofline) -> Roofline:
        """Return the higher of two measurements of the same machine, limit by limit."""
        levels = zip(self.levels, other.levels, strict=True)
        return Roofline(
            threads=self.threads,
            peaks={
                dtype: max(
                    (peak, other.peaks[dtype]), key=lambda either: either.operations_per_second
                )
                for dtype, peak in self.peaks.items()
            },
            levels=tuple(max(pair, key=lambda level: level.bytes_per_second) for pair in levels),
            quiet=self.quiet or other.quiet,
        )


def cache_path(target: Target, threads: int) -> Path:
    """Return where the limits of a machine are kept: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    machine = {
        "revision": _REVISION,
        "cpu": cpu_model(),
        "features": sorted(target.features),
        "vector_bits": target.vector_bits,
        "caches": [target.l1d_bytes, target.l2_bytes, target.l3_bytes],
        "cores": target.cores,
        "processors": len(os.sched_getaffinity(0)),
        "quota": cpu_quota(),
        "threads": threads,
        "tvm": version("apache-tvm"),
    }
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "hone", f"roofline-{digest}.json")


def read(path: Path) -> Roofline | None:
    """Return what a file of the cache says; None where there is none that can be used."""
    try:
        return Roofline.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write(path: Path, roofline: Roofline) -> None:
    """Keep a measurement, whole or not at all.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(roofline.model_dump_json(indent=2) + "\n")
    Path(draft).replace(path)


def of_this_machine(target: Target, *, threads: int) -> tuple[Roofline, str | None]:
    """Return the limits of this machine: from the cache, or measured now in a second or two.

    A measurement that other processes disturbed is repeated the next time, and the higher limits
    are kept.

    Parameters
    ----------
    target : Target
        Must run here.
    threads : int
        Threads that share the work.

    Returns
    -------
    tuple
        The limits; and why they could not be kept, None where they were.
    """
    path = cache_path(target, threads)
    known = read(path)
    if known is not None and known.quiet:
        return known, None
    from .roofline_bench import measure

    measured = measure(target, threads=threads)
    if known is not None:
        measured = known.best_of(measured)
    try:
        write(path, measured)
    except OSError as error:
        return measured, f"the limits of this machine cannot be kept in {path}: {error.strerror}"
    return measured, None
