"""The tables of layers and precisions."""

from __future__ import annotations

from hone.report import html, markdown, precision

ROWS = [
    {
        "layer": "conv1",
        "precision": "int8",
        "microseconds": 7.5,
        "costs": {
            "int8": {"error": 0.0123, "microseconds": 7.25},
            "fp32": {"error": 0.0, "microseconds": 30.25},
        },
        "sqnr_db": 38.21,
    },
    {
        "layer": "a|b",
        "precision": "fp32",
        "reason": "int8: takes 9.0 us and up to 4.0 us of conversions, fp32 120.4 us",
        "microseconds": 120.4,
        "costs": {"int8": {}, "fp32": {"error": 0.0}},
    },
]
CONVERSIONS = [
    {
        "tensor": "image", "direction": "quantize", "kernel": "fused_pad_quantize",
        "layers": ["pad"],
    },
    {"tensor": "conv1", "direction": "dequantize", "kernel": "dequantize", "microseconds": 3.456},
]  # fmt: skip
STEP = 4
"""The int8 step of the sample, which is shipped."""


def test_layers_are_shown_with_what_each_precision_costs(change):
    report = change({STEP: {"precisions": ROWS}})
    (found,) = precision.tables(report, report.steps[STEP])
    assert found.columns == (
        "layer", "precision", "accuracy cost in int8", "us as chosen", "us in int8", "us in fp32",
        "SQNR dB", "why",
    )  # fmt: skip
    assert found.rows == (
        ("conv1", "int8", "0.012", "7.50", "7.25", "30.2", "38.2", ""),
        ("a|b", "fp32", "-", "120", "-", "-", "-", ROWS[1]["reason"]),
    )
    assert len(found.right) == len(found.columns)
    assert "(nats)" in found.hint


def test_unit_of_the_accuracy_cost_follows_the_metric(change):
    report = change({STEP: {"precisions": ROWS}}, metric="relative_error")
    assert "(relative)" in precision.tables(report, report.steps[STEP])[0].hint


def test_conversions_are_named_with_their_time_or_their_kernel(change):
    report = change({STEP: {"precisions": ROWS, "conversions": CONVERSIONS}})
    found = precision.tables(report, report.steps[STEP])[1]
    assert found.rows == (
        ("image", "quantize", "-", "fused_pad_quantize (pad)"),
        ("conv1", "dequantize", "3.46", "dequantize"),
    )


def test_quantized_layers_are_shown_when_all_layers_have_one_precision(report):
    (found,) = precision.tables(report, report.steps[STEP])
    assert found.rows == (("conv1", "38.2"), ("fc", "-"))
    assert precision.tables(report, report.steps[0]) == []


def test_html_shows_the_tables_with_names_as_they_are(change):
    page = html.render(change({STEP: {"precisions": ROWS, "conversions": CONVERSIONS}}))
    assert ". int8: precision of each layer</summary>" in page
    assert ". int8: conversions</summary>" in page
    assert '<td class="n">38.2</td>' in page
    evil = [{**ROWS[0], "layer": "<b>x</b>"}]
    assert "<b>x</b>" not in html.render(change({STEP: {"precisions": evil}}))


def test_html_shows_quantized_layers_of_a_plain_step(report):
    page = html.render(report)
    assert ". int8: quantized layers</summary>" in page
    assert '<th scope="row" class="code">conv1</th><td class="n">38.2</td>' in page


def test_markdown_shows_the_tables_of_what_is_shipped(change):
    text = markdown.render(change({STEP: {"precisions": ROWS}, 3: {"precisions": ROWS}}))
    assert text.count("precision of each layer") == 1
    assert "| a\\|b | fp32 | - | 120 |" in text
