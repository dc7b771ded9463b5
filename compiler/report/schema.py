"""The report of a build: what each step gained and cost, measured; the file ``report.json``.

CI jobs and benchmarks read this file: fields are only ever added within ``hone.report/1``.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from hone.errors import UsageError
from hone.profiling.roofline import Roofline

if TYPE_CHECKING:
    from hone.measure import Latency as Measured
    from hone.measure import Speedup
    from hone.mixed.layer_precision import ConversionCost, LayerPrecision

SCHEMA_ID = "hone.report/1"

Fraction = Annotated[float, Field(ge=0, le=1)]
Bytes = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(gt=0)]


class Row(BaseModel):
    """Anything in the file: frozen, unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_by_name=True
    )


class Verdict(StrEnum):
    """What became of a step."""

    BASELINE = "baseline"
    """The first row, or a later one that is there for comparison only."""
    KEPT = "kept"
    REVERTED = "reverted"
    NOT_MEASURED = "not measured"


class Latency(Row):
    """Time of one run, over many."""

    median: Milliseconds
    p90: Milliseconds
    ci95: tuple[Milliseconds, Milliseconds] = Field(
        description="bootstrap confidence interval of the median"
    )
    samples: Annotated[int, Field(ge=1)]

    @classmethod
    def of(cls, measured: Measured) -> Self:
        """Take over what `hone.measure.measure` returned."""
        return cls(
            median=measured.median_ms,
            p90=measured.p90_ms,
            ci95=measured.ci95_ms,
            samples=measured.samples,
        )


class Comparison(Row):
    """How many times faster this row is than another: above 1 is faster, below 1 is slower."""

    ratio: Ratio
    ci95: tuple[Ratio, Ratio] | None = None
    outcome: Literal["faster", "slower", "noise", "not shown"] | None = Field(
        default=None,
        description="noise: the same, or too near to tell; not shown: the interval says nothing",
    )

    @classmethod
    def of(cls, speedup: Speedup) -> Self:
        """Take over what a measurement says of two contenders."""
        return cls(ratio=speedup.ratio, ci95=speedup.ci95, outcome=speedup.outcome.value)


class Skipped(Row):
    """A layer that a step left alone."""

    layer: str
    reason: str


class QuantizedLayer(Row):
    """A layer of fewer bits and how near its result is to the float model's."""

    layer: str
    sqnr_db: float | None = Field(
        description="signal to quantization noise of its result, with all layers before it as "
        "they are then; of its weights where a step has no data; null without noise"
    )


class PrecisionCost(Row):
    """What a layer costs in one precision."""

    error: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="of the outputs where only this layer has the precision: with the metric top1 "
        "the Kullback-Leibler divergence of class scores in nats, else relative; null where it "
        "cannot have it",
    )
    microseconds: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="of its kernels and what follows until the next layer, where all layers that "
        "can have the precision",
    )


class PrecisionRow(Row):
    """A layer and the precision that was chosen for it."""

    layer: str
    precision: str
    reason: str = Field(default="", description="why not a faster one")
    microseconds: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="in the model that was chosen, without conversions"
    )
    costs: dict[str, PrecisionCost] = Field(description="of every precision that was a candidate")
    sqnr_db: float | None = None

    @classmethod
    def of(cls, found: LayerPrecision) -> Self:
        """Take over what a search found."""
        return cls(
            layer=found.layer,
            precision=found.precision,
            reason=found.reason,
            microseconds=found.us,
            costs={
                name: PrecisionCost(error=cost.error, microseconds=cost.us)
                for name, cost in found.costs.items()
            },
            sqnr_db=found.sqnr_db,
        )


class ConversionRow(Row):
    """A tensor that is converted because its readers have another precision."""

    tensor: str = Field(description="id of the layer that computes it, or name of an input")
    direction: Literal["quantize", "dequantize", "cast"]
    kernel: str
    microseconds: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="null where the kernel computes layers as well"
    )
    layers: list[str] = Field(default=[], description="ids of those layers")

    @classmethod
    def of(cls, found: ConversionCost) -> Self:
        """Take over what a search found."""
        return cls.model_validate(
            {
                "tensor": found.tensor,
                "direction": found.direction,
                "kernel": found.kernel,
                "microseconds": found.us,
                "layers": list(found.layers),
            }
        )


class LayerRow(Row):
    """One kernel of the compiled model and the layers that it computes."""

    kernel: str
    layers: list[str] = Field(description="ids of the layers fused into it")
    converts: list[str] = Field(
        default=[], description="conversions between precisions that it does, by tensor"
    )
    calls: Annotated[int, Field(ge=1)] = 1
    latency_ms: Milliseconds | None = Field(default=None, description="of all its calls together")
    share: Fraction | None = Field(default=None, description="of the whole run")
    weights_bytes: Bytes | None = None
    dtype: str | None = Field(
        default=None,
        description="what its operations work on; without any, that of its weights or tensors",
    )
    rule: str | None = Field(default=None, description="of its schedule; record: it was tuned")
    operations: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="of all its calls, a multiply-add being two"
    )
    gflops: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="billions of operations in a second"
    )
    moved_bytes: Bytes | None = Field(
        default=None, description="inputs, weights and outputs of all its calls"
    )
    roofline: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="least time that the machine allows over measured time"
    )
    bound: Literal["compute", "memory"] | None = Field(
        default=None, description="what that least time is spent on"
    )
    peak: str | None = Field(
        default=None, description="data type of the peak that its operations are held against"
    )


class Totals(Row):
    """What the kernels of one row do not say one by one."""

    run_ms: Milliseconds = Field(description="a whole run that nobody watched")
    overhead_ms: float = Field(description="of it outside of kernels; below 0 by noise only")
    overhead_ci95_ms: tuple[float, float]
    timer_ms: Milliseconds = Field(description="cost of watching a call, taken off every time")
    runs: Annotated[int, Field(ge=1)]
    storage_bytes: Bytes = Field(description="that activations share, as planned")


class StepRow(Row):
    """One row of the table: a measured version of the model.

    A kept row measures the cumulative model; a reverted one measures what was tried on top of the
    last kept one.
    """

    name: str
    verdict: Verdict
    reason: str = ""
    accuracy: Fraction | None = Field(default=None, description="fraction of right answers")
    output_error: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="relative error against the unchanged model, where no accuracy is measured; "
        "absent where an output is not a number",
    )
    weights_bytes: Bytes | None = Field(
        default=None, description="as stored in the library, packing and padding included"
    )
    package_bytes: Bytes | None = None
    latency_ms: Latency | None = None
    vs_previous: Comparison | None = None
    vs_onnxruntime: Comparison | None = None
    settings: dict[str, JsonValue] = {}
    skipped: list[Skipped] = []
    quantized: list[QuantizedLayer] = Field(
        default=[], description="quantization error on a few samples of the calibration data"
    )
    precisions: list[PrecisionRow] = Field(
        default=[], description="where layers have different precisions: all of them"
    )
    conversions: list[ConversionRow] = Field(default=[], description="between those precisions")
    layers: list[LayerRow] = []
    totals: Totals | None = Field(default=None, description="of the kernels in `layers`")
    seconds: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="what the step itself took"
    )


class Peer(Row):
    """Another way to run the original model, measured in the same interleaved run."""

    latency_ms: Latency | None = None
    accuracy: Fraction | None = None
    version: str
    threads: Annotated[int, Field(ge=1)]
    precision: str = "fp32"


class OnnxFile(Row):
    """The original file."""

    weights_bytes: Bytes


class Baselines(Row):
    """What the model is compared with; peers other than onnxruntime stand beside it by name."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, Peer]

    onnx: OnnxFile
    onnxruntime: Peer | None = None

    def peers(self) -> dict[str, Peer]:
        """Return every measured peer by name."""
        first = {} if self.onnxruntime is None else {"onnxruntime": self.onnxruntime}
        return {**first, **(self.__pydantic_extra__ or {})}


class Source(Row):
    """The model that was given."""

    path: str | None
    sha256: str
    opset: int


class Tuning(Row):
    """How many kernels of the final package use a tuning record."""

    hits: Annotated[int, Field(ge=0)]
    total: Annotated[int, Field(ge=0)]
    missing: list[str] = Field(default=[], description="kernels without a record")


class Report(Row):
    """A whole ``report.json``."""

    schema_id: Literal["hone.report/1"] = Field(default="hone.report/1", alias="schema")
    hone_version: str
    created: str = Field(description="UTC, ISO 8601")
    name: str = Field(description="of the package, without .hone")
    model: Source
    target: str
    threads: Annotated[int, Field(ge=1)]
    metric: Literal["top1", "relative_error"] = "top1"
    steps: Annotated[list[StepRow], Field(min_length=1)]
    baselines: Baselines
    recipe: dict[str, JsonValue] = Field(description="resolved: with every default filled in")
    environment: dict[str, JsonValue]
    commands: list[str] = Field(description="what reproduces this report")
    tuning: Tuning | None = None
    roofline: Roofline | None = Field(
        default=None, description="measured limits of the machine, which kernels are held against"
    )
    notes: list[str] = []

    @property
    def baseline(self) -> StepRow:
        """The row that the build started from."""
        return self.steps[0]

    @property
    def final(self) -> StepRow:
        """The row of the final package: the last kept one, else the baseline."""
        kept = [row for row in self.steps if row.verdict is Verdict.KEPT]
        return kept[-1] if kept else self.baseline

    def to_json(self) -> str:
        """Return the text of the file."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        path = Path(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(self.to_json(), encoding="utf-8")
        draft.replace(path)

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """Read a ``report.json``.

        Raises
        ------
        UsageError
            It cannot be read, or is no report of this schema.
        """
        path = Path(path)
        hint = "`hone build` writes a report.json beside the package"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(
                f"a report is required, but it cannot be read: {reason}", where=str(path), hint=hint
            ) from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            lines = "".join(
                f"\n  - {'.'.join(map(str, d['loc'])) or 'file'}: {d['msg']}"
                for d in error.errors(include_url=False)
            )
            raise UsageError(
                f"a report of the schema {SCHEMA_ID} is required{lines}", where=str(path), hint=hint
            ) from error


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``report.json``."""
    schema = Report.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": SCHEMA_ID}
