"""The tables of layers and precisions, once for the terminal, Markdown and HTML."""

from __future__ import annotations

from dataclasses import dataclass

from hone.report import numbers
from hone.report.schema import ConversionRow, PrecisionRow, Report, StepRow, Verdict


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of texts.

    Parameters
    ----------
    title : str
        What it shows.
    hint : str
        How to read it.
    columns : tuple of str
        Headings.
    right : str
        Columns of numbers, as `hone.cli.output.table` takes them.
    rows : tuple of tuple of str
        One text for each column.
    """

    title: str
    hint: str
    columns: tuple[str, ...]
    right: str
    rows: tuple[tuple[str, ...], ...]


def tables(report: Report, row: StepRow) -> list[Table]:
    """Return the tables of a step: layers by precision and conversions, or quantized layers."""
    found = []
    if row.precisions:
        found.append(_layers(report, row.precisions))
    elif row.quantized:
        found.append(
            Table(
                title="Quantized layers",
                hint="Signal to quantization noise of each layer's result, with all layers before "
                "it quantized too; 6 dB are one bit.",
                columns=("layer", "SQNR dB"),
                right=" >",
                rows=tuple((each.layer, decibels(each.sqnr_db)) for each in row.quantized),
            )
        )
    if row.conversions:
        found.append(_conversions(row.conversions))
    return found


def shipped(report: Report) -> list[StepRow]:
    """Return the steps that the final package consists of."""
    return [row for row in report.steps if row.verdict in (Verdict.KEPT, Verdict.NOT_MEASURED)]


def _layers(report: Report, rows: list[PrecisionRow]) -> Table:
    candidates = list(dict.fromkeys(name for row in rows for name in row.costs))
    lower = [name for name in candidates if name != "fp32"]
    unit = "nats" if report.metric == "top1" else "relative"
    cells = []
    for row in rows:
        errors = [_error(row, name) for name in lower]
        times = [_microseconds(row, name) for name in candidates]
        cells.append(
            (
                row.layer,
                row.precision,
                *errors,
                microseconds(row.microseconds),
                *times,
                decibels(row.sqnr_db),
                row.reason,
            )
        )
    return Table(
        title="Precision of each layer",
        hint=f"Accuracy cost: error of the outputs ({unit}) where only this layer has that "
        "precision. Microseconds: kernels of the layer and what follows until the next one, "
        "without conversions; in the model that was chosen, and in models that have one "
        "precision throughout.",
        columns=(
            "layer",
            "precision",
            *(f"accuracy cost in {name}" for name in lower),
            "us as chosen",
            *(f"us in {name}" for name in candidates),
            "SQNR dB",
            "why",
        ),
        right="  " + ">" * (len(lower) + 2 + len(candidates)) + " ",
        rows=tuple(cells),
    )


def _conversions(rows: list[ConversionRow]) -> Table:
    return Table(
        title="Conversions",
        hint="At the borders between precisions; without a time where the kernel of a layer "
        "does it on the way.",
        columns=("tensor", "conversion", "us", "kernel"),
        right="  > ",
        rows=tuple(
            (
                row.tensor,
                row.direction,
                microseconds(row.microseconds),
                row.kernel + (f" ({', '.join(row.layers)})" if row.layers else ""),
            )
            for row in rows
        ),
    )


def _error(row: PrecisionRow, precision: str) -> str:
    cost = row.costs.get(precision)
    return numbers.NOTHING if cost is None or cost.error is None else f"{cost.error:.2g}"


def _microseconds(row: PrecisionRow, precision: str) -> str:
    cost = row.costs.get(precision)
    return microseconds(None if cost is None else cost.microseconds)


def microseconds(value: float | None) -> str:
    """Return a time with two digits behind the point below 10, one below 100."""
    if value is None:
        return numbers.NOTHING
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def decibels(value: float | None) -> str:
    """Return a ratio in dB with one digit behind the point."""
    return numbers.NOTHING if value is None else f"{value:.1f}"
