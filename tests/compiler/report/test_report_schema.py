from __future__ import annotations

import json
from dataclasses import dataclass

import jsonschema
import pytest

from hone.errors import UsageError
from hone.report import schema


def latency(median: float, half: float = 0.01) -> schema.Latency:
    return schema.Latency(
        median=median, p90=median * 1.1, ci95=(median - half, median + half), samples=70
    )


def report(**changes: object) -> schema.Report:
    values: dict[str, object] = {
        "hone_version": "0.1.0",
        "created": "2026-01-01T00:00:00Z",
        "name": "net",
        "model": schema.Source(path="net.onnx", sha256="0" * 64, opset=17),
        "target": "host",
        "threads": 2,
        "steps": [
            schema.StepRow(
                name="baseline",
                verdict=schema.Verdict.BASELINE,
                accuracy=0.98,
                weights_bytes=400,
                package_bytes=900,
                latency_ms=latency(1.0),
            ),
            schema.StepRow(
                name="tuned baseline",
                verdict=schema.Verdict.BASELINE,
                reason="for comparison",
                latency_ms=latency(0.8),
            ),
            schema.StepRow(
                name="int8", verdict=schema.Verdict.KEPT, accuracy=0.979, latency_ms=latency(0.5)
            ),
            schema.StepRow(name="split", verdict=schema.Verdict.REVERTED, latency_ms=latency(0.6)),
        ],
        "baselines": schema.Baselines(
            onnx=schema.OnnxFile(weights_bytes=410),
            onnxruntime=schema.Peer(
                latency_ms=latency(0.7), accuracy=0.98, version="1.22", threads=2
            ),
            openvino=schema.Peer(latency_ms=latency(0.6), version="2026.1", threads=2),
        ),
        "recipe": {"seed": 0},
        "environment": {"cpu": "x"},
        "commands": ["hone build hone.toml"],
    }
    return schema.Report(**{**values, **changes})  # type: ignore[arg-type]


def test_json_has_the_keys_of_the_contract():
    data = json.loads(report().to_json())
    assert data["schema"] == "hone.report/1"
    assert data["steps"][0]["latency_ms"] == {
        "median": 1.0,
        "p90": 1.1,
        "ci95": [0.99, 1.01],
        "samples": 70,
    }
    assert {"name", "verdict", "reason", "accuracy", "weights_bytes", "package_bytes"} <= set(
        data["steps"][1]
    )
    assert data["steps"][1]["accuracy"] is None
    ort = data["baselines"]["onnxruntime"]
    assert {"latency_ms", "accuracy", "version", "threads"} <= set(ort)
    assert data["baselines"]["onnx"] == {"weights_bytes": 410}
    assert data["baselines"]["openvino"]["version"] == "2026.1"
    assert {"environment", "commands"} <= set(data)


def test_report_round_trips_through_its_file(tmp_path):
    before = report()
    before.write(tmp_path / "report.json")
    assert schema.Report.read(tmp_path / "report.json") == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_file_fits_its_json_schema():
    json_schema = schema.json_schema()
    jsonschema.Draft202012Validator.check_schema(json_schema)
    validator = jsonschema.Draft202012Validator(json_schema)
    data = json.loads(report().to_json())
    validator.validate(data)
    data["steps"][0]["verdict"] = "better"
    assert not validator.is_valid(data)


def test_verdicts_are_those_of_the_contract():
    assert [str(v) for v in schema.Verdict] == ["baseline", "kept", "reverted", "not measured"]


def test_final_is_the_last_kept_row():
    assert report().final.name == "int8"
    assert report().baseline.name == "baseline"


def test_final_is_the_baseline_when_nothing_was_kept():
    assert report(steps=report().steps[:2]).final.name == "baseline"


def test_peers_lists_the_extra_ones():
    assert list(report().baselines.peers()) == ["onnxruntime", "openvino"]


def test_latency_is_taken_over_from_a_measurement():
    @dataclass
    class Measured:
        median_ms: float = 1.0
        p90_ms: float = 2.0
        ci95_ms: tuple[float, float] = (0.9, 1.1)
        samples: int = 7

    assert schema.Latency.of(Measured()) == schema.Latency(  # type: ignore[arg-type]
        median=1.0, p90=2.0, ci95=(0.9, 1.1), samples=7
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"verdict": "good"}, "verdict"), ({"accuracy": 98.0}, "accuracy"), ({"x": 1}, "x")],
)
def test_row_refuses_what_the_contract_does_not_allow(changes, key):
    with pytest.raises(ValueError, match=key):
        schema.StepRow(**{"name": "a", "verdict": "kept", **changes})


def test_read_says_so_when_the_file_is_missing(tmp_path):
    with pytest.raises(UsageError) as caught:
        schema.Report.read(tmp_path / "no.json")
    assert str(caught.value) == (
        f"{tmp_path}/no.json: a report is required, but it cannot be read: No such file or "
        "directory\n  hint: `hone build` writes a report.json beside the package"
    )


def test_read_names_every_wrong_key(tmp_path):
    data = json.loads(report().to_json())
    data["schema"] = "hone.report/2"
    del data["threads"]
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(UsageError) as caught:
        schema.Report.read(tmp_path / "r.json")
    assert str(caught.value) == (
        f"{tmp_path}/r.json: a report of the schema hone.report/1 is required\n"
        "  - schema: Input should be 'hone.report/1'\n"
        "  - threads: Field required\n"
        "  hint: `hone build` writes a report.json beside the package"
    )
