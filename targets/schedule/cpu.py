"""Chooses the schedule of a TIR function for a CPU, by the names of its blocks.

Rewrites every unscheduled PrimFunc of a module. Runs after fusion; functions that a tuning record
has scheduled are left alone. Numerics: sums may be taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from .attention import schedule_attention
from .bands import schedule_bands
from .blocks import DoesNotFitError, is_scheduled, leaves, name_of
from .contraction import schedule_batch_matmul, schedule_conv2d, schedule_dense
from .copies import write_copies
from .generic import schedule_generic
from .integer import schedule_dot_conv2d, schedule_dot_dense
from .machine import Machine
from .matrix import schedule_matrices
from .pairs import schedule_pairs
from .pooling import schedule_pooling
from .resize import schedule_resize
from .rows import schedule_columns, schedule_rows
from .single_row import schedule_single_row
from .strided_winograd import schedule_strided_winograd
from .tiles import schedule_tiles
from .weight_only import schedule_weight_only_dense
from .window import schedule_window
from .winograd import schedule_winograd
from .winograd_rows import schedule_winograd_rows

WRITTEN = "its loops are written out, parallel ones included"
"""Why no rule schedules a function that TVM's own code wrote."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which rule scheduled a kernel.

    Parameters
    ----------
    kernel : str
        Name of the PrimFunc.
    rule : str
        ``conv2d``, ``dense``, ``single_row``, ``batch_matmul``, ``attention``, ``window``,
        ``bands``, ``winograd``, ``winograd_rows``, ``strided_winograd``, ``pairs``, ``rows``,
        ``columns``, ``weight_only``, ``tiles``, ``copies``, ``matrices``, ``resize``,
        ``pooling``, ``generic``, ``record`` or ``none``.
    reason : str
        Why a more special rule did not apply; empty where one did.
    """

    kernel: str
    rule: str
    reason: str = ""


def _template(blocks: dict[str, SBlockRV]) -> str:
    if {"conv_acc", "dw_acc"} <= blocks.keys():
        return "bands"
    for prefix, rule in (
        ("conv_acc", "conv2d"),
        ("pair_acc", "pairs"),
        ("dw_acc", "window"),
        ("mm_acc", "dense"),
        ("mmrow_acc", "single_row"),
        ("wonly_acc", "weight_only"),
        ("wgroup_acc", "weight_only"),
        ("bmm_acc", "batch_matmul"),
        ("qconv_acc", "dot_conv2d"),
        ("tile_acc", "tiles"),
        ("qmm_acc", "dot_dense"),
        ("matrix_acc", "matrices"),
        ("wino_row_acc", "winograd_rows"),
        ("wino_acc", "winograd"),
        ("swino_acc", "strided_winograd"),
        ("attn_acc", "attention"),
        ("resize_out", "resize"),
        ("pool_out", "pooling"),
        ("row_total", "rows"),
        ("col_", "columns"),
    ):
        if any(name.startswith(prefix) for name in blocks):
            return rule
    return "generic"


def _apply(rule: str, schedule: s_tir.Schedule, machine: Machine) -> None:
    blocks = leaves(schedule)
    by_name = {name_of(schedule, block): block for block in blocks}

    def find(prefix: str) -> SBlockRV | None:
        return next((b for name, b in by_name.items() if name.startswith(prefix)), None)

    whole = {
        "generic": schedule_generic,
        "attention": schedule_attention,
        "bands": schedule_bands,
        "resize": schedule_resize,
        "pooling": schedule_pooling,
        "pairs": schedule_pairs,
        "rows": schedule_rows,
        "columns": schedule_columns,
        "winograd": schedule_winograd,
        "winograd_rows": schedule_winograd_rows,
        "strided_winograd": schedule_strided_winograd,
        "single_row": schedule_single_row,
        "weight_only": schedule_weight_only_dense,
    }
    if rule in whole:
        whole[rule](schedule, machine)
        return
    if rule in ("tiles", "matrices"):
        cut = {"tiles": schedule_tiles, "matrices": schedule_matrices}[rule]
        cut(schedule, machine, blocks)
        return
    anchors: dict[str, str] = {
        "conv2d": "conv_acc",
        "window": "dw_acc",
        "dense": "mm_acc",
        "batch_matmul": "bmm_acc",
        "dot_conv2d": "qconv_acc",
        "dot_dense": "qmm_acc",
    }
    anchor = find(anchors[rule])
    if rule == "conv2d":
        schedule_conv2d(schedule, machine, anchor, find("conv_pad"), blocks)
    elif rule == "window":
        schedule_window(schedule, machine, anchor, find("dw_pad") or find("dw_words"), blocks)
    elif rule == "dense":
        schedule_dense(schedule, machine, anchor, blocks)
    elif rule == "dot_conv2d":
        schedule_dot_conv2d(schedule, machine, anchor, find("qconv_pad"), blocks)
    elif rule == "dot_dense":
        schedule_dot_dense(schedule, machine, anchor, find("qmm_pad"), blocks)
    else:
        schedule_batch_matmul(schedule, machine, anchor, find("bmm_pad"), blocks)


def trace(func: tirx.PrimFunc, machine: Machine) -> tuple[s_tir.Schedule | None, str, str]:
    """Schedule one function by the most special rule that applies, and keep the steps.

    A template that the function does not fit (a ``ScheduleError``) gives way to the generic rule.

    Returns
    -------
    tuple
        The schedule with its trace, None where no rule applies or where `write_copies` needs none;
        the rule's name; and why a more special one did not apply.
    """
    if _is_written(func):
        return None, "none", WRITTEN
    if _copies(func, machine) is not None:
        return None, "copies", ""
    return _trace(func, machine)


def _is_written(func: tirx.PrimFunc) -> bool:
    return not isinstance(func.body, s_tir.SBlockRealize) or func.body.block.name_hint != "root"


def _copies(func: tirx.PrimFunc, machine: Machine) -> tirx.PrimFunc | None:
    """Return a function without a template as plain copies, where it is no more than that."""
    probe = s_tir.Schedule(tvm.IRModule({"main": func}))
    named = {name_of(probe, block): block for block in leaves(probe)}
    return write_copies(func, machine) if _template(named) == "generic" else None


def _trace(func: tirx.PrimFunc, machine: Machine) -> tuple[s_tir.Schedule | None, str, str]:
    reason = ""
    probe = s_tir.Schedule(tvm.IRModule({"main": func}))
    first = _template({name_of(probe, block): block for block in leaves(probe)})
    for rule in dict.fromkeys((first, "generic")):
        schedule = s_tir.Schedule(tvm.IRModule({"main": func}))
        try:
            _apply(rule, schedule, machine)
        except (s_tir.ScheduleError, DoesNotFitError) as error:
            reason = f"{rule}: {str(error).strip().splitlines()[-1]}"
            continue
        return schedule, rule, reason
    return None, "none", reason


def schedule_function(
    func: tirx.PrimFunc, machine: Machine, *, kernel: str
) -> tuple[tirx.PrimFunc, Decision]:
    """Schedule one function as `trace` does.

    Returns
    -------
    tuple
        The function, marked as scheduled, and the decision.
    """
    if _is_written(func):
        return func, Decision(kernel=kernel, rule="none", reason=WRITTEN)
    copies = _copies(func, machine)
    if copies is not None:
        copies = copies.with_attr("tirx.is_scheduled", True)
        return copies, Decision(kernel=kernel, rule="copies")
    schedule, rule, reason = _trace(func, machine)
    if schedule is not None:
        func = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
    return func, Decision(kernel=kernel, rule=rule, reason=reason)


class ScheduleModule:
    """Schedule every unscheduled PrimFunc of a module.

    Parameters
    ----------
    machine : Machine
        Decides tiles and tasks.
    on_decision : callable, optional
        Is given each `Decision`.
    """

    def __init__(
        self, machine: Machine, *, on_decision: Callable[[Decision], None] | None = None
    ) -> None:
        self._machine = machine
        self._on_decision = on_decision

    def __call__(self, module: tvm.IRModule) -> tvm.IRModule:
        """Return the module with its functions scheduled."""
        functions = {}
        for variable, func in module.functions.items():
            if isinstance(func, tirx.PrimFunc):
                if is_scheduled(func):
                    decision = Decision(kernel=variable.name_hint, rule="record")
                else:
                    func, decision = schedule_function(
                        func, self._machine, kernel=variable.name_hint
                    )
                if self._on_decision is not None:
                    self._on_decision(decision)
            functions[variable] = func
        return tvm.IRModule(functions, attrs=module.attrs)
