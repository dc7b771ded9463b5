from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from hone.report import charts, html

EVIL = "</title></style></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Collects elements, and notes tags that are not closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.wrong: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.wrong.append(tag)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(report) -> Page:
    return Page(html.render(report))


def svgs(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_page_is_well_formed(page):
    assert page.wrong == []
    assert len(page.named("html")) == 1


def test_page_needs_no_network_and_no_script(page, report):
    assert page.named("script") == []
    assert page.named("link") == []
    addresses = [a for _, at in page.elements for a in ("src", "href", "xlink:href") if a in at]
    assert addresses == []
    assert "url(" not in html.render(report)
    assert "@import" not in html.render(report)
    (policy,) = [m for m in page.named("meta") if "http-equiv" in m]
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_page_shows_every_step_with_verdict_and_reason(report):
    text = html.render(report)
    for row in report.steps:
        assert row.name in text
        assert row.reason in text
    assert "fused_conv2d_relu" in text
    assert "named in skip" in text
    assert "hone build hone.toml" in text
    assert "versions.tvm" in text
    assert "openvino ran in its own process" in text


def test_page_has_headings_captions_and_labels_for_screen_readers(page, report):
    assert len(page.named("h1")) == 1
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for section in page.named("section"):
        assert section["aria-labelledby"] in ids
    for svg in svgs(html.render(report)):
        assert svg.get("role") == "img"
        assert set(svg.get("aria-labelledby").split()) <= ids
        assert svg.find("title").text
        assert svg.find("desc").text.strip()
    assert all("scope" in heading for heading in page.named("th"))


def test_every_text_is_escaped(change):
    steps = {
        0: {"name": EVIL, "reason": EVIL, "settings": {EVIL: EVIL}},
        4: {
            "skipped": [{"layer": EVIL, "reason": EVIL}],
            "layers": [{"kernel": EVIL, "layers": [EVIL], "dtype": EVIL}],
        },
    }
    report = change(
        steps,
        name=EVIL,
        model={"path": EVIL, "sha256": EVIL, "opset": 17},
        target=EVIL,
        created=EVIL,
        hone_version=EVIL,
        commands=[EVIL],
        notes=[EVIL],
        environment={EVIL: {EVIL: EVIL}},
        recipe={EVIL: [EVIL]},
        tuning={"hits": 1, "total": 2, "missing": [EVIL]},
        baselines={
            "onnx": {"weights_bytes": 1},
            EVIL: {"version": EVIL, "threads": 1, "precision": EVIL, "latency_ms": None},
        },
    )
    text = html.render(report)
    page = Page(text)
    assert page.named("script") == []
    assert page.named("img") == []
    assert page.wrong == []
    assert text.count("&lt;script&gt;alert(1)") > 20
    assert not [a for _, at in page.elements for a in at if a.startswith("on")]


def test_long_names_leave_room_for_the_number_of_their_step(report):
    names = ["baseline", "int8 percentile + adaptive rounding + bias correction"]
    steps = [
        step.model_copy(update={"name": name})
        for step, name in zip(report.steps, names, strict=False)
    ]
    bars = charts.waterfall(report.model_copy(update={"steps": steps})).bars
    assert [bar.label for bar in bars[:2]] == ["baseline", "int8 percentile + adaptive ro…"]
    # 7.1 px for a character; the label ends 12 px before the plot, the number takes 20.
    assert 7.1 * max(len(bar.label) for bar in bars) <= charts.LABEL_WIDTH - 12 - 20


def test_waterfall_bars_are_proportional_and_kept_rows_stand_on_each_other(report):
    chart = charts.waterfall(report)
    baseline, tuned, prune, split, int8, ort, _ = chart.bars
    assert prune.width / baseline.width == pytest.approx(0.6)
    assert prune.saved == pytest.approx((prune.width, baseline.width - prune.width))
    assert int8.saved == pytest.approx((int8.width, prune.width - int8.width))
    assert split.saved is None
    assert [bar.kind for bar in (baseline, tuned, prune, split, ort)] == [
        "baseline", "comparison", "kept", "reverted", "peer",
    ]  # fmt: skip
    assert [x for x, _, _ in chart.links] == pytest.approx([baseline.width, prune.width])
    assert int8.whisker[0] < int8.width < int8.whisker[1]


def test_scatter_places_rows_by_latency_and_accuracy_and_sizes_them_by_weights(report):
    bubbles = {bubble.mark: bubble for bubble in charts.scatter(report).bubbles}
    assert set(bubbles) == {"1", "2", "3", "4", "5", "A", "B"}
    assert bubbles["5"].x < bubbles["3"].x < bubbles["1"].x
    assert bubbles["5"].y > bubbles["3"].y > bubbles["1"].y
    assert bubbles["5"].radius < bubbles["3"].radius < bubbles["1"].radius
    for bubble in bubbles.values():
        assert charts.SCATTER_MARGIN[3] < bubble.x < charts.SCATTER_WIDTH
        assert 0 < bubble.y < charts.SCATTER_HEIGHT


def test_marks_of_rows_at_the_same_place_can_be_read(change, timed):
    report = change({n: {**timed(1.0), "accuracy": 0.98} for n in range(5)})
    marks = [bubble.mark_at for bubble in charts.scatter(report).bubbles]
    assert len(marks) == 7
    apart = [math.dist(a, b) for a, b in itertools.combinations(marks, 2)]
    assert min(apart) >= charts.MARK_ROOM
    for x, y in marks:
        assert charts.SCATTER_MARGIN[3] < x < charts.SCATTER_WIDTH
        assert 0 < y < charts.SCATTER_HEIGHT


def test_legend_and_kernel_table_show_only_what_there_is(change, sample):
    layers = [{"kernel": "k", "layers": ["a"]}]
    text = html.render(change(steps=[sample["steps"][0] | {"layers": layers}]))
    assert "another runtime" in text
    assert "kept, with what it saved" not in text
    assert ">share<" not in text
    assert ">calls<" in text


def test_kernels_are_held_against_the_limits_of_the_machine(report):
    text = html.render(report)
    section = text[text.index('<h2 id="layers">') : text.index('<h2 id="notes">')]
    assert "float32 500 GFLOP/s (512-bit multiply-add), int8 2000 GOP/s" in section
    assert "Outside of kernels: 0.0100 ms (0.0080 to 0.0120), 2.4% of a run" in section
    cells = [re.sub(r"<[^>]*>", " ", cell).split() for cell in section.split("</td>")]
    assert ["20%", "int8", "compute"] in cells
    assert ["4.0%", "memory"] in cells


def test_limits_that_may_be_too_low_are_marked(change, sample):
    busy = html.render(change(roofline=sample["roofline"] | {"quiet": False}))
    assert "so that they may be too low" in busy
    assert "so that they may be too low" not in html.render(change())


def test_time_is_readable():
    assert html.readable("2026-05-04T10:22:31+02:00") == "2026-05-04 08:22 UTC"
    assert html.readable("yesterday") == "yesterday"


def test_charts_are_left_out_when_nothing_was_measured(change, sample):
    for row in sample["steps"]:
        row |= {"latency_ms": None, "accuracy": None, "verdict": "not measured"}
    report = change(baselines={"onnx": {"weights_bytes": 0}})
    assert charts.waterfall(report) is None
    assert charts.scatter(report) is None
    page = Page(html.render(report))
    assert page.named("svg") == []
    assert page.wrong == []


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1.01), (0, 0.00042), (0, 2264), (97.1, 98.7), (0, 0), (99.9, 100)]
)
def test_ticks_enclose_the_values(low, high):
    ticks = charts._ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))


def test_headlines_are_ratios_of_the_measured_medians(report):
    figures = {headline.caption: headline.figure for headline in html.headlines(report)}
    assert figures == {
        "baseline speed": "2.50x",
        "onnxruntime's speed": "1.75x",
        "of the ONNX weights": "7%",
        "top-1 accuracy": "97.60%",
    }


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_of_text_reach_the_contrast_of_wcag_aa(report, scheme):
    blocks = re.findall(r":root \{(.*?)\}", html.render(report), re.DOTALL)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", blocks[scheme]))
    for text in ("ink", "soft", "accent"):
        for ground in ("page", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for kind in ("baseline", "kept", "reverted", "comparison", "peer", "not-measured"):
        assert contrast(colours[kind], colours[f"{kind}-wash"]) >= 4.5, kind
        assert contrast(colours[kind], colours["card"]) >= 3, kind
