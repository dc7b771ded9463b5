"""Where the time of a model goes: each kernel timed inside the running model, against a roofline.

Times and calls come from the running package; operations, bytes, conversions and the rule of each
schedule from its manifest, where they were written when it was compiled. No compiler is needed but
to measure the machine's limits, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hone.targets.target import resolve

from .errors import UsageError
from .measure import bootstrap_median
from .package import Package
from .profiling.kernel_timer import ROUNDS, Call, Operand, Timing, Trace, time_calls, trace
from .profiling.roofline import Bound, Roofline, of_this_machine
from .progress import Progress, silent
from .runtime import Runner

if TYPE_CHECKING:
    from .model import Model
    from .packaging.manifest import CostEntry


@dataclass(frozen=True, kw_only=True)
class KernelProfile:
    """One kernel; sums over all its calls in one run.

    Parameters
    ----------
    name : str
        Of the kernel.
    layers : tuple of str
        Ids of the layers that it computes.
    converts : tuple of str
        Conversions between float and integers that it does.
    calls : int
        In one run.
    time_ms : float
        Median over runs.
    share : float
        Of the run, in [0, 1].
    dtype : str or None
        What most of its operations work on; where there are none, or it is not known, that of its
        largest weight, else of its largest tensor.
    weights_bytes : int
        Constants that it reads, each once.
    moved_bytes : int
        Inputs, weights and outputs.
    operations : float or None
        On elements, a multiply-add being two. None where the package does not say.
    rule : str or None
        What scheduled it; ``record`` for a tuning record. None where the package does not say.
    floor_ms : float or None
        Least time by the roofline.
    bound : Bound or None
        What that least time is spent on.
    peak : str or None
        Data type of the peak that the operations are held against.
    """

    name: str
    layers: tuple[str, ...]
    calls: int
    time_ms: float
    share: float
    dtype: str | None
    weights_bytes: int
    moved_bytes: int
    operations: float | None = None
    rule: str | None = None
    floor_ms: float | None = None
    bound: Bound | None = None
    peak: str | None = None
    converts: tuple[str, ...] = ()

    @property
    def gflops(self) -> float | None:
        """Billions of operations in a second; None where they or the time are unknown."""
        if self.operations is None or not self.time_ms:
            return None
        return self.operations / self.time_ms * 1e-6

    @property
    def roofline(self) -> float | None:
        """Least possible time over measured time: 1 is as fast as the machine allows."""
        if self.floor_ms is None or not self.time_ms:
            return None
        return self.floor_ms / self.time_ms


@dataclass(frozen=True, kw_only=True)
class Profile:
    """All kernels of a model, in the order of execution.

    Parameters
    ----------
    kernels : tuple of KernelProfile
        By their first call.
    run_ms : float
        A whole run that nobody watched, median.
    overhead_ms : float
        What is left of it without the kernels, which are timed under the virtual machine. Median
        over rounds.
    overhead_ci95_ms : tuple of float
        Bootstrap interval over rounds; where it holds 0, the overhead is lost in noise.
    timer_ms : float
        What watching adds to a call; taken off every time above.
    runs : int
        Watched runs.
    threads : int
        Of a run.
    weights_bytes : int
        Constants of all kernels.
    storage_bytes : int
        That activations share, as planned at compile time.
    roofline : Roofline or None
        What the machine can do at most.
    """

    kernels: tuple[KernelProfile, ...]
    run_ms: float
    overhead_ms: float
    overhead_ci95_ms: tuple[float, float]
    timer_ms: float
    runs: int
    threads: int
    weights_bytes: int
    storage_bytes: int
    roofline: Roofline | None

    @property
    def overhead_known(self) -> bool:
        """Whether the overhead can be told from noise."""
        return self.overhead_ci95_ms[0] > 0


def profile(
    runner: Runner,
    inputs: Mapping[str, np.ndarray],
    *,
    seconds: float = 2.0,
    roofline: Roofline | None = None,
    on_round: Callable[[int], None] | None = None,
) -> Profile:
    """Profile a package.

    Parameters
    ----------
    runner : Runner
        The package; its manifest says what each kernel does.
    inputs : mapping of str to ndarray
        Of its signature.
    seconds : float
        About how long to measure.
    roofline : Roofline, optional
        Of this machine, for as many threads.
    on_round : callable, optional
        Called with the number of rounds done, of `hone.profiling.kernel_timer.ROUNDS`.

    Raises
    ------
    UsageError
        The model branches or calls functions of its own.
    """
    traced = trace(runner, inputs)
    timing = time_calls(runner, inputs, traced, seconds=seconds, on_round=on_round)
    names = tuple(dict.fromkeys(call.name for call in traced.calls if call.is_kernel))
    columns = {
        name: [i for i, call in enumerate(traced.calls) if call.name == name] for name in names
    }
    times_ms = {
        name: float(np.median(timing.call_s[:, column].sum(axis=1))) * 1e3
        for name, column in columns.items()
    }
    overheads_ms = _overheads_ms(timing, traced)
    overhead_ms = float(np.median(overheads_ms))
    whole_ms = sum(times_ms.values()) + max(overhead_ms, 0.0)
    weights_bytes = _weights_bytes(traced.calls)
    kernels = []
    for name in names:
        calls = [traced.calls[i] for i in columns[name]]
        cost = runner.manifest.costs.get(name)
        moved = [_moved_bytes(call, cost) for call in calls]
        floor, bound, peak = None, None, None
        dtype = cost.dtype if cost is not None and cost.dtype else _dtype(calls[0].operands)
        if roofline is not None and cost is not None and dtype is not None:
            floors = [
                roofline.floor_s(
                    dtype=dtype,
                    operations=cost.operations,
                    weight_bytes=weights,
                    activation_bytes=activations,
                    model_bytes=weights_bytes + traced.storage_bytes,
                )
                for weights, activations in moved
            ]
            floor, bound = sum(seconds for seconds, _ in floors) * 1e3, max(floors)[1]
            peak = roofline.peak(dtype)[0]
        kernels.append(
            KernelProfile(
                name=name,
                layers=runner.manifest.kernels.get(name, ()),
                converts=() if cost is None else cost.converts,
                calls=len(calls),
                time_ms=times_ms[name],
                share=times_ms[name] / whole_ms if whole_ms else 0.0,
                dtype=dtype,
                weights_bytes=_weights_bytes(calls),
                moved_bytes=sum(map(sum, moved)),
                operations=None if cost is None else cost.operations * len(calls),
                rule=None if cost is None else cost.rule,
                floor_ms=floor,
                bound=bound,
                peak=peak,
            )
        )
    return Profile(
        kernels=tuple(kernels),
        run_ms=float(np.median(timing.run_s)) * 1e3,
        overhead_ms=overhead_ms,
        overhead_ci95_ms=bootstrap_median(overheads_ms),
        timer_ms=timing.timer_s * 1e3,
        runs=len(timing.call_s),
        threads=runner.threads,
        weights_bytes=weights_bytes,
        storage_bytes=traced.storage_bytes,
        roofline=roofline,
    )


def profile_model(
    model: Model, *, threads: int, seconds: float = 2.0, progress: Progress | None = None
) -> Profile:
    """Compile a model for this machine, without tuning, and profile it on seeded inputs.

    Parameters
    ----------
    model : Model
        From `hone.load`.
    threads : int
        Threads of one run.
    seconds : float
        About how long to measure.
    progress : Progress, optional
        Where to report.

    Raises
    ------
    ToolchainError
        This machine has no linker.
    UsageError
        The model branches.
    """
    from . import parity, runtime
    from .assembling import assemble

    progress = progress or silent()
    with progress.task("compile"):
        assembled = assemble(model, target=resolve("host"), threads=threads)
        runner = runtime.load(assembled.package, threads=threads)
    return _profiled(runner, parity.random_inputs(model, seed=0), seconds, progress)


def _profiled(
    runner: Runner, inputs: Mapping[str, np.ndarray], seconds: float, progress: Progress
) -> Profile:
    """Profile a package against the limits of this machine."""
    roofline = None
    if runner.manifest.costs:  # without them there is nothing to hold against the limits
        with progress.task("measure the machine"):
            roofline, problem = of_this_machine(resolve("host"), threads=runner.threads)
        if problem is not None:
            progress.log(problem)
    with progress.task("profile", total=ROUNDS) as task:
        return profile(runner, inputs, seconds=seconds, roofline=roofline, on_round=task.update)


def profile_package(
    package: Package,
    *,
    threads: int | None = None,
    seconds: float = 2.0,
    progress: Progress | None = None,
) -> Profile:
    """Profile a package on its golden inputs.

    Parameters
    ----------
    package : Package
        With golden samples.
    threads : int, optional
        Threads of one run; the package's default.
    seconds : float
        About how long to measure.
    progress : Progress, optional
        Where to report.

    Raises
    ------
    PackageError
        This machine cannot run it.
    UsageError
        It has no golden inputs, or its model branches.
    """
    from . import runtime

    runner = runtime.load(package, threads=threads)
    samples = package.golden()
    if not samples:
        raise UsageError(
            "the package holds no golden inputs to run", hint="profile its ONNX model instead"
        )
    return _profiled(runner, samples[0].inputs, seconds, progress or silent())


def _overheads_ms(timing: Timing, traced: Trace) -> np.ndarray:
    """Return ``[rounds]``: unwatched run less the kernels of the watched ones beside it."""
    kernels = [i for i, call in enumerate(traced.calls) if call.is_kernel]
    sums = timing.call_s[:, kernels].sum(axis=1)
    medians = [
        np.median(sums[timing.watched_rounds == number]) for number in range(len(timing.run_s))
    ]
    overheads: np.ndarray = (timing.run_s - np.array(medians)) * 1e3
    return overheads


def _weights_bytes(calls: Sequence[Call]) -> int:
    weights = {o.address: o.size_bytes for call in calls for o in call.operands if o.weight}
    return sum(weights.values())


def _moved_bytes(call: Call, cost: CostEntry | None) -> tuple[int, int]:
    """Return the bytes of weights, and of everything else, that one call touches."""
    limits = cost.touched_bytes if cost is not None else ()
    if len(limits) != len(call.operands):
        limits = tuple(operand.size_bytes for operand in call.operands)
    weights = activations = 0
    for operand, limit in zip(call.operands, limits, strict=True):
        touched = min(operand.size_bytes, limit)
        weights += touched if operand.weight else 0
        activations += 0 if operand.weight else touched
    return weights, activations


def _dtype(operands: Sequence[Operand]) -> str | None:
    if not operands:
        return None
    return max(operands, key=lambda o: (o.weight, o.size_bytes)).dtype
