"""The document of ``hone profile --json``, and the table of kernels for terminal and report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from hone.profiling.roofline import Roofline
from hone.report import numbers
from hone.report.schema import Bytes, LayerRow, Row, Totals

if TYPE_CHECKING:
    from hone.profile import Profile

SCHEMA_ID = "hone.profile/1"

COLUMNS = (
    *("kernel", "layers", "rule", "type", "calls", "ms", "share", "GFLOP/s", "moved"),
    *("roofline", "bound"),
)
RIGHT = "    >>>>>>"
"""Columns of numbers, as `hone.cli.output.table` takes them."""

SHOWN_LAYERS = 2
"""Layers of a kernel that a terminal shows; the JSON document has all."""


class ProfileResult(Row):
    """The whole document."""

    schema_id: Literal["hone.profile/1"] = Field(default="hone.profile/1", alias="schema")
    path: str
    kind: Literal["model", "package"]
    threads: Annotated[int, Field(ge=1)]
    weights_bytes: Bytes
    totals: Totals
    roofline: Roofline | None
    kernels: list[LayerRow]

    @classmethod
    def of(cls, profile: Profile, *, path: str, kind: Literal["model", "package"]) -> Self:
        """Take over what `hone.profile` returned."""
        return cls(
            path=path,
            kind=kind,
            threads=profile.threads,
            weights_bytes=profile.weights_bytes,
            totals=totals(profile),
            roofline=profile.roofline,
            kernels=kernels(profile),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return self.model_dump(mode="json", by_alias=True)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the document."""
    schema = ProfileResult.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": SCHEMA_ID}


def kernels(profile: Profile) -> list[LayerRow]:
    """Return a row for each kernel, in the order of execution."""
    return [
        LayerRow(
            kernel=kernel.name,
            layers=list(kernel.layers),
            converts=list(kernel.converts),
            calls=kernel.calls,
            latency_ms=kernel.time_ms,
            share=min(kernel.share, 1.0),
            weights_bytes=kernel.weights_bytes,
            dtype=kernel.dtype,
            rule=kernel.rule,
            operations=kernel.operations,
            gflops=kernel.gflops,
            moved_bytes=kernel.moved_bytes,
            roofline=kernel.roofline,
            bound=None if kernel.bound is None else kernel.bound.value,
            peak=kernel.peak,
        )
        for kernel in profile.kernels
    ]


def totals(profile: Profile) -> Totals:
    """Return what the kernels do not say one by one."""
    return Totals(
        run_ms=profile.run_ms,
        overhead_ms=profile.overhead_ms,
        overhead_ci95_ms=profile.overhead_ci95_ms,
        timer_ms=profile.timer_ms,
        runs=profile.runs,
        storage_bytes=profile.storage_bytes,
    )


def cells(row: LayerRow) -> tuple[str, ...]:
    """Return one text per column of `COLUMNS`."""
    return (row.kernel, short([*row.converts, *row.layers]), *figures(row))


def figures(row: LayerRow) -> tuple[str, ...]:
    """Return the texts of all columns but the first two."""
    return (
        row.rule or numbers.NOTHING,
        row.dtype or numbers.NOTHING,
        str(row.calls),
        numbers.NOTHING if row.latency_ms is None else numbers.milliseconds(row.latency_ms),
        share(row.share),
        numbers.NOTHING if not row.gflops else numbers.milliseconds(row.gflops),
        numbers.size(row.moved_bytes),
        share(row.roofline),
        bound(row),
    )


def short(layers: list[str], shown: int = SHOWN_LAYERS) -> str:
    """Return the first layers and how many more there are."""
    if not layers:
        return numbers.NOTHING
    more = len(layers) - shown
    return " ".join(layers[:shown]) + (f" and {more} more" if more > 0 else "")


def share(fraction: float | None) -> str:
    """Return a fraction as a percentage of two or three digits."""
    if fraction is None:
        return numbers.NOTHING
    return f"{100 * fraction:.1f}%" if fraction < 0.1 else f"{100 * fraction:.0f}%"


def bound(row: LayerRow) -> str:
    """Return what limits a kernel; with the peak that it is held against, if that counts."""
    if row.bound is None:
        return numbers.NOTHING
    return f"{row.peak} {row.bound}" if row.bound == "compute" else row.bound


def limits(roofline: Roofline) -> tuple[str, str]:
    """Return the peaks and the bandwidths of a machine as text."""
    peaks = (
        f"{dtype} {peak.operations_per_second * 1e-9:.0f} {unit(dtype)} ({peak.instruction})"
        for dtype, peak in roofline.peaks.items()
    )
    levels = (f"{level.name} {level.bytes_per_second * 1e-9:.0f} GB/s" for level in roofline.levels)
    return ", ".join(peaks), ", ".join(levels)


def unit(dtype: str) -> str:
    """Return what the operations of a data type are counted in."""
    return "GFLOP/s" if dtype.startswith(("float", "bfloat")) else "GOP/s"


def overhead(found: Totals) -> str:
    """Return the time outside of kernels, or that it is lost in noise."""
    low, high = found.overhead_ci95_ms
    if low <= 0:
        return f"lost in noise (95%: {low:.2g} to {high:.2g} ms)"
    part = found.overhead_ms / found.run_ms
    ends = " to ".join(numbers.milliseconds(end, found.overhead_ms) for end in (low, high))
    return f"{numbers.milliseconds(found.overhead_ms)} ms ({ends}), {share(part)} of a run"


def by_time(rows: Iterable[LayerRow]) -> list[LayerRow]:
    """Return rows with the slowest first."""
    return sorted(rows, key=lambda row: row.latency_ms or 0.0, reverse=True)
