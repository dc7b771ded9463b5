"""From a model to a package: tune, assemble, prove.

What ``hone compile`` and ``hone tune`` do.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hone.passes.quantize.pack_weights import WeightPacking
from hone.passes.quantize.quantize_int8 import Quantization
from hone.targets.target import Target, resolve

from . import half_parity, parity, pipeline, runtime
from .assembling import assemble, golden_samples, in_integers, reference_runner, runs_here
from .data import Dataset
from .database import Database
from .errors import AccuracyError, LockedError, ToolchainError, UsageError
from .half_parity import check_half
from .model import Model
from .package import Package
from .progress import Progress, silent
from .quantized import Wanted
from .slicing import slice_batch
from .steps.options.half import HalfOptions
from .steps.options.int8 import Int8Step

if TYPE_CHECKING:
    import tvm

    from .tune import TuneResult
    from .tuning.choices import LoweringResult

TOO_FAR_BY_SUMS = "products of sums (values far from 1 cancel in them) lose too much accuracy here"
"""Why a model is compiled a second time; see `hone.passes.lower.pairs`."""
# Of a tuning budget, for the ways to cut a batch.
SLICES_SHARE = 0.2
# Of a tuning budget, for the ways to lower layers, which come before the schedules, and as long as
# anything is left of them once more behind; and the least that leaves it, or schedules, time for
# more than the start.
LOWERING_SHARE = 0.5
LEAST_LOWERING_S = 45.0
LEAST_TURN_S = 20.0


def compile(
    model: Model,
    *,
    target: str | Target = "host",
    threads: int = 2,
    precision: str = "fp32",
    tune_seconds: float | None = None,
    database: Path | None = None,
    locked: bool = False,
    calibration: str | Dataset | None = None,
    int8: Int8Step | None = None,
    half: HalfOptions | None = None,
    allow_random_calibration: bool = False,
    goal: str = "latency",
    progress: Progress | None = None,
) -> Package:
    """Compile a model, check it against onnxruntime, and return a package.

    Parameters
    ----------
    model : Model
        From `hone.load`.
    target : str or Target
        A name that `hone target list` shows.
    threads : int
        Threads of one run.
    precision : {"fp32", "bf16", "fp16", "int8"}
        ``bf16`` and ``fp16`` compute products of 16-bit floats, ``int8`` quantizes with the
        calibration data. The package is fp32 where no layer fits. A model that is quantized already
        keeps its own levels, and its package is int8 without calibration data.
    tune_seconds : float, optional
        Search for better schedules for so long first; needs a target that runs here.
    database : Path, optional
        Folder of tuning records; ``.hone/tuning`` when only ``tune_seconds`` is given.
    locked : bool
        Refuse to compile a kernel that the database knows nothing about.
    calibration : str or Dataset, optional
        Samples for ``int8``, in the data syntax.
    int8 : Int8Step, optional
        How ``int8`` calibrates and quantizes, as in a recipe; its defaults when absent.
    half : Bf16Step or Fp16Step, optional
        Which layers ``bf16`` or ``fp16`` leaves in float32, as in a recipe; none when absent.
    allow_random_calibration : bool
        Whether ``random:N`` calibrates, which says nothing about real value ranges.
    goal : {"latency", "size"}
        ``size`` prefers small weights to speed, where a kernel has the choice.
    progress : Progress, optional
        Where to report.

    Returns
    -------
    Package

    Raises
    ------
    AccuracyError
        The result differs from onnxruntime's (exit 4).
    LockedError
        ``locked``, and a record is missing (exit 9).
    UsageError
        The options do not go together (exit 2).
    """
    progress = progress or silent()
    if not isinstance(model, Model):
        raise UsageError(
            f"a model is required, given is a {type(model).__name__}",
            hint="hone.load(path or onnx.ModelProto) returns one",
        )
    resolved = resolve(target)
    if not isinstance(threads, int) or threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads!r}")
    compact = _compact(goal)
    wanted = Wanted(
        precision=precision,
        calibration=calibration,
        int8=int8,
        half=half,
        allow_random_calibration=allow_random_calibration,
    )
    wanted.check(model)
    if locked and database is None:
        raise UsageError("locked needs a database of tuning records", hint="--database DIR")
    records = _database(resolved, threads=threads, folder=database, tune_seconds=tune_seconds)
    unchanged = model
    model, precision = wanted.apply(model, resolved, threads=threads, progress=progress)
    if tune_seconds is not None and records is not None:
        search(
            model, resolved, threads=threads, seconds=tune_seconds, database=records,
            progress=progress, compact=compact,
        )  # fmt: skip
    attempt = partial(
        _compiled, model, unchanged, threads=threads, precision=precision, records=records,
        locked=locked, compact=compact, progress=progress,
    )  # fmt: skip
    try:
        return attempt(resolved)
    except AccuracyError:
        # A locked build has records of the form that was tuned, and of no other.
        if locked or not resolved.separate_adders:
            raise
    package = attempt(replace(resolved, separate_adders=False))
    progress.log(f"{TOO_FAR_BY_SUMS}; compiled without them")
    return package


def _compiled(
    model: Model,
    unchanged: Model,
    target: Target,
    *,
    threads: int,
    precision: str,
    records: Database | None,
    locked: bool,
    compact: bool,
    progress: Progress,
) -> Package:
    """Compile a model and compare it with onnxruntime; see `compile`."""
    with progress.task("compile"):
        assembled = assemble(
            model,
            target=target,
            threads=threads,
            precision=precision,
            database=records,
            compact=compact,
        )
    if assembled.quantization is not None and assembled.packing is not None:
        _report_quantization(assembled.quantization, assembled.packing, progress=progress)
    if records is not None:
        _report_hits(assembled.scheduled, locked=locked, progress=progress)
    runner = reference_runner(model, assembled.package, target=target, threads=threads)
    with progress.task("compare with onnxruntime"):
        if model is unchanged:
            run = runner.run
        else:
            host = replace(resolve("host"), separate_adders=False)
            run = runtime.load(assemble(unchanged, target=host, threads=threads).package).run
        twin = "" if runs_here(target) else ", by its twin for this machine"
        progress.log(f"{parity.check(unchanged, run, threads=threads)}{twin}")
        if precision in half_parity.DTYPES:
            rounded = check_half(unchanged, runner.run, precision=precision, threads=threads)
            progress.log(f"{precision}: {rounded}{twin}")
    return assembled.package.with_evidence(
        golden=golden_samples(model, runner),
        recipe={"precision": assembled.package.manifest.precision, "tuned": records is not None},
    )


def _database(
    target: Target, *, threads: int, folder: Path | None, tune_seconds: float | None
) -> Database | None:
    if folder is None and tune_seconds is None:
        return None
    return Database(folder or Path(".hone", "tuning"), target, threads=threads)


def _compact(goal: str) -> bool:
    """Say whether small weights are preferred to speed."""
    if goal not in ("latency", "size"):
        raise UsageError(f"goal {goal!r} is unknown", hint="one of latency, size")
    return goal == "size"


def _report_quantization(
    found: Quantization, packing: WeightPacking, *, progress: Progress
) -> None:
    if found.quantized or found.conversions or not packing.packed:
        progress.log(
            f"int8: the model is quantized: {len(found.quantized)} kernels in int8, "
            f"{len(found.conversions)} conversions"
        )
    for layer, reason in found.skipped:
        if layer not in packing.packed:
            progress.log(f"int8: {layer} stays in float: {reason}")
    for bits, count in sorted(Counter(packing.packed.values()).items()):
        read = "1 layer reads" if count == 1 else f"{count} layers read"
        progress.log(f"weights: {read} the model's own levels, packed in {bits} bits")
    for layer, reason in packing.skipped:
        progress.log(f"weights: those of {layer} become float32: {reason}")


def _report_hits(scheduled: pipeline.Scheduled, *, locked: bool, progress: Progress) -> None:
    total = len(scheduled.decisions)
    if locked and scheduled.untuned:
        raise LockedError(
            f"{len(scheduled.untuned)} of {total} kernels have no tuning record: "
            + ", ".join(scheduled.untuned),
            hint="`hone tune` fills the database; without --locked they are compiled untuned",
        )
    share = f"{100 * scheduled.hits / total:.0f}%" if total else "no kernels"
    progress.log(f"tuning records: {scheduled.hits} of {total} kernels ({share})")
    if scheduled.rejected:
        progress.log(
            f"records of {len(scheduled.rejected)} kernels are not used: they were faster in "
            "isolation and not inside the model"
        )
    for failure in scheduled.failed:
        progress.log(f"tuning record not usable, compiled untuned: {failure}")


def search(
    model: Model,
    target: Target,
    *,
    threads: int,
    seconds: float,
    database: Database,
    progress: Progress,
    compact: bool = False,
) -> TuneResult:
    """Tune the kernels that `assemble` compiles; see `tune`.

    Those of a batch in slices run on one thread: their records are kept as such.

    Raises
    ------
    ToolchainError
        This machine cannot run the target's code (exit 6).
    """
    if not runs_here(target):
        raise ToolchainError(
            f"tuning measures on the target, and this machine cannot run code for {target.name!r}",
            hint="compile without --tune, or tune on such a machine and copy its database",
        )
    from .tune import tune as tune_kernels
    from .tuning.choices import tune_lowerings
    from .tuning.slices import tune_slices

    model, _, _ = in_integers(model)
    if seconds >= LEAST_LOWERING_S:
        started = time.monotonic()
        tune_slices(
            model,
            target,
            threads=threads,
            budget_s=SLICES_SHARE * seconds,
            database=database,
            compact=compact,
            progress=progress,
        )
        seconds = max(seconds - (time.monotonic() - started), LEAST_TURN_S)
    slicing = slice_batch(model.module, target, threads=threads, decided=database.lowerings())
    model, threads = model.with_module(slicing.module), slicing.threads
    database = database.of_threads(threads)
    deadline = time.monotonic() + seconds
    lowering: LoweringResult | None = None
    result: TuneResult | None = None
    while result is None or _goes_on(lowering, deadline):
        before = database.lowerings()
        left = max(deadline - time.monotonic(), LEAST_TURN_S)
        if left >= LEAST_LOWERING_S:
            found = tune_lowerings(
                model.module,
                target,
                threads=threads,
                budget_s=left * (LOWERING_SHARE if lowering is None else 1.0),
                database=database,
                compact=compact,
                progress=progress,
            )
            lowering = found if lowering is None else lowering.followed_by(found)
            left = max(deadline - time.monotonic(), LEAST_TURN_S)
        if result is None or (database.lowerings() != before and left > LEAST_TURN_S):
            lowered: tvm.IRModule = pipeline.lower(
                model.module, target, threads=threads, compact=compact, decided=database.lowerings()
            )
            result = tune_kernels(
                lowered,
                target,
                threads=threads,
                budget_s=left,
                database=database,
                progress=progress,
            )
    left = deadline - time.monotonic()
    if left > LEAST_TURN_S and result.exhausted and (lowering is None or lowering.exhausted):
        progress.log(f"nothing is left to try: {left:.0f} of {seconds:.0f} s were not needed")
    return replace(result, lowering=lowering)


def _goes_on(lowering: LoweringResult | None, deadline: float) -> bool:
    """Say whether ways to lower layers are left to try, and time to do so."""
    if lowering is None or lowering.exhausted or lowering.failure:
        return False
    return deadline - time.monotonic() >= LEAST_LOWERING_S


def tune(
    model: Model,
    *,
    target: str | Target = "host",
    threads: int = 2,
    budget_s: float,
    database: Path,
    wanted: Wanted | None = None,
    goal: str = "latency",
    progress: Progress | None = None,
) -> TuneResult:
    """Search for better schedules of a model's kernels and keep the records.

    Parameters
    ----------
    model : Model
        From `hone.load`, or compressed.
    target : str or Target
        Must run on this machine.
    threads : int
        Threads of one run.
    budget_s : float
        Seconds, start-up included.
    database : Path
        Folder of tuning records; created where it is missing.
    wanted : Wanted, optional
        The precision that the model will be compiled in, as `compile` takes it; fp32 when absent.
    goal : {"latency", "size"}
        That of the compilation.
    progress : Progress, optional
        Where to report.

    Returns
    -------
    TuneResult

    Raises
    ------
    OutOfTimeError
        No candidate could be measured within the budget (exit 11).
    InterruptError
        Interrupted by the user; everything measured is kept (exit 130).
    """
    resolved = resolve(target)
    progress = progress or silent()
    wanted = wanted or Wanted()
    wanted.check(model)
    records = Database(database, resolved, threads=threads)
    model, _ = wanted.apply(model, resolved, threads=threads, progress=progress)
    return search(
        model,
        resolved,
        threads=threads,
        seconds=budget_s,
        database=records,
        progress=progress,
        compact=_compact(goal),
    )
