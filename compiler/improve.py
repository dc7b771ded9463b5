"""``hone build``: try each step of a recipe, measure it against what was kept, keep or revert.

Nothing is kept because it ought to be better. A step that is not faster outside noise (or, with
``goal = "size"``, not smaller), or costs more accuracy than the budget, is reverted, and the report
says so with both numbers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hone.targets.target import Target, resolve

from . import driver, fingerprint, importer, parity
from .assembling import assemble, golden_samples, reference_runner, runs_here
from .beside_peers import measure_beside_peers
from .data import Dataset
from .data import load as load_data
from .database import Database
from .errors import OutOfTimeError, UsageError
from .evaluate import Quality, evaluate
from .measure import InProcess, Measurement, Rounds, measure
from .model import Model
from .packaging.manifest import AccuracyEntry
from .peers import peer_precision
from .profile import Profile, profile
from .profiling.kernel_timer import ROUNDS
from .profiling.roofline import of_this_machine
from .progress import Progress, silent
from .recipe import Recipe
from .reference import reference
from .report import html
from .report.schema import Latency, Report, Verdict
from .report.schema import Peer as PeerRow
from .steps import registry, tune
from .steps.candidate import Candidate, Context, selected
from .steps.options.section import StepSection
from .steps.options.tune import TuneStep
from .steps.trials import Trials
from .summary import Judged, Version, summarize
from .verdict import Change, judge

if TYPE_CHECKING:
    from .tune import TuneResult

RANDOM_SAMPLES = 8
PROFILE_S = 0.5
ERROR_SAMPLES = 8  # of the calibration data, for each layer's quantization error


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
    return _Build(recipe, progress or silent()).run()


def _make_folder(folder: Path) -> None:
    """Make the output folder before any work, so that no result is lost for the want of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"the output folder cannot be written: {error.strerror}", where=str(folder)
        ) from error


class _Build:
    """One run of a recipe: what all its steps share."""

    def __init__(self, recipe: Recipe, progress: Progress) -> None:
        self.recipe = recipe
        self.progress = progress
        self.target: Target = resolve(recipe.target.name)
        self.target.tvm_target(recipe.target.threads)  # a target without code generation: exit 6
        self.threads = recipe.target.threads
        self.measurable = runs_here(self.target)
        self.compact = recipe.goal.goal == "size"
        _make_folder(recipe.output_directory)
        self.model = importer.load(recipe.model_path, recipe.model.shapes)
        for step in recipe.step:
            selected(self.model, step)  # a wrong name must not cost the steps before it
        self.calibration = self._data(
            recipe.calibration, allow_random=recipe.data.allow_random_calibration
        )
        # Without labels the gate is how far outputs move, which any inputs show.
        self.evaluation = (
            self._data(recipe.evaluation, allow_random=recipe.data.metric != "top1")
            or self._random_evaluation()
        )
        if recipe.data.metric == "top1" and self.evaluation.labels is None:
            raise UsageError(
                "top-1 needs evaluation data with labels",
                where="data.evaluation",
                hint='add an array `labels`, or set [data] metric = "relative_error"',
            )
        self.database = Database(recipe.database_path, self.target, threads=self.threads)
        self.rounds = Rounds(
            rounds=recipe.measure.rounds, runs=recipe.measure.runs, warmup=recipe.measure.warmup
        )
        self.reference: Mapping[str, np.ndarray] | None = None
        self.baseline_accuracy: float | None = None
        self.notes: list[str] = []
        self.context = Context(
            target=self.target,
            threads=self.threads,
            teacher=self.model,
            calibration=self.calibration,
            allow_random=recipe.data.allow_random_calibration,
            cache=recipe.output_directory / "calibration",
            error_samples=ERROR_SAMPLES,
            seed=recipe.seed,
            search=self._search if self.measurable else None,
            progress=progress,
        )

    def _data(self, spec: str | None, *, allow_random: bool = False) -> Dataset | None:
        if spec is None:
            return None
        return load_data(spec, self.model.signature, allow_random=allow_random)

    def _random_evaluation(self) -> Dataset:
        """Return seeded inputs for a model without evaluation data."""
        if self.recipe.data.metric == "top1":
            raise UsageError(
                "top-1 needs evaluation data",
                where="data.evaluation",
                hint='name labelled samples, or set [data] metric = "relative_error"',
            )
        samples = [
            parity.random_inputs(self.model, self.recipe.seed + number)
            for number in range(RANDOM_SAMPLES)
        ]
        return Dataset(
            inputs={name: np.stack([s[name] for s in samples]) for name in samples[0]},
            labels=None,
            source=f"{RANDOM_SAMPLES} random samples",
        )

    # ---------------------------------------------------------------- versions

    def version(
        self, name: str, model: Model, precision: str = "fp32", *, tuned: bool = False
    ) -> Version:
        """Compile a model, make it runnable here and evaluate it."""
        with self.progress.task(f"{name}: compile and evaluate"):
            assembled = assemble(
                model,
                target=self.target,
                threads=self.threads,
                precision=precision,
                database=self.database if tuned else None,
                compact=self.compact,
            )
            runner = reference_runner(
                model, assembled.package, target=self.target, threads=self.threads
            )
            quality, outputs = evaluate(runner.run, self.evaluation, reference=self.reference)
            if self.reference is None:
                self.reference = outputs
                self.baseline_accuracy = quality.accuracy
                quality = replace(quality, output_error=0.0)
        return Version(
            name=name,
            model=model,
            precision=assembled.package.manifest.precision,
            assembled=assembled,
            runner=runner,
            quality=quality,
            tuned=tuned,
        )

    def tune(self, model: Model, seconds: float) -> TuneResult | str:
        """Search for schedules; return what was found, or why the database has none."""
        try:
            return driver.search(
                model,
                self.target,
                threads=self.threads,
                seconds=seconds,
                database=self.database,
                progress=self.progress,
                compact=self.compact,
            )
        except OutOfTimeError as error:
            return error.message

    def _search(self, model: Model, step: TuneStep) -> TuneResult | str:
        """Tune for as long as a step of the recipe may."""
        return self.tune(model, self.recipe.tune_seconds(step))

    def _trials(self, *, tuned: bool) -> Trials:
        """Return how steps that search try their candidates, with tuning records or without."""
        timed = self.measurable and self.recipe.goal.goal == "latency"
        return Trials(
            build=partial(self.version, tuned=tuned),
            lost=lambda version: self._lost(version.quality),
            measure=self._compare if timed else None,
            sample=self.evaluation.sample(0),
            metric=self.recipe.data.metric,
            budget=self.recipe.goal.max_accuracy_drop,
            folder=self.recipe.output_directory,
            key=partial(self._search_key, tuned=tuned),
        )

    def _search_key(self, *, tuned: bool) -> dict[str, Any]:
        """Return what losses and times depend on, for JSON."""
        return {
            "baseline": self.model.origin.sha256,
            "evaluation": fingerprint.of_dataset(self.evaluation, labels=True),
            "goal": self.recipe.goal.model_dump(mode="json"),
            "metric": self.recipe.data.metric,
            "target": [self.target.name, *self.target.features],
            "threads": self.threads,
            "records": self.database.fingerprint() if tuned else None,
        }

    def _compare(self, versions: Mapping[str, Version]) -> Measurement:
        """Run versions in interleaved rounds, until it is known how they compare with the first."""
        inputs = self.evaluation.sample(0)
        contenders = {
            name: InProcess(version.runner.prepare(inputs)) for name, version in versions.items()
        }
        first, *others = versions
        with self.progress.task("measure", total=self.rounds.most) as task:
            return measure(
                contenders,
                self.rounds,
                settle=[(name, first) for name in others],
                on_round=task.update,
            )

    # ---------------------------------------------------------------- steps

    def run(self) -> Report:
        """Run all steps, measure everything once more together, write the results."""
        started = time.monotonic()
        baseline = self.version("baseline", self.model)
        checked = parity.check(self.model, baseline.runner.run, threads=self.threads)
        self.notes.append(str(checked))
        rows = [
            Judged(
                name=baseline.name,
                version=baseline,
                verdict=Verdict.BASELINE,
                reason="fp32, no tuning: the schedules that every later row starts from",
                seconds=time.monotonic() - started,
            )
        ]
        rows += self._tuned_baseline()
        kept = baseline
        for step, name in zip(self.recipe.step, self.recipe.step_names(), strict=True):
            started = time.monotonic()
            judged = self._step(step, name, kept)
            rows.append(replace(judged, seconds=time.monotonic() - started))
            self.progress.log(f"{name}: {judged.verdict} ({judged.reason})")
            if judged.version and judged.verdict in (Verdict.KEPT, Verdict.NOT_MEASURED):
                kept = judged.version
        return self._finish(rows, kept)

    def _tuned_baseline(self) -> list[Judged]:
        """Return the row of the unchanged model after tuning, where the recipe wants one."""
        seconds = self.recipe.baseline_tune_seconds
        if not seconds or not self.measurable:
            return []
        started = time.monotonic()
        found = self.tune(self.model, seconds)
        version = self.version(f"baseline tuned ({seconds:g} s)", self.model, tuned=True)
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

    def _step(self, step: StepSection, name: str, kept: Version) -> Judged:
        context = replace(self.context, trials=self._trials(tuned=kept.tuned))
        with self.progress.task(step.title):
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
                verdict=Verdict.REVERTED if self.measurable else Verdict.NOT_MEASURED,
                reason=candidate.note or "nothing to change",
            )
        else:
            version = self.version(
                name,
                candidate.model,
                precision=candidate.precision or kept.precision,
                tuned=kept.tuned or isinstance(step, TuneStep),
            )
            judged = self._judge(version, kept)
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

    def _judge(self, version: Version, kept: Version) -> Judged:
        """Hold a candidate against what was kept, and say whether it stays."""
        speedup = None
        if self.measurable and self.recipe.goal.goal == "latency":
            measured = self._compare({"kept": kept, "candidate": version})
            speedup = measured.speedup("candidate", over="kept")
        memory = None
        if self.recipe.goal.goal == "memory":
            memory = self._activations(kept), self._activations(version)
        change = Change(
            lost=self._lost(version.quality),
            weights_bytes=(kept.weights_bytes, version.weights_bytes),
            speedup=speedup,
            activations_bytes=memory,
        )
        verdict, reason = judge(change, self.recipe)
        return Judged(
            name=version.name,
            version=version,
            verdict=verdict,
            reason=reason,
            previous=kept.name if self.measurable else None,
        )

    def _activations(self, version: Version) -> int:
        """Return the memory that the activations of a version share."""
        memory = version.assembled.package.manifest.memory
        if memory is None:
            raise ValueError("a package that was compiled just now knows its memory")
        return memory.activations_bytes

    def _lost(self, quality: Quality) -> float:
        """Return the loss against the baseline, in the unit of the accuracy budget."""
        if self.recipe.data.metric == "top1":
            return (self.baseline_accuracy or 0.0) - (quality.accuracy or 0.0)
        return quality.output_error or 0.0

    # ---------------------------------------------------------------- results

    def _finish(self, rows: list[Judged], kept: Version) -> Report:
        measured, peers = self._measure_all(rows, kept)
        report = summarize(
            self.recipe,
            self.model,
            rows=rows,
            kept=kept,
            measured=measured,
            peers=peers,
            profiled=self._profile(kept),
            notes=self.notes,
        )
        package = kept.assembled.package.with_evidence(
            golden=golden_samples(kept.model, kept.runner),
            recipe=self._decisions(rows, kept),
            accuracy=self._accuracy_entry(kept.quality),
        )
        folder = self.recipe.output_directory
        package.save(self.recipe.package_path)
        report.write(folder / "report.json")
        (folder / "report.html").write_text(html.render(report), encoding="utf-8")
        return report

    def _profile(self, kept: Version) -> Profile | None:
        """Time the kernels of what the package holds, inside the running model."""
        if not self.measurable:
            return None
        with self.progress.task("profile", total=ROUNDS) as task:
            limits, problem = of_this_machine(self.target, threads=kept.runner.threads)
            if problem is not None:
                self.notes.append(problem)
            try:
                return profile(
                    kept.runner,
                    self.evaluation.sample(0),
                    seconds=PROFILE_S,
                    roofline=limits,
                    on_round=task.update,
                )
            except UsageError as error:
                self.notes.append(f"kernels are not timed: {error.message}")
                return None

    def _accuracy_entry(self, quality: Quality) -> AccuracyEntry | None:
        if quality.accuracy is not None:
            return AccuracyEntry(metric="top-1", value=quality.accuracy, samples=quality.samples)
        return None

    def _decisions(self, rows: list[Judged], kept: Version) -> dict[str, object]:
        """Return what was decided, for the manifest: nothing that depends on clock or host."""
        decided: dict[str, object] = {
            "goal": self.recipe.goal.goal,
            "max_accuracy_drop": self.recipe.goal.max_accuracy_drop,
            "seed": self.recipe.seed,
            "steps": [
                {**row.settings, "verdict": str(row.verdict)}
                for row in rows
                if row.verdict is not Verdict.BASELINE
            ],
        }
        if kept.tuned:
            decided["tuning_database"] = self.database.fingerprint()
        return decided

    def _measure_all(
        self, rows: list[Judged], kept: Version
    ) -> tuple[Measurement | None, dict[str, PeerRow]]:
        """Measure every version and every peer in one interleaved run."""
        if not self.measurable or self.model.source is None:
            return None, {}
        inputs = self.evaluation.sample(0)
        found = measure_beside_peers(
            {row.name: row.version.runner.prepare(inputs) for row in rows if row.version},
            next(row.name for row in rows if row.version is kept),
            names=self.recipe.measure.baselines,
            source=self.model.source,
            inputs=inputs,
            threads=self.threads,
            precision=peer_precision(kept.precision),
            rounds=self.rounds,
            progress=self.progress,
        )
        self.notes += found.notes
        peers = {
            info.name: PeerRow(
                latency_ms=Latency.of(found.measured.latency(info.name)),
                accuracy=self._peer_accuracy(info.name),
                version=info.version,
                threads=info.threads,
                precision=info.precision,
            )
            for info in found.peers
        }
        return found.measured, peers

    def _peer_accuracy(self, name: str) -> float | None:
        """Return onnxruntime's accuracy; other peers are measured for latency only."""
        if name != "onnxruntime" or self.model.source is None or self.evaluation.labels is None:
            return None
        quality, _ = evaluate(reference(self.model, threads=self.threads).run, self.evaluation)
        return quality.accuracy
