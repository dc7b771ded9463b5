from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest

from hone.errors import UsageError
from hone.measure import Outcome
from hone.report import schema
from hone.report.bench import json_schema as bench_schema

HINT = "  hint: `hone build` writes a report.json beside the package"


def test_file_of_the_first_version_stays_readable(report, sample):
    assert_contains(json.loads(report.to_json()), sample)


def assert_contains(found: Any, wanted: Any) -> None:
    """Check that a value has all of another one, lists as long, and perhaps new keys."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            assert_contains(found[key], value)
    elif isinstance(wanted, list):
        for one, other in zip(found, wanted, strict=True):
            assert_contains(one, other)
    else:
        assert found == wanted


def test_json_has_the_keys_of_the_contract(report):
    data = json.loads(report.to_json())
    assert data["schema"] == "hone.report/1"
    first = data["steps"][0]
    assert {"name", "verdict", "reason", "accuracy", "weights_bytes", "package_bytes"} <= set(first)
    assert set(first["latency_ms"]) == {"median", "p90", "ci95", "samples"}
    assert data["steps"][-1]["accuracy"] is None
    assert data["steps"][-1]["latency_ms"] is None
    ort = data["baselines"]["onnxruntime"]
    assert {"latency_ms", "accuracy", "version", "threads"} <= set(ort)
    assert data["baselines"]["onnx"] == {"weights_bytes": 410_000}
    assert data["baselines"]["openvino"]["version"] == "2026.1"
    assert {"environment", "commands"} <= set(data)


def test_report_round_trips_through_its_file(tmp_path, report):
    report.write(tmp_path / "report.json")
    assert schema.Report.read(tmp_path / "report.json") == report
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_report_built_by_field_name_equals_the_one_read(report):
    fields = {name: getattr(report, name) for name in schema.Report.model_fields}
    assert schema.Report(**fields) == report


def test_file_fits_its_json_schema(sample):
    json_schema = schema.json_schema()
    jsonschema.Draft202012Validator.check_schema(json_schema)
    validator = jsonschema.Draft202012Validator(json_schema)
    validator.validate(sample)
    sample["steps"][0]["verdict"] = "better"
    assert not validator.is_valid(sample)


def test_bench_schema_is_valid():
    jsonschema.Draft202012Validator.check_schema(bench_schema())


def test_verdicts_are_those_of_the_contract():
    assert [str(v) for v in schema.Verdict] == ["baseline", "kept", "reverted", "not measured"]


def test_final_is_the_last_kept_row(report):
    assert report.final.name == "int8"
    assert report.baseline.name == "baseline"


def test_final_is_the_baseline_when_nothing_was_kept(change, sample):
    assert change(steps=sample["steps"][:2]).final.name == "baseline"


def test_peers_lists_the_extra_ones(report):
    assert list(report.baselines.peers()) == ["onnxruntime", "openvino"]


def test_extra_peer_is_checked_too(change, sample):
    with pytest.raises(ValueError, match="version"):
        change(baselines=sample["baselines"] | {"tflite": {"threads": 2}})


def test_measurements_are_taken_over():
    @dataclass
    class Latency:
        median_ms: float = 1.0
        p90_ms: float = 2.0
        ci95_ms: tuple[float, float] = (0.9, 1.1)
        samples: int = 7

    @dataclass
    class Speedup:
        ratio: float = 1.5
        ci95: tuple[float, float] = (1.4, 1.6)
        outcome: Outcome = Outcome.FASTER

    assert schema.Latency.of(Latency()) == schema.Latency(
        median=1.0, p90=2.0, ci95=(0.9, 1.1), samples=7
    )
    expected = schema.Comparison(ratio=1.5, ci95=(1.4, 1.6), outcome="faster")
    assert schema.Comparison.of(Speedup()) == expected


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
        f"{tmp_path}/no.json: a report is required, but it cannot be read: "
        f"No such file or directory\n{HINT}"
    )


def test_read_names_every_wrong_key(tmp_path, sample):
    sample["schema"] = "hone.report/2"
    del sample["threads"]
    (tmp_path / "r.json").write_text(json.dumps(sample))
    with pytest.raises(UsageError) as caught:
        schema.Report.read(tmp_path / "r.json")
    assert str(caught.value) == (
        f"{tmp_path}/r.json: a report of the schema hone.report/1 is required\n"
        "  - schema: Input should be 'hone.report/1'\n"
        f"  - threads: Field required\n{HINT}"
    )


def test_read_says_so_when_the_file_is_no_json(tmp_path):
    (tmp_path / "r.json").write_text("not json")
    with pytest.raises(UsageError, match=r"r\.json: a report of the schema hone\.report/1"):
        schema.Report.read(tmp_path / "r.json")
