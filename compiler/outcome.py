"""What ``hone build`` writes: the package that was kept, measured once more beside all others."""

from __future__ import annotations

from .assembling import golden_samples
from .beside_peers import measure_beside_peers
from .errors import UsageError
from .evaluate import Quality, evaluate
from .measure import Measurement
from .packaging.manifest import AccuracyEntry
from .peers import peer_precision
from .profile import Profile, profile
from .profiling.kernel_timer import ROUNDS
from .profiling.roofline import of_this_machine
from .reference import reference
from .report import html
from .report.schema import Latency, Report, Verdict
from .report.schema import Peer as PeerRow
from .summary import Judged, Version, summarize
from .workbench import Workbench

PROFILE_S = 0.5


def finish(bench: Workbench, rows: list[Judged], kept: Version) -> Report:
    """Measure all versions together, and write package, ``report.json`` and ``report.html``.

    Parameters
    ----------
    bench : Workbench
        What the steps shared.
    rows : list of Judged
        The baselines, and a row for each step.
    kept : Version
        What the package holds.
    """
    measured, peers = _measure_all(bench, rows, kept)
    report = summarize(
        bench.recipe,
        bench.model,
        rows=rows,
        kept=kept,
        measured=measured,
        peers=peers,
        profiled=_profile(bench, kept),
        notes=bench.notes,
    )
    package = kept.assembled.package.with_evidence(
        golden=golden_samples(kept.model, kept.runner),
        recipe=_decisions(bench, rows, kept),
        accuracy=_accuracy_entry(kept.quality),
    )
    folder = bench.recipe.output_directory
    package.save(bench.recipe.package_path)
    report.write(folder / "report.json")
    (folder / "report.html").write_text(html.render(report), encoding="utf-8")
    return report


def _profile(bench: Workbench, kept: Version) -> Profile | None:
    """Time the kernels of what the package holds, inside the running model."""
    if not bench.measurable:
        return None
    with bench.progress.task("profile", total=ROUNDS) as task:
        limits, problem = of_this_machine(bench.target, threads=kept.runner.threads)
        if problem is not None:
            bench.notes.append(problem)
        try:
            return profile(
                kept.runner,
                bench.evaluation.sample(0),
                seconds=PROFILE_S,
                roofline=limits,
                on_round=task.update,
            )
        except UsageError as error:
            bench.notes.append(f"kernels are not timed: {error.message}")
            return None


def _accuracy_entry(quality: Quality) -> AccuracyEntry | None:
    if quality.accuracy is not None:
        return AccuracyEntry(metric="top-1", value=quality.accuracy, samples=quality.samples)
    return None


def _decisions(bench: Workbench, rows: list[Judged], kept: Version) -> dict[str, object]:
    """Return what was decided, for the manifest: nothing that depends on clock or host."""
    decided: dict[str, object] = {
        "goal": bench.recipe.goal.goal,
        "max_accuracy_drop": bench.recipe.goal.max_accuracy_drop,
        "seed": bench.recipe.seed,
        "steps": [
            {**row.settings, "verdict": str(row.verdict)}
            for row in rows
            if row.verdict is not Verdict.BASELINE
        ],
    }
    if kept.tuned:
        decided["tuning_database"] = bench.database.fingerprint()
    return decided


def _measure_all(
    bench: Workbench, rows: list[Judged], kept: Version
) -> tuple[Measurement | None, dict[str, PeerRow]]:
    """Measure every version and every peer in one interleaved run."""
    if not bench.measurable or bench.model.source is None:
        return None, {}
    inputs = bench.evaluation.sample(0)
    found = measure_beside_peers(
        {row.name: row.version.runner.prepare(inputs) for row in rows if row.version},
        next(row.name for row in rows if row.version is kept),
        names=bench.recipe.measure.baselines,
        source=bench.model.source,
        inputs=inputs,
        threads=bench.threads,
        precision=peer_precision(kept.precision),
        rounds=bench.rounds,
        progress=bench.progress,
    )
    bench.notes += found.notes
    peers = {
        info.name: PeerRow(
            latency_ms=Latency.of(found.measured.latency(info.name)),
            accuracy=_peer_accuracy(bench, info.name),
            version=info.version,
            threads=info.threads,
            precision=info.precision,
        )
        for info in found.peers
    }
    return found.measured, peers


def _peer_accuracy(bench: Workbench, name: str) -> float | None:
    """Return onnxruntime's accuracy; other peers are measured for latency only."""
    if name != "onnxruntime" or bench.model.source is None or bench.evaluation.labels is None:
        return None
    quality, _ = evaluate(reference(bench.model, threads=bench.threads).run, bench.evaluation)
    return quality.accuracy
