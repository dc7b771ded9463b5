"""The recipe: what `hone build` shall do, read from ``hone.toml``.

Every path and data string in the file is relative to the file's own folder. A key that does not
exist is an error that names the nearest one; all problems of a file are listed at once.
"""

from __future__ import annotations

import os
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from hone.errors import UsageError
from hone.recipe_problems import explain
from hone.steps.options.half import Bf16Step, Fp16Step
from hone.steps.options.int8 import Int8Step
from hone.steps.options.mixed import MixedStep
from hone.steps.options.prune import PruneStep
from hone.steps.options.section import Count, Fraction, Seconds, Section
from hone.steps.options.split import SplitStep
from hone.steps.options.tune import TuneStep
from hone.steps.options.weights import WeightsStep


class ModelSection(Section):
    """``[model]``: the network to work on."""

    path: Annotated[str, Field(min_length=1)] = Field(description="ONNX file")
    shapes: dict[str, list[Count]] = Field(
        default={}, description="static shape of each input that has dynamic dimensions"
    )


class TargetSection(Section):
    """``[target]``: the machine that shall run it."""

    name: str = Field(default="host", description="as `hone target list` prints it")
    threads: Count = Field(default=2, description="threads of one run of the package")


class DataSection(Section):
    """``[data]``: samples, in the data syntax (``x.npz``, a folder, ``file.py:function``, …)."""

    calibration: str | None = Field(
        default=None, description="samples for recovery and int8 ranges; labels are not used"
    )
    allow_random_calibration: bool = Field(
        default=False,
        description="take random:N for calibration, which says nothing about real value ranges",
    )
    evaluation: str | None = Field(default=None, description="samples that measure the accuracy")
    metric: Literal["top1", "relative_error"] = Field(
        default="top1",
        description="top1 needs labels; relative_error compares with the unchanged model",
    )


class GoalSection(Section):
    """``[goal]``: what makes a step worth keeping."""

    goal: Literal["latency", "size", "memory"] = Field(
        default="latency",
        description="latency of a run, size of the weights, or memory of the activations",
    )
    max_accuracy_drop: Fraction = Field(
        default=0.005,
        description="of the whole recipe, against the baseline; 0.005 is half a point",
    )


class OutputSection(Section):
    """``[output]``: where the package and the reports go."""

    directory: str = "build"
    name: str | None = Field(
        default=None, description="file name of the package without .hone; the model's when absent"
    )

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        if name is not None and (not name or name != os.path.basename(name) or name in {".", ".."}):
            raise ValueError("a file name without folders")
        return name


class TuneSection(Section):
    """``[tune]``: the search for better schedules."""

    seconds: Seconds = Field(default=60.0, description="budget of a tune step that has none itself")
    database: str | None = Field(
        default=None, description="folder of tuning records; <output>/tuning when absent"
    )


class MeasureSection(Section):
    """``[measure]``: how latency is measured."""

    rounds: Count = Field(
        default=10,
        description="interleaved rounds over all contenders; up to five times as many until the "
        "interval of a comparison is narrow",
    )
    runs: Count = Field(default=10, description="runs of one contender in one round")
    warmup: Annotated[int, Field(ge=0)] = Field(
        default=3, description="first runs of each round that are dropped"
    )
    baselines: list[Literal["onnxruntime", "openvino"]] = Field(
        default=["onnxruntime"], description="peers measured in the same interleaved run"
    )
    tune_baseline: bool = Field(
        default=True,
        description="tune the unchanged model as long as the tune steps, for a fair comparison",
    )

    @model_validator(mode="after")
    def _keeps_runs(self) -> MeasureSection:
        if self.warmup >= self.runs:
            raise ValueError(f"warmup ({self.warmup}) must be less than runs ({self.runs})")
        return self


Step = Annotated[
    PruneStep | Int8Step | MixedStep | WeightsStep | Bf16Step | Fp16Step | SplitStep | TuneStep,
    Field(discriminator="kind"),
]


class Recipe(Section):
    """A whole ``hone.toml``."""

    model: ModelSection
    target: TargetSection = TargetSection()
    data: DataSection = DataSection()
    goal: GoalSection = GoalSection()
    output: OutputSection = OutputSection()
    tune: TuneSection = TuneSection()
    measure: MeasureSection = MeasureSection()
    step: list[Step] = Field(default=[], description="compression steps, in order")
    seed: Annotated[int, Field(ge=0)] = 0

    _folder: Path = PrivateAttr(default=Path())
    _where: str = PrivateAttr(default="recipe")

    @model_validator(mode="after")
    def _has_calibration(self) -> Recipe:
        needy = [step.kind for step in self.step if step.needs_calibration]
        if needy and self.data.calibration is None:
            raise ValueError(f"data.calibration is required by the {needy[0]} step")
        return self

    @property
    def where(self) -> str:
        """The recipe's file, as it was named."""
        return self._where

    @property
    def folder(self) -> Path:
        """The folder that the file's relative paths start from."""
        return self._folder

    @property
    def model_path(self) -> Path:
        """Where the ONNX file is."""
        return _tidy(self._folder / self.model.path)

    @property
    def output_directory(self) -> Path:
        """Where the results go."""
        return _tidy(self._folder / self.output.directory)

    @property
    def package_path(self) -> Path:
        """The package that the build writes."""
        return self.output_directory / f"{self.output.name or Path(self.model.path).stem}.hone"

    @property
    def database_path(self) -> Path:
        """The folder of tuning records."""
        if self.tune.database is None:
            return self.output_directory / "tuning"
        return _tidy(self._folder / self.tune.database)

    @property
    def calibration(self) -> str | None:
        """The calibration data, as `hone.data.load` takes it."""
        return self._located(self.data.calibration)

    @property
    def evaluation(self) -> str | None:
        """The evaluation data, as `hone.data.load` takes it."""
        return self._located(self.data.evaluation)

    def tune_seconds(self, step: TuneStep) -> float:
        """Return the time budget of a tune step in seconds."""
        return self.tune.seconds if step.seconds is None else step.seconds

    @property
    def baseline_tune_seconds(self) -> float:
        """Time budget for tuning the unchanged model: that of all tune steps together."""
        if not self.measure.tune_baseline:
            return 0.0
        return sum(self.tune_seconds(step) for step in self.step if isinstance(step, TuneStep))

    def step_names(self) -> list[str]:
        """Return a unique name for each step, as the report's rows carry it."""
        names: list[str] = []
        for step in self.step:
            title = step.title
            if isinstance(step, TuneStep):
                title = f"tuned ({self.tune_seconds(step):g} s)"
            same = sum(name == title or name.startswith(f"{title} #") for name in names)
            names.append(f"{title} #{same + 1}" if same else title)
        return names

    def _located(self, spec: str | None) -> str | None:
        if spec is None or spec.startswith("random:"):
            return spec
        return str(self._folder / spec)


def _tidy(path: Path) -> Path:
    """Return a path without ``..`` in it, where that names the same file."""
    short = Path(os.path.normpath(path))
    return short if short.resolve() == path.resolve() else path


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Parameters
    ----------
    path : str or Path
        The TOML file.
    overrides : mapping of str to value, optional
        Values that win over the file's, by dotted key, such as ``{"target.threads": 1}``.

    Raises
    ------
    UsageError
        The file cannot be read, is not TOML, or has problems: all of them, each with its key.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"a recipe (TOML) is required, but it cannot be read: {error.strerror}",
            where=str(path),
            hint="see `hone build --help` for the smallest recipe",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "`hone compile` takes a model" if path.suffix == ".onnx" else None
        raise UsageError(f"this is not valid TOML: {error}", where=str(path), hint=hint) from error
    for key, value in (overrides or {}).items():
        *tables, last = key.split(".")
        table = data
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise UsageError(
                    f"{name}: required is a table, given is {table!r}", where=str(path)
                )
        table[last] = value
    return parse(data, folder=path.parent, where=str(path))


def parse(data: Mapping[str, Any], *, folder: str | Path = "", where: str = "recipe") -> Recipe:
    """Check a recipe that was read already.

    Parameters
    ----------
    data : mapping
        The tables and keys.
    folder : str or Path
        What its relative paths start from.
    where : str
        Its name in error messages.

    Raises
    ------
    UsageError
        Lists all problems, each with its key.
    """
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems = explain(error, keys=_known_keys(), kinds=list(_step_kinds()))
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise UsageError(f"{count} in the recipe{lines}", where=where) from error
    recipe._folder = Path(folder)
    recipe._where = where
    return recipe


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``hone.toml``, for editors that complete TOML files."""
    schema = Recipe.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "hone.toml",
    }


def _known_keys() -> dict[tuple[str, ...], list[str]]:
    """Return the keys of each table by its place; those of a step by its kind."""
    return {place: list(cls.model_fields) for place, cls in _tables(Recipe, ())}


def _tables(
    cls: type[BaseModel], at: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    yield at, cls
    for name, field in cls.model_fields.items():
        if cls is Recipe and name == "step":
            for kind, step in _step_kinds().items():
                yield from _tables(step, (*at, name, kind))
            continue
        for option in typing.get_args(field.annotation) or (field.annotation,):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from _tables(option, (*at, name))


def _step_kinds() -> dict[str, type[BaseModel]]:
    """Return the steps by the value of their ``kind``."""
    union, _ = typing.get_args(Step)
    return {
        typing.get_args(step.model_fields["kind"].annotation)[0]: step
        for step in typing.get_args(union)
    }
