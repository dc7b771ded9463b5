"""Applies a tuning record to the kernel that it was found for, and checks that it still lowers."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import meta_schedule as ms

from hone.errors import HoneError
from hone.passes.lower.promote_accumulators import CODEGEN_CONFIG, tir_pipeline
from hone.targets.schedule.tiles import register_intrinsics

from .reason import reason_of
from .records import Match, workload_module


class ReplayError(HoneError):
    """A tuning record does not fit its kernel any more."""


REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
"""What TVM raises when a trace does not fit; `ScheduleError` is a RuntimeError."""


def parse(record: list[Any], workload: ms.database.Workload) -> ms.database.TuningRecord:
    """Return a record from its JSON; TVM replays its trace to read it.

    Parameters
    ----------
    record : list
        JSON of the ``TuningRecord``.
    workload : Workload
        The kernel that it was found for.

    Raises
    ------
    ReplayError
        If the trace does not apply.
    """
    register_intrinsics(workload.mod)
    try:
        return ms.database.TuningRecord.from_json(record, workload)
    except REFUSALS as error:
        raise ReplayError(f"the record does not apply: {reason_of(error)}") from error


def replay(func: tirx.PrimFunc, match: Match, target: tvm.target.Target) -> tirx.PrimFunc:
    """Return a kernel scheduled as its record says.

    Parameters
    ----------
    func : PrimFunc
        Unscheduled.
    match : Match
        Of the same kernel.
    target : Target
        What it will be compiled for.

    Returns
    -------
    PrimFunc
        Scheduled, with the attributes of `func` and ``tirx.is_scheduled``.

    Raises
    ------
    ReplayError
        If the record's trace does not apply, or its result does not lower.
    """
    record = parse(match.record, ms.database.Workload.from_json(match.workload))
    # The name keeps a reference: TVM changes a module in place that only its schedule refers to,
    # and with it `func`, whose body it shares.
    workload = workload_module(func)
    schedule = s_tir.Schedule(workload)
    try:
        record.trace.apply_to_schedule(schedule, remove_postproc=False)
        scheduled = plain(schedule.mod)
        _lower(scheduled, target)
    except REFUSALS as error:
        raise ReplayError(f"the record does not lower: {reason_of(error)}") from error
    result = scheduled["main"]
    attributes = dict(func.attrs.items()) if func.attrs else {}
    if "global_symbol" not in attributes:
        result = result.without_attr("global_symbol")
    for name, value in attributes.items():
        result = result.with_attr(name, value)
    return result.with_attr("tirx.is_scheduled", True)


def plain(module: tvm.IRModule) -> tvm.IRModule:
    """Return a scheduled module without MetaSchedule's marks for weight layout rewriting."""
    return s_tir.transform.RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module)


def _lower(module: tvm.IRModule, target: tvm.target.Target) -> None:
    """Run everything up to code generation, as a check."""
    lower, finalize_host, _ = tir_pipeline()
    with tvm.transform.PassContext(opt_level=3, config=CODEGEN_CONFIG):
        module = tirx.transform.BindTarget(target.with_host(target))(module)
        finalize_host()(lower(module))
