"""Geometry of the charts in the HTML report: from rows to coordinates, without any markup."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from hone.report import numbers
from hone.report.schema import Latency, Report, StepRow, Verdict

BAR_HEIGHT = 22.0
ROW_HEIGHT = 40.0
LABEL_WIDTH = 250.0
PLOT_WIDTH = 500.0
VALUE_WIDTH = 170.0
AXIS_HEIGHT = 44.0
LABEL_CHARACTERS = 30
"""What fits into `LABEL_WIDTH` at 13 px, 7.1 for a character, beside the number of the step."""

SCATTER_WIDTH = 920.0
SCATTER_HEIGHT = 370.0
SCATTER_MARGIN = (24.0, 24.0, 56.0, 84.0)
"""Top, right, bottom, left."""
BUBBLE_RADII = (11.0, 30.0)
"""A number of two digits fits into the smallest."""
MARK_ROOM = 20.0
"""Least distance of two marks."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A value on an axis."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of the waterfall, in SVG user units.

    Parameters
    ----------
    label, full_label : str
        Name, cut to what fits, and whole.
    kind : str
        CSS class: a verdict in one word, ``comparison`` or ``peer``.
    y, width : float
        Top edge and length of the bar; it starts at the axis.
    saved : tuple of float or None
        Left edge and width of what this kept step saved.
    whisker : tuple of float
        Ends of the confidence interval.
    value, value_at : str, float
        Text behind the bar and where it starts.
    mark : str
        As in the table of steps.
    """

    label: str
    full_label: str
    kind: str
    y: float
    width: float
    saved: tuple[float, float] | None
    whisker: tuple[float, float]
    value: str
    value_at: float
    mark: str


@dataclass(frozen=True, kw_only=True)
class Waterfall:
    """Latency of every row; each kept step stands on the one before."""

    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    links: tuple[tuple[float, float, float], ...]
    """x, top and bottom of the lines from one kept row to the next."""
    width: float
    height: float
    left: float = LABEL_WIDTH
    bottom: float = 0.0
    bar_height: float = BAR_HEIGHT


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """One row in the scatter: where, how large, its mark and its text for screen readers."""

    x: float
    y: float
    radius: float
    kind: str
    mark: str
    mark_at: tuple[float, float]
    title: str


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Accuracy against latency; the area of a bubble is the size of the weights."""

    bubbles: tuple[Bubble, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: float = SCATTER_WIDTH
    height: float = SCATTER_HEIGHT
    margin: tuple[float, float, float, float] = SCATTER_MARGIN


def marks(report: Report) -> list[str]:
    """Return what stands for each line of the table: numbers for steps, letters for peers."""
    steps = [str(number) for number in range(1, len(report.steps) + 1)]
    return steps + [chr(ord("A") + index) for index in range(len(report.baselines.peers()))]


KINDS = {
    "baseline": "baseline",
    "kept": "kept, with what it saved",
    "reverted": "reverted",
    "not-measured": "not measured",
    "comparison": "for comparison",
    "peer": "another runtime",
}
"""CSS classes of rows, in the order of the legend, and what they mean."""


def kind(report: Report, row: StepRow) -> str:
    """Return the CSS class of a row."""
    if row.verdict is Verdict.BASELINE and row is not report.baseline:
        return "comparison"
    return row.verdict.value.replace(" ", "-")


def waterfall(report: Report) -> Waterfall | None:
    """Lay out the waterfall; None when no latency was measured."""
    rows = [
        (mark, name, what, latency)
        for mark, name, what, latency, _, _ in _measured(report)
        if latency is not None
    ]
    if not rows:
        return None
    ticks = _ticks(0.0, max(latency.ci95[1] for *_, latency in rows))
    scale = PLOT_WIDTH / ticks[-1]
    bars = []
    links = []
    previous: tuple[float, float] | None = None
    for index, (mark, name, what, latency) in enumerate(rows):
        y = index * ROW_HEIGHT + (ROW_HEIGHT - BAR_HEIGHT) / 2
        width = latency.median * scale
        saved = None
        reach = max(width, latency.ci95[1] * scale)
        if what in {"baseline", "kept"}:
            if previous is not None:
                before, bottom = previous
                links.append((before, bottom, y + BAR_HEIGHT))
                if before > width:
                    saved = (width, before - width)
                    reach = max(reach, before)
            previous = (width, y)
        bars.append(
            Bar(
                label=_cut(name),
                full_label=name,
                kind=what,
                y=y,
                width=width,
                saved=saved,
                whisker=(latency.ci95[0] * scale, latency.ci95[1] * scale),
                value=f"{numbers.milliseconds(latency.median)} ms",
                value_at=reach + 8,
                mark=mark,
            )
        )
    bottom = len(rows) * ROW_HEIGHT
    return Waterfall(
        bars=tuple(bars),
        ticks=tuple(Tick(at=value * scale, text=f"{value:g}") for value in ticks),
        links=tuple(links),
        width=LABEL_WIDTH + PLOT_WIDTH + VALUE_WIDTH,
        height=bottom + AXIS_HEIGHT,
        bottom=bottom,
    )


def scatter(report: Report) -> Scatter | None:
    """Lay out the scatter; None when fewer than two rows have latency and accuracy."""
    rows = [
        (mark, name, what, latency.median, accuracy, weights)
        for mark, name, what, latency, accuracy, weights in _measured(report)
        if latency is not None and accuracy is not None and weights
    ]
    if len(rows) < 2:
        return None
    top, right, bottom, left = SCATTER_MARGIN
    x_ticks = _ticks(0.0, 1.08 * max(row[3] for row in rows))
    low, high = min(row[4] for row in rows), max(row[4] for row in rows)
    room = max(0.002, 0.25 * (high - low))
    y_ticks = _ticks(100 * max(0.0, low - room), 100 * min(1.0, high + room))
    x_scale = (SCATTER_WIDTH - left - right) / x_ticks[-1]
    y_scale = (SCATTER_HEIGHT - top - bottom) / (y_ticks[-1] - y_ticks[0])
    base = SCATTER_HEIGHT - bottom
    largest = max(row[5] for row in rows)
    # The large ones first: the small ones are drawn over them, not under.
    rows.sort(key=lambda row: -row[5])
    bubbles: list[Bubble] = []
    for mark, name, what, latency, accuracy, weights in rows:
        x = left + latency * x_scale
        y = base - (100 * accuracy - y_ticks[0]) * y_scale
        radius = max(BUBBLE_RADII[0], BUBBLE_RADII[1] * math.sqrt(weights / largest))
        bubbles.append(
            Bubble(
                x=x,
                y=y,
                radius=radius,
                kind=what,
                mark=mark,
                mark_at=_free_place(x, y, [bubble.mark_at for bubble in bubbles]),
                title=f"{name}: {numbers.milliseconds(latency)} ms, "
                f"{numbers.percentage(accuracy)}, weights {numbers.size(weights)}",
            )
        )
    return Scatter(
        bubbles=tuple(bubbles),
        x_ticks=tuple(Tick(at=left + v * x_scale, text=f"{v:g}") for v in x_ticks),
        y_ticks=tuple(Tick(at=base - (v - y_ticks[0]) * y_scale, text=f"{v:g}%") for v in y_ticks),
    )


def _measured(
    report: Report,
) -> Iterator[tuple[str, str, str, Latency | None, float | None, int | None]]:
    """Yield mark, name, kind, latency, accuracy and weights of every line of the table."""
    mark = iter(marks(report))
    for row in report.steps:
        facts = (row.latency_ms, row.accuracy, row.weights_bytes)
        yield next(mark), row.name, kind(report, row), *facts
    for name, peer in report.baselines.peers().items():
        weights = report.baselines.onnx.weights_bytes
        yield next(mark), f"{name} {peer.version}", "peer", peer.latency_ms, peer.accuracy, weights


def _free_place(x: float, y: float, taken: list[tuple[float, float]]) -> tuple[float, float]:
    """Return where a mark can be read: in its bubble, else on the nearest free ring around it."""
    rings = (
        (x + ring * MARK_ROOM * math.sin(turn), y - ring * MARK_ROOM * math.cos(turn))
        for ring in itertools.count(2)
        for turn in (0.0, 0.8, -0.8, 1.6, -1.6, 2.4, -2.4, 3.2)
    )
    return next(
        place
        for place in itertools.chain([(x, y)], rings)
        if all(math.dist(place, other) >= MARK_ROOM for other in taken)
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return 4 to 8 round values that enclose an interval."""
    high = high if high > low else low + 1.0
    span = high - low
    magnitude = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if span / (m * magnitude) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _cut(text: str) -> str:
    return text if len(text) <= LABEL_CHARACTERS else text[: LABEL_CHARACTERS - 1] + "…"
