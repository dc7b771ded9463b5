"""The report as one HTML file: no script, no network, light and dark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hone.report import charts, numbers, precision, profile, table
from hone.report.schema import Report


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One of the large figures at the top."""

    figure: str
    caption: str
    detail: str


def render(report: Report) -> str:
    """Return the page.

    Every text of the report is escaped, and the page forbids scripts and connections
    (Content-Security-Policy): a model or a layer may have any name.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lines = table.lines(report)
    marks = charts.marks(report)
    return environment.get_template("report.html.j2").render(
        report=report,
        numbers=numbers,
        columns=table.columns(report),
        steps=[
            (mark, row, line, charts.kind(report, row))
            for mark, row, line in zip(marks, report.steps, lines, strict=False)
        ],
        peers=list(
            zip(
                marks[len(report.steps) :],
                lines[len(report.steps) :],
                report.baselines.peers().values(),
                strict=True,
            )
        ),
        headlines=headlines(report),
        waterfall=charts.waterfall(report),
        scatter=charts.scatter(report),
        kinds=charts.KINDS,
        has={
            column: any(getattr(layer, column) is not None for layer in report.final.layers)
            for column in (
                *("dtype", "rule", "weights_bytes", "moved_bytes", "latency_ms", "share"),
                *("gflops", "roofline"),
            )
        },
        precision=precision,
        profile=profile,
        created=readable(report.created),
        environment=flatten(report.environment),
        recipe=json.dumps(report.recipe, indent=2, ensure_ascii=False),
    )


def headlines(report: Report) -> list[Headline]:
    """Return what the build reached, for a reader who reads nothing else."""
    first, last = report.baseline, report.final
    found = []
    if first.latency_ms and last.latency_ms:
        speedup = first.latency_ms.median / last.latency_ms.median
        before, after = first.latency_ms.median, last.latency_ms.median
        detail = f"{numbers.milliseconds(before)} to {numbers.milliseconds(after)} ms"
        found.append(Headline(figure=f"{speedup:.2f}x", caption="baseline speed", detail=detail))
    peer = report.baselines.onnxruntime
    if peer and peer.latency_ms and last.latency_ms:
        speedup = peer.latency_ms.median / last.latency_ms.median
        detail = f"which takes {numbers.milliseconds(peer.latency_ms.median)} ms"
        found.append(
            Headline(figure=f"{speedup:.2f}x", caption="onnxruntime's speed", detail=detail)
        )
    if last.weights_bytes is not None:
        original = report.baselines.onnx.weights_bytes
        share = f"{100 * last.weights_bytes / original:.0f}%" if original else numbers.NOTHING
        detail = f"{numbers.size(original)} to {numbers.size(last.weights_bytes)}"
        found.append(Headline(figure=share, caption="of the ONNX weights", detail=detail))
    if first.accuracy is not None and last.accuracy is not None:
        points = 100 * (last.accuracy - first.accuracy)
        detail = f"{points:+.2f} points against the baseline"
        figure = numbers.percentage(last.accuracy)
        found.append(Headline(figure=figure, caption="top-1 accuracy", detail=detail))
    elif last.output_error is not None:
        found.append(
            Headline(
                figure=f"{last.output_error:.2g}",
                caption="relative output error",
                detail="against the unchanged model",
            )
        )
    return found


def readable(created: str) -> str:
    """Return a time such as ``2026-05-04 10:22 UTC``; another text as it is."""
    try:
        return f"{datetime.fromisoformat(created).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return created


def flatten(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested data as pairs of dotted key and text."""
    pairs: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            pairs.append((prefix + key, ", ".join(map(str, value))))
        elif isinstance(value, bool):
            pairs.append((prefix + key, "yes" if value else "no"))
        else:
            pairs.append((prefix + key, "unknown" if value is None else str(value)))
    return pairs
