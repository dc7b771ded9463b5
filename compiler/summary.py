"""What a build found, put together as a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import hone

from . import environment, runtime
from .assembling import Assembled
from .evaluate import Quality
from .measure import Measurement
from .mixed.layer_precision import ConversionCost, LayerPrecision
from .model import Model
from .profile import Profile
from .recipe import Recipe
from .report import profile as kernels
from .report.schema import (
    Baselines,
    Comparison,
    ConversionRow,
    Latency,
    LayerRow,
    OnnxFile,
    Peer,
    PrecisionRow,
    QuantizedLayer,
    Report,
    Skipped,
    Source,
    StepRow,
    Tuning,
    Verdict,
)


@dataclass(frozen=True, kw_only=True)
class Version:
    """One compiled state of the model.

    Parameters
    ----------
    name : str
        The row's name.
    model : Model
        Its module.
    precision : str
        Lowest precision of its kernels.
    assembled : Assembled
        Package and schedule.
    runner : Runner
        On this machine: the package itself, or the host's twin of a foreign one.
    quality : Quality
        Of its outputs.
    tuned : bool
        Whether tuning records were used.
    """

    name: str
    model: Model
    precision: str
    assembled: Assembled
    runner: runtime.Runner
    quality: Quality
    tuned: bool = False

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights as stored."""
        return self.assembled.package.weights_bytes


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A step with its verdict; what becomes a row of the report.

    Parameters
    ----------
    name : str
        The row's name.
    verdict : Verdict
        Kept, reverted, not measured; or baseline.
    reason : str
        Why, with the numbers.
    version : Version or None
        What was tried; None where there was nothing to try.
    seconds : float
        What the step took.
    previous : str or None
        Name of the row that was kept before.
    settings : mapping
        Of the step, from the recipe.
    skipped : tuple of (str, str)
        Layers left alone, each with the reason.
    errors : tuple of (str, float or None)
        Quantized layers, each with its SQNR in dB.
    precisions : tuple of LayerPrecision
        What each layer has, where layers have different precisions.
    conversions : tuple of ConversionCost
        At the borders between them.
    """

    name: str
    verdict: Verdict
    reason: str
    version: Version | None = None
    seconds: float = 0.0
    previous: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()
    errors: tuple[tuple[str, float | None], ...] = ()
    precisions: tuple[LayerPrecision, ...] = ()
    conversions: tuple[ConversionCost, ...] = ()


def summarize(
    recipe: Recipe,
    model: Model,
    *,
    rows: Sequence[Judged],
    kept: Version,
    measured: Measurement | None,
    peers: Mapping[str, Peer],
    profiled: Profile | None,
    notes: Sequence[str],
) -> Report:
    """Return the report of a build.

    Parameters
    ----------
    recipe : Recipe
        What was asked for.
    model : Model
        The unchanged model.
    rows : sequence of Judged
        In the order of the table.
    kept : Version
        What the package holds.
    measured : Measurement or None
        All versions and peers in one interleaved run; None without a device.
    peers : mapping of str to Peer
        Other engines, measured in that run.
    profiled : Profile or None
        The kernels of what the package holds; None without a device.
    notes : sequence of str
        What else the reader should know.
    """
    others = dict(peers)
    onnxruntime = others.pop("onnxruntime", None)
    scheduled = kept.assembled.scheduled
    tuning = None
    if kept.tuned:
        tuning = Tuning(
            hits=scheduled.hits,
            total=len(scheduled.decisions),
            missing=list(scheduled.untuned),
        )
    steps = [_row(row, measured, has_peer=onnxruntime is not None) for row in rows]
    if profiled is not None:
        shipped = [row.version is kept for row in rows].index(True)
        steps[shipped] = steps[shipped].model_copy(
            update={"layers": kernels.kernels(profiled), "totals": kernels.totals(profiled)}
        )
    return Report(
        hone_version=hone.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        name=recipe.package_path.stem,
        model=Source(
            path=recipe.model.path,
            sha256=model.origin.sha256,
            opset=model.origin.opset,
        ),
        target=recipe.target.name,
        threads=recipe.target.threads,
        metric=recipe.data.metric,
        steps=steps,
        baselines=Baselines.model_validate(
            {
                "onnx": OnnxFile(weights_bytes=model.origin.weights_bytes),
                "onnxruntime": onnxruntime,
                **others,
            }
        ),
        recipe=recipe.model_dump(mode="json"),
        environment=environment.fingerprint(recipe.target.threads),
        commands=[
            f"hone build {recipe.where}",
            f"hone verify {recipe.package_path}",
            f"hone bench {recipe.package_path} {recipe.model_path} --vs onnxruntime",
        ],
        tuning=tuning,
        roofline=None if profiled is None else profiled.roofline,
        notes=list(notes),
    )


def _finite(number: float | None) -> float | None:
    """Return a number that JSON has, or None: the reason of a step says what was infinite."""
    return number if number is not None and math.isfinite(number) else None


def _row(row: Judged, measured: Measurement | None, *, has_peer: bool) -> StepRow:
    common = StepRow(
        name=row.name,
        verdict=row.verdict,
        reason=row.reason,
        settings=dict(row.settings),
        skipped=[Skipped(layer=layer, reason=reason) for layer, reason in row.skipped],
        quantized=[QuantizedLayer(layer=layer, sqnr_db=sqnr) for layer, sqnr in row.errors],
        precisions=[PrecisionRow.of(each) for each in row.precisions],
        conversions=[ConversionRow.of(each) for each in row.conversions],
        seconds=row.seconds,
    )
    version = row.version
    if version is None:
        return common
    package = version.assembled.package
    measurements: dict[str, Any] = {}
    if measured is not None:
        measurements["latency_ms"] = Latency.of(measured.latency(row.name))
        if has_peer:
            speedup = measured.speedup(row.name, over="onnxruntime")
            measurements["vs_onnxruntime"] = Comparison.of(speedup)
        if row.previous is not None:
            speedup = measured.speedup(row.name, over=row.previous)
            measurements["vs_previous"] = Comparison.of(speedup)
    return common.model_copy(
        update={
            "accuracy": version.quality.accuracy,
            "output_error": _finite(version.quality.output_error),
            "weights_bytes": version.weights_bytes,
            "package_bytes": package.size_bytes,
            "layers": [
                LayerRow(kernel=kernel, layers=list(layers))
                for kernel, layers in package.manifest.kernels.items()
            ],
            **measurements,
        }
    )
