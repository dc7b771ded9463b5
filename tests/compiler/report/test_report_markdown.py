from __future__ import annotations

from hone.report import markdown

EXPECTED = """\
| step | verdict | top-1 | weights | package | median ms (95% CI) | vs previous | vs onnxruntime |
| --- | --- | --- | --- | --- | --- | --- | --- |
| baseline | baseline | 98.00% | 400 kB | 900 kB | 1.00 (0.99 to 1.01) | - | 0.70x |
| baseline tuned (60 s) | baseline: for comparison | 98.00% | 400 kB | 910 kB | \
0.800 (0.790 to 0.810) | 1.25x | 0.88x |
| prune 50% of channels + recover | kept: 1.67 times faster | 97.80% | 110 kB | 600 kB | \
0.600 (0.590 to 0.610) | 1.67x | 1.17x |
| split conv1 into 2 by channels | reverted: 4% slower | 97.80% | 110 kB | 610 kB | \
0.625 (0.615 to 0.635) | 0.96x | 1.12x |
| int8 | kept: 1.5 times faster | 97.60% | 28 kB | 550 kB | \
0.400 (0.390 to 0.410) | 1.50x | 1.75x |
| another board | not measured: no device | - | 28 kB | - | - | - | - |
| onnxruntime 1.22.1 (fp32) | peer | 98.00% | 410 kB | - | 0.700 (0.690 to 0.710) | - | 1.00x |
| openvino 2026.1 (fp32) | peer | 98.00% | 410 kB | - | 0.650 (0.640 to 0.660) | - | 1.08x |

target host, 2 threads, Xeon, tuning records for 5 of 6 kernels

- openvino ran in its own process

#### int8: quantized layers

Signal to quantization noise of each layer's result, with all layers before it quantized too; \
6 dB are one bit.

| layer | SQNR dB |
| --- | --- |
| conv1 | 38.2 |
| fc | - |
"""


def test_markdown_holds_the_whole_table(report):
    assert markdown.render(report) == EXPECTED


def test_markdown_shows_names_as_they_are(change):
    report = change({0: {"name": "a|b `c` <script>x</script>\nnew *line*"}})
    row = markdown.render(report).splitlines()[2]
    assert row.startswith(r"| a\|b \`c\` &lt;script&gt;x&lt;/script&gt; new \*line\* | baseline | ")
