"""What tuning records say, and the kernels that they are about."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import journal

if TYPE_CHECKING:
    import tvm
    from tvm import tirx

    from hone.targets.target import Target

INVALID_S = 1e9
"""Seconds from which on MetaSchedule calls a record a failure (it writes 1e10)."""

WORTHWHILE = 0.98
"""A record is used when it takes at most this share of the untuned time: below it is noise."""


NEARLY = 1.03
"""A record is tried inside the model when it takes at most this share of the untuned time in
isolation, where the order is another one."""

CONTENDERS = 10
"""Records of a kernel that are tried inside the model, as far as the time suffices."""


class Verdict(StrEnum):
    """What became of a record inside a running model, beside the kernel without a record."""

    CONFIRMED = "confirmed"
    """Faster there too."""
    REJECTED = "rejected"
    """Not faster there, or the model as a whole was not."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the database knows about one kernel.

    Parameters
    ----------
    workload : str
        MetaSchedule's structural hash, in decimal.
    name : str
        The kernel's name in the model that it was tuned for.
    records : int
        Valid records.
    best_ms, untuned_ms : float or None
        Milliseconds of the best record, and without a record.
    verdict : Verdict or None
        On the best record, inside a model; None when it was never tried there.
    """

    workload: str
    name: str
    records: int
    best_ms: float | None
    untuned_ms: float | None
    verdict: Verdict | None = None


@dataclass(frozen=True, kw_only=True)
class Match:
    """The record of a kernel that `choose` takes, else its fastest one.

    Parameters
    ----------
    workload : list
        JSON of the ``Workload`` that it was found for.
    record : list
        JSON of the ``TuningRecord``.
    untuned_s : float or None
        Seconds of the kernel without a record, if that was measured.
    verdict : Verdict or None
        On this record, inside a model.
    """

    workload: list[Any]
    record: list[Any]
    untuned_s: float | None
    verdict: Verdict | None = None

    @property
    def seconds(self) -> float:
        """Mean seconds of the record."""
        return float(math.fsum(self.record[1]) / len(self.record[1]))

    @property
    def worthwhile(self) -> bool:
        """Whether the record is to be used: by its verdict, else by the times in isolation."""
        if self.verdict is not None:
            return self.verdict is Verdict.CONFIRMED
        return self.untuned_s is None or self.seconds <= WORTHWHILE * self.untuned_s


class HitRate(NamedTuple):
    """How much of a module the database covers.

    Parameters
    ----------
    hits, total : int
        Kernels with a valid record, and all unscheduled kernels.
    missing : tuple of str
        Names of the kernels without one.
    """

    hits: int
    total: int
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A module after its records were applied.

    Parameters
    ----------
    module : IRModule
        The functions in `hits` are scheduled and carry ``tirx.is_scheduled``.
    hits, misses : tuple of str
        Kernels that a record scheduled, and kernels without one.
    kept : tuple of str
        Kernels whose best record is no better than the untuned schedule, which therefore stays.
    rejected : tuple of str
        Those of `kept` whose best record was better in isolation, and not in a running model.
    failed : tuple of (str, str)
        Kernels whose best record could not be applied, with the reason; they stay untuned.
    """

    module: tvm.IRModule
    hits: tuple[str, ...]
    misses: tuple[str, ...]
    kept: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    rejected: tuple[str, ...] = ()


def folder_of(root: Path, target: Target, *, threads: int) -> Path:
    """Return the folder of one target, thread count and TVM version.

    Parameters
    ----------
    root : Path
        The whole database.
    target : Target
        Its code-generation facts are hashed: two machines called ``host`` share a folder exactly
        when the same code runs on both. Core counts and caches do not matter.
    threads : int
        Threads that the kernels were measured with.

    Returns
    -------
    Path
        Such as ``root/host-1f2e3d4c5b6a-2-threads/tvm-0.27.0.post1``.
    """
    facts = journal.dumps(
        {
            "kind": target.kind,
            "arch": target.arch,
            "triple": target.triple,
            "mcpu": target.mcpu,
            "features": sorted(target.features),
            "disabled": sorted(target.disabled),
            "vector_bits": target.vector_bits,
        }
    )
    digest = hashlib.sha256(facts).hexdigest()[:12]
    return root / f"{target.name}-{digest}-{threads}-threads" / f"tvm-{version('apache-tvm')}"


def workload_module(func: tirx.PrimFunc) -> tvm.IRModule:
    """Return a kernel in the form that records are filed under.

    Parameters
    ----------
    func : PrimFunc
        Unscheduled.

    Returns
    -------
    IRModule
        One function ``main`` without any attribute that says where it came from, so that equal
        kernels of different models share their records.
    """
    from tvm import IRModule

    kept = {"s_tir", "tirx.noalias"}
    for name in func.attrs.keys() if func.attrs else ():
        if name not in kept:
            func = func.without_attr(name)
    func = func.with_attr("global_symbol", "main").with_attr("tirx.noalias", True)
    return IRModule({"main": func})


def kernels(module: tvm.IRModule) -> dict[str, tirx.PrimFunc]:
    """Return the unscheduled TIR functions of a lowered module, by name, in order."""
    from tvm import tirx

    from hone.targets.schedule.blocks import is_scheduled

    found = {
        variable.name_hint: func
        for variable, func in module.functions.items()
        if isinstance(func, tirx.PrimFunc) and not is_scheduled(func)
    }
    return dict(sorted(found.items()))


def seconds_of(record: list[Any]) -> float | None:
    """Return the mean run time of a record in seconds; None when it is a failure.

    Parameters
    ----------
    record : list
        JSON of a ``TuningRecord``: trace, run times, target, arguments.
    """
    times = record[1]
    if not times or not all(isinstance(t, (int, float)) and 0 < t < INVALID_S for t in times):
        return None
    return float(math.fsum(times) / len(times))


def trace_key(record: list[Any]) -> str:
    """Return what tells a kernel's candidates apart.

    Parameters
    ----------
    record : list
        JSON of a ``TuningRecord``.
    """
    return hashlib.sha256(journal.dumps(record[0])).hexdigest()


def choose(
    records: Sequence[list[Any]], verdicts: Mapping[str, Verdict], untuned_s: float | None
) -> list[Any] | None:
    """Return the record that a kernel is compiled with.

    A verdict from inside a model outweighs times in isolation: of the confirmed records the
    fastest is taken. One that no model has tried takes its place when it is worthwhile beside it
    and beside the untuned kernel, unless a faster one was rejected already.

    Parameters
    ----------
    records : sequence of list
        JSON of the valid records, best first.
    verdicts : mapping of str to Verdict
        By `trace_key`.
    untuned_s : float or None
        Seconds in isolation without a record.

    Returns
    -------
    list or None
        None when the untuned schedule stays.
    """
    confirmed = next((r for r in records if verdicts.get(trace_key(r)) is Verdict.CONFIRMED), None)
    if not records or trace_key(records[0]) in verdicts:
        return confirmed
    seconds = seconds_of(records[0]) or math.inf
    limits = [untuned_s, None if confirmed is None else seconds_of(confirmed)]
    if all(limit is None or seconds <= WORTHWHILE * limit for limit in limits):
        return records[0]
    return confirmed


def contenders(
    records: Sequence[list[Any]], verdicts: Mapping[str, Verdict], untuned_s: float | None
) -> list[list[Any]]:
    """Return the records that are worth a try inside the model, confirmed and fast ones first.

    Every one that is faster in isolation than the untuned kernel, if only a little: the order
    there is not the order inside the model.

    Parameters
    ----------
    records : sequence of list
        JSON of the valid records, best first.
    verdicts : mapping of str to Verdict
        By `trace_key`; what was rejected is not tried again.
    untuned_s : float or None
        Seconds in isolation without a record.
    """
    limit = math.inf if untuned_s is None else NEARLY * untuned_s
    tried = [
        record
        for record in records
        if verdicts.get(trace_key(record)) is not Verdict.REJECTED
        and (seconds_of(record) or math.inf) <= limit
    ]
    # What another session confirmed comes first: the others have to beat it.
    tried.sort(key=lambda record: verdicts.get(trace_key(record)) is not Verdict.CONFIRMED)
    return tried[:CONTENDERS]
