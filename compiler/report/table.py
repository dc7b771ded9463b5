"""The table of steps, once for the terminal, Markdown and HTML."""

from __future__ import annotations

from dataclasses import dataclass

from hone.report import numbers
from hone.report.schema import Comparison, Latency, Report

RIGHT = "  >>>>>>"
"""Columns of numbers, as `hone.cli.output.table` takes them."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table.

    Parameters
    ----------
    name : str
        The step, or the peer with its version.
    verdict : str
        As in the report; ``peer`` for another runtime.
    reason : str
        Why; empty when there is nothing to say.
    figures : tuple of str
        Accuracy, weights, package, latency and the two comparisons, as text.
    """

    name: str
    verdict: str
    reason: str
    figures: tuple[str, ...]

    @property
    def judgement(self) -> str:
        """The verdict and why."""
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict

    @property
    def cells(self) -> tuple[str, ...]:
        """One text per column of `columns`."""
        return (self.name, self.judgement, *self.figures)


def columns(report: Report) -> tuple[str, ...]:
    """Return the headings."""
    return (
        "step",
        "verdict",
        numbers.quality_heading(report),
        "weights",
        "package",
        "median ms (95% CI)",
        "vs previous",
        "vs onnxruntime",
    )


def lines(report: Report) -> list[Line]:
    """Return a line for each step, then one for each peer."""
    steps = [
        Line(
            name=row.name,
            verdict=row.verdict.value,
            reason=row.reason,
            figures=(
                numbers.quality(report, row),
                numbers.size(row.weights_bytes),
                numbers.size(row.package_bytes),
                numbers.timing(row.latency_ms),
                numbers.ratio(row.vs_previous),
                numbers.ratio(row.vs_onnxruntime),
            ),
        )
        for row in report.steps
    ]
    peers = report.baselines.peers()
    onnxruntime = report.baselines.onnxruntime
    reference = onnxruntime.latency_ms if onnxruntime else None
    return steps + [
        Line(
            name=f"{name} {peer.version} ({peer.precision})",
            verdict="peer",
            reason="",
            figures=(
                numbers.percentage(peer.accuracy),
                numbers.size(report.baselines.onnx.weights_bytes),
                numbers.NOTHING,
                numbers.timing(peer.latency_ms),
                numbers.NOTHING,
                numbers.ratio(_against(reference, peer.latency_ms)),
            ),
        )
        for name, peer in peers.items()
    ]


def _against(reference: Latency | None, latency: Latency | None) -> Comparison | None:
    if reference is None or latency is None or not reference.median or not latency.median:
        return None
    return Comparison(ratio=reference.median / latency.median)
