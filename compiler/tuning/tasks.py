"""The kernels of a lowered module, as a tuning session keeps track of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.analysis import estimate_tir_flops

from hone.database import Database
from hone.errors import UsageError

from .order import estimate_s
from .records import Verdict, kernels, seconds_of, workload_module
from .replay import REFUSALS


@dataclass
class Task:
    """A kernel while the session lasts.

    Parameters
    ----------
    name : str
        Its name in the lowered module.
    calls : int
        How often the model calls it and its equals.
    workload : list
        JSON of MetaSchedule's ``Workload``: hash and module.
    names : list of str
        Of the kernel and its equals.
    module, untuned_module : str
        JSON of the module, unscheduled and as it is without a record.
    estimate_s : float
        A guess of its time.
    before_s, best_s, untuned_s : float or None
        Seconds of its best record before the session and now, and without a record.
    trials, failed : int
        Candidates tried, and how many failed.
    failure : str
        Why the last one did.
    model_s : float or None
        Seconds of all its calls in one run of the untuned model.
    verdict : Verdict or None
        Of this session, on the record that the kernel is compiled with, else on its best one.
    weights : list of int
        Positions of the arguments that are constants of the model.
    cold_bytes : int
        Size of all constants of the model, where they do not stay in the caches from one run to
        the next; else 0.
    """

    name: str
    calls: int
    names: list[str]
    workload: list[Any]
    module: str
    untuned_module: str
    estimate_s: float
    before_s: float | None
    best_s: float | None
    untuned_s: float | None = None
    trials: int = 0
    failed: int = 0
    failure: str = ""
    model_s: float | None = None
    verdict: Verdict | None = None
    weights: list[int] = field(default_factory=list)
    cold_bytes: int = 0

    @property
    def key(self) -> str:
        """MetaSchedule's hash of the kernel."""
        return str(self.workload[0])


@dataclass
class _Use:
    """How a model calls a TIR function: how often, and with constants at which positions."""

    calls: int = 0
    weights: list[int] = field(default_factory=list)


def _uses(module: tvm.IRModule) -> tuple[dict[str, _Use], int]:
    """Return the use of each TIR function, and the bytes of all constants."""
    uses: dict[str, _Use] = {}
    sizes: dict[int, int] = {}

    def visit(expression: relax.Expr) -> None:
        if not isinstance(expression, relax.Call) or not expression.args:
            return
        callee = expression.args[0]
        if not isinstance(callee, tvm.ir.GlobalVar):
            return
        use = uses.setdefault(callee.name_hint, _Use())
        use.calls += 1
        passed = expression.args[1] if len(expression.args) > 1 else ()
        fields = passed.fields if isinstance(passed, relax.Tuple) else ()
        constants = {i: f for i, f in enumerate(fields) if isinstance(f, tvm.ir.GenericConst)}
        use.weights = list(constants)
        for constant in constants.values():
            sizes[constant.__chandle__()] = int(constant.value.numpy().nbytes)

    for func in module.functions.values():
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func, visit)
    return uses, sum(sizes.values())


def _operations(workload: tvm.IRModule) -> float:
    """Return TVM's count of operations; 0 where it does not know an expression, such as a let."""
    try:
        return float(estimate_tir_flops(workload))
    except REFUSALS:
        return 0.0


def _moved_bytes(workload: tvm.IRModule) -> float:
    total = 0
    for info in ms.arg_info.ArgInfo.from_entry_func(workload):
        elements = math.prod(int(extent) for extent in info.shape)
        total += elements * tvm.runtime.DataType(str(info.dtype)).itemsize
    return float(total)


def extract(
    module: tvm.IRModule,
    database: Database,
    untuned: Callable[[tvm.IRModule], tvm.IRModule],
    names: Collection[str] | None,
    *,
    cache_bytes: int = 0,
) -> list[Task]:
    """Return the distinct unscheduled kernels of a module.

    Parameters
    ----------
    module : IRModule
        Lowered.
    database : Database
        Says what is known about them.
    untuned : callable
        Schedules a workload as it is without a record.
    names : collection of str or None
        The kernels to take; all when None.
    cache_bytes : int
        What the cores' own caches hold together: constants of no more than that stay there.

    Raises
    ------
    UsageError
        If there is no kernel of a given name.
    """
    functions = kernels(module)
    if names is not None:
        unknown = sorted(set(names) - set(functions))
        if unknown:
            raise UsageError(
                f"there is no kernel {', '.join(map(repr, unknown))} to tune.",
                hint=f"the module has {', '.join(functions) or 'none'}.",
            )
        functions = {name: func for name, func in functions.items() if name in names}
    uses, weight_bytes = _uses(module)
    stays = weight_bytes <= cache_bytes
    found: dict[str, Task] = {}
    for name, func in functions.items():
        workload = workload_module(func)
        filed = ms.database.Workload(workload).as_json()
        filed = [str(filed[0]), str(filed[1])]
        if filed[0] in found:
            found[filed[0]].calls += uses.get(name, _Use(calls=1)).calls
            found[filed[0]].names.append(name)
            continue
        records = database.records(filed[0])
        before_s = seconds_of(records[0]) if records else None
        found[filed[0]] = Task(
            name=name,
            calls=uses.get(name, _Use(calls=1)).calls,
            names=[name],
            workload=filed,
            module=tvm.ir.save_json(workload),
            untuned_module=tvm.ir.save_json(untuned(workload)),
            estimate_s=estimate_s(_operations(workload), _moved_bytes(workload)),
            before_s=before_s,
            best_s=before_s,
            weights=uses.get(name, _Use()).weights,
            cold_bytes=0 if stays else weight_bytes,
        )
    return list(found.values())


def untuned_model(
    module: tvm.IRModule, untuned: Callable[[tvm.IRModule], tvm.IRModule]
) -> tvm.IRModule:
    """Return a module with every kernel scheduled as it is without a record.

    Parameters
    ----------
    module : IRModule
        Lowered; not changed.
    untuned : callable
        Schedules a workload.
    """
    functions = dict(module.functions.items())
    variables = {variable.name_hint: variable for variable in functions}
    for name, func in kernels(module).items():
        scheduled = untuned(workload_module(func))["main"]
        functions[variables[name]] = scheduled.with_attr("global_symbol", name)
    return tvm.IRModule(functions, attrs=module.attrs)
