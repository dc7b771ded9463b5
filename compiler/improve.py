"""``hone build``: try each step of a recipe, measure it against what was kept, keep or revert.

Nothing is kept because it ought to be better. A step that is not faster outside noise (or, with
``goal = "size"``, not smaller), or costs more accuracy than the budget, is reverted, and the report
says so with both numbers.
"""

from __future__ import annotations

import time
from dataclasses import replace

from . import driver, parity
from .errors import AccuracyError
from .outcome import finish
from .progress import Progress, silent
from .recipe import Recipe
from .report.schema import Report, Verdict
from .steps import registry, tune
from .steps.candidate import Candidate
from .steps.options.section import StepSection
from .steps.options.tune import TuneStep
from .summary import Judged, Version
from .verdict import Change, judge
from .workbench import Workbench


def build(recipe: Recipe, *, progress: Progress | None = None) -> Report:
    """Run a recipe and write package, ``report.json`` and ``report.html``.

    Parameters
    ----------
    recipe : Recipe
        From `hone.recipe.load`.
    progress : Progress, optional
        Where to report.

    Returns
    -------
    Report
        As written to ``report.json``.

    Raises
    ------
    HoneError
        Anything that stops the build before it has a result; see the exit codes.
    """
    return _run(Workbench(recipe, progress or silent()))


def _baseline(bench: Workbench) -> Version:
    """Compile the model as it is and compare it with onnxruntime."""
    baseline = bench.version("baseline", bench.model)
    try:
        checked = parity.check(bench.model, baseline.runner.run, threads=bench.threads)
    except AccuracyError:
        if not bench.target.separate_adders:
            raise
        bench.forgo_separate_adders()
        baseline = _baseline(bench)
        bench.notes.append(f"{driver.TOO_FAR_BY_SUMS}; compiled without them")
        return baseline
    bench.notes.append(str(checked))
    return baseline


def _run(bench: Workbench) -> Report:
    """Run all steps, measure everything once more together, write the results."""
    started = time.monotonic()
    baseline = _baseline(bench)
    rows = [
        Judged(
            name=baseline.name,
            version=baseline,
            verdict=Verdict.BASELINE,
            reason="fp32, no tuning: the schedules that every later row starts from",
            seconds=time.monotonic() - started,
        )
    ]
    rows += _tuned_baseline(bench)
    kept = baseline
    for step, name in zip(bench.recipe.step, bench.recipe.step_names(), strict=True):
        started = time.monotonic()
        judged = _step(bench, step, name, kept)
        rows.append(replace(judged, seconds=time.monotonic() - started))
        bench.progress.log(f"{name}: {judged.verdict} ({judged.reason})")
        if judged.version and judged.verdict in (Verdict.KEPT, Verdict.NOT_MEASURED):
            kept = judged.version
    return finish(bench, rows, kept)


def _tuned_baseline(bench: Workbench) -> list[Judged]:
    """Return the row of the unchanged model after tuning, where the recipe wants one."""
    seconds = bench.recipe.baseline_tune_seconds
    if not seconds or not bench.measurable:
        return []
    started = time.monotonic()
    found = bench.tune(bench.model, seconds)
    version = bench.version(f"baseline tuned ({seconds:g} s)", bench.model, tuned=True)
    return [
        Judged(
            name=version.name,
            version=version,
            verdict=Verdict.BASELINE,
            reason=f"for comparison; {found if isinstance(found, str) else tune.found(found)}",
            seconds=time.monotonic() - started,
            settings={"seconds": seconds},
        )
    ]


def _step(bench: Workbench, step: StepSection, name: str, kept: Version) -> Judged:
    context = replace(bench.context, trials=bench.trials(tuned=kept.tuned))
    with bench.progress.task(step.title):
        candidate = registry.propose(kept.model, kept.precision, step, context)
    if isinstance(candidate, str):
        candidate = Candidate(model=kept.model, note=candidate)
        nothing = True
    else:
        same = candidate.model.module.same_as(kept.model.module)
        nothing = same and not isinstance(step, TuneStep)
    if nothing:
        judged = Judged(
            name=name,
            verdict=Verdict.REVERTED if bench.measurable else Verdict.NOT_MEASURED,
            reason=candidate.note or "nothing to change",
        )
    else:
        version = bench.version(
            name,
            candidate.model,
            precision=candidate.precision or kept.precision,
            tuned=kept.tuned or isinstance(step, TuneStep),
        )
        judged = _judge(bench, version, kept)
        if candidate.note:
            judged = replace(judged, reason=f"{judged.reason}; {candidate.note}")
    return replace(
        judged,
        settings=step.model_dump(mode="json"),
        skipped=candidate.skipped,
        errors=candidate.errors,
        precisions=candidate.precisions,
        conversions=candidate.conversions,
    )


def _judge(bench: Workbench, version: Version, kept: Version) -> Judged:
    """Hold a candidate against what was kept, and say whether it stays."""
    speedup = None
    if bench.measurable and bench.recipe.goal.goal == "latency":
        measured = bench.compare({"kept": kept, "candidate": version})
        speedup = measured.speedup("candidate", over="kept")
    memory = None
    if bench.recipe.goal.goal == "memory":
        memory = _activations(kept), _activations(version)
    change = Change(
        lost=bench.lost(version.quality),
        weights_bytes=(kept.weights_bytes, version.weights_bytes),
        speedup=speedup,
        activations_bytes=memory,
    )
    verdict, reason = judge(change, bench.recipe)
    return Judged(
        name=version.name,
        version=version,
        verdict=verdict,
        reason=reason,
        previous=kept.name if bench.measurable else None,
    )


def _activations(version: Version) -> int:
    """Return the memory that the activations of a version share."""
    memory = version.assembled.package.manifest.memory
    if memory is None:
        raise ValueError("a package that was compiled just now knows its memory")
    return memory.activations_bytes
