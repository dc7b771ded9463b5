"""What all steps of ``hone build`` share: data, and how versions are made, tuned and compared."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hone.targets.target import Target, resolve

from . import driver, fingerprint, importer, parity
from .assembling import assemble, reference_runner, runs_here
from .data import Dataset
from .data import load as load_data
from .database import Database
from .errors import OutOfTimeError, UsageError
from .evaluate import Quality, evaluate
from .measure import InProcess, Measurement, Rounds, measure
from .model import Model
from .progress import Progress
from .recipe import Recipe
from .steps.candidate import Context, selected
from .steps.options.tune import TuneStep
from .steps.trials import Trials
from .summary import Version

if TYPE_CHECKING:
    from .tune import TuneResult

RANDOM_SAMPLES = 8
ERROR_SAMPLES = 8  # of the calibration data, for each layer's quantization error


def _make_folder(folder: Path) -> None:
    """Make the output folder before any work, so that no result is lost for the want of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"the output folder cannot be written: {error.strerror}", where=str(folder)
        ) from error


class Workbench:
    """The model, data, target and database of a recipe, and what is done with them.

    Parameters
    ----------
    recipe : Recipe
        Is checked against the model and the machine.
    progress : Progress
        Where to report.

    Raises
    ------
    HoneError
        The recipe, the model, the data or the output folder do not fit.
    """

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

    def forgo_separate_adders(self) -> None:
        """Compile from now on as for a processor without units that only add."""
        self.target = replace(self.target, separate_adders=False)
        self.context = replace(self.context, target=self.target)
        self.database = Database(self.recipe.database_path, self.target, threads=self.threads)
        self.reference = self.baseline_accuracy = None

    # ---------------------------------------------------------------- versions

    def version(
        self, name: str, model: Model, precision: str = "fp32", *, tuned: bool = False
    ) -> Version:
        """Compile a model, make it runnable here and evaluate it.

        Parameters
        ----------
        name : str
            Of the version, in the report.
        model : Model
            What it computes.
        precision : str
            As for `hone.assembling.assemble`.
        tuned : bool
            The database's records are used.
        """
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
        """Search for schedules; return what was found, or why the database has none.

        Parameters
        ----------
        model : Model
            Whose kernels are tuned.
        seconds : float
            For the search.
        """
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

    def trials(self, *, tuned: bool) -> Trials:
        """Return how steps that search try their candidates.

        Parameters
        ----------
        tuned : bool
            With tuning records.
        """
        timed = self.measurable and self.recipe.goal.goal == "latency"
        return Trials(
            build=partial(self.version, tuned=tuned),
            lost=lambda version: self.lost(version.quality),
            measure=self.compare if timed else None,
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

    def compare(self, versions: Mapping[str, Version]) -> Measurement:
        """Run versions in interleaved rounds, until it is known how they compare with the first.

        Parameters
        ----------
        versions : mapping of str to Version
            By the names that the measurement has.
        """
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

    def lost(self, quality: Quality) -> float:
        """Return the loss against the baseline, in the unit of the accuracy budget.

        Parameters
        ----------
        quality : Quality
            Of a version, on the evaluation data.
        """
        if self.recipe.data.metric == "top1":
            return (self.baseline_accuracy or 0.0) - (quality.accuracy or 0.0)
        return quality.output_error or 0.0
