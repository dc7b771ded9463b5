"""``hone build`` from recipe to package and report, on the digits network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from hone import improve, recipe, runtime
from hone.errors import UsageError
from hone.measure import LEAST_ROUNDS
from hone.progress import silent
from hone.report.schema import Report, Verdict
from hone.targets.target import resolve
from hone.verify import verify

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "models" / "digits"


def a_recipe(folder: Path, *steps: dict[str, Any], **tables: dict[str, Any]) -> recipe.Recipe:
    data: dict[str, Any] = {
        "model": {"path": str(DIGITS / "digits.onnx")},
        "data": {
            "calibration": str(DIGITS / "calibration.npz"),
            "evaluation": str(DIGITS / "evaluation.npz"),
        },
        "output": {"directory": str(folder)},
        "measure": {"rounds": 3, "runs": 5, "warmup": 1},
        "step": list(steps),
    }
    for name, table in tables.items():
        data[name] = {**data.get(name, {}), **table}
    return recipe.parse(data, where="test.toml")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """Build for size: what is kept then does not depend on the clock."""
    folder = tmp_path_factory.mktemp("build")
    steps = (
        {"kind": "prune", "amount": 0.9},
        {"kind": "int8"},
        {"kind": "split", "layers": ["/conv2/Conv"], "parts": 2},
    )
    return improve.build(a_recipe(folder, *steps, goal={"goal": "size"})), folder


def test_report_has_the_quantization_error_of_every_layer(built: tuple[Report, Path]) -> None:
    report, folder = built
    (row,) = (row for row in report.steps if row.name == "int8")
    assert [q.layer for q in row.quantized] == [
        "/conv1/Conv", "/conv2/Conv", "/conv3/Conv", "/fc/Gemm",
    ]  # fmt: skip
    assert all(q.sqnr_db is not None and q.sqnr_db > 10 for q in row.quantized)
    assert all(other.quantized == [] for other in report.steps if other is not row)
    # Ranges are kept for the next build.
    assert len(list((folder / "calibration").glob("*.npz"))) == 1


def test_build_writes_package_and_both_reports(built: tuple[Report, Path]) -> None:
    report, folder = built
    assert verify(folder / "digits.hone").samples == 2
    assert Report.read(folder / "report.json") == report
    html = (folder / "report.html").read_text()
    assert "<html" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    schema = json.loads((ROOT / "docs/schema/report.schema.json").read_text())
    jsonschema.validate(json.loads((folder / "report.json").read_text()), schema)


def test_build_reverts_a_step_that_costs_too_much_accuracy(built: tuple[Report, Path]) -> None:
    step = built[0].steps[1]
    assert step.name == "prune 90% of channels"
    assert step.verdict is Verdict.REVERTED
    assert "budget 0.50 points of top-1" in step.reason
    assert step.accuracy is not None
    assert step.accuracy < 0.9


def test_build_keeps_int8_when_the_goal_is_size(built: tuple[Report, Path]) -> None:
    baseline, _, int8, _ = built[0].steps
    assert int8.verdict is Verdict.KEPT
    assert int8.accuracy is not None
    assert baseline.accuracy is not None
    assert int8.accuracy >= baseline.accuracy - 0.005
    assert int8.weights_bytes is not None
    assert baseline.weights_bytes is not None
    # int8 against fp32, plus biases in int32 and scales; packed to whole vectors.
    assert int8.weights_bytes < 0.3 * baseline.weights_bytes


def test_build_says_why_a_step_does_not_fit(built: tuple[Report, Path]) -> None:
    split = built[0].steps[3]
    assert split.verdict is Verdict.REVERTED
    assert split.reason == "split works on fp32, and the model is int8 already"
    assert split.latency_ms is None


def test_build_measures_every_row_and_onnxruntime(built: tuple[Report, Path]) -> None:
    report = built[0]
    for row in report.steps[:3]:
        assert row.latency_ms is not None
        # as many rounds as the comparison with onnxruntime takes, of four runs that count
        assert row.latency_ms.samples >= LEAST_ROUNDS * 4
        assert row.latency_ms.ci95[0] <= row.latency_ms.median <= row.latency_ms.ci95[1]
    peer = report.baselines.onnxruntime
    assert peer is not None
    assert peer.latency_ms is not None
    assert peer.accuracy == report.baseline.accuracy
    assert peer.threads == 2
    # 98 026 parameters in float32, and the statistics of batch normalization.
    assert 98_026 * 4 <= report.baselines.onnx.weights_bytes <= 98_026 * 4 + 4096
    assert any(note.startswith("parity with onnxruntime: equal") for note in report.notes)


def test_build_package_records_decisions_and_accuracy(built: tuple[Report, Path]) -> None:
    report, folder = built
    manifest = runtime.load(folder / "digits.hone").manifest
    assert [step["verdict"] for step in manifest.recipe["steps"]] == [
        "reverted", "kept", "reverted",
    ]  # fmt: skip
    assert manifest.precision == "int8"
    assert manifest.accuracy is not None
    assert manifest.accuracy.value == report.final.accuracy
    assert manifest.accuracy.samples == 450


def test_build_package_computes_what_the_report_says(built: tuple[Report, Path]) -> None:
    report, folder = built
    data = np.load(DIGITS / "evaluation.npz")
    runner = runtime.load(folder / "digits.hone")
    right = sum(
        int(runner.run({"image": image[None]})["logits"].argmax() == label)
        for image, label in zip(data["image"], data["labels"], strict=True)
    )
    assert right / len(data["labels"]) == report.final.accuracy


def test_build_is_an_error_before_any_work_when_top1_has_no_labels(tmp_path: Path) -> None:
    data = np.load(DIGITS / "evaluation.npz")
    np.savez(tmp_path / "unlabelled.npz", image=data["image"])
    with pytest.raises(UsageError) as caught:
        improve.build(a_recipe(tmp_path, data={"evaluation": str(tmp_path / "unlabelled.npz")}))
    assert str(caught.value) == (
        "data.evaluation: top-1 needs evaluation data with labels\n"
        '  hint: add an array `labels`, or set [data] metric = "relative_error"'
    )


def test_build_is_an_error_before_any_work_when_the_folder_cannot_be_made(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(UsageError, match="the output folder cannot be written: File exists"):
        improve.build(a_recipe(taken))


def test_build_is_an_error_before_any_work_when_a_layer_does_not_exist(tmp_path: Path) -> None:
    messages: list[str] = []

    class Log:
        def task(self, label: str, total: float | None = None) -> Any:
            messages.append(label)
            return silent().task(label, total)

        def log(self, message: str) -> None:
            messages.append(message)

    for step in (
        {"kind": "int8", "skip": ["/conv2/Con"]},
        {"kind": "split", "layers": ["/conv2/Con"], "parts": 2},
    ):
        with pytest.raises(UsageError, match="'/conv2/Con' is no layer, the nearest: /conv2/Conv"):
            improve.build(a_recipe(tmp_path, step), progress=Log())
    assert not messages


def test_build_takes_random_evaluation_data_when_no_labels_are_needed(tmp_path: Path) -> None:
    data = {"evaluation": "random:3", "metric": "relative_error"}
    report = improve.build(a_recipe(tmp_path, data=data))
    assert report.steps[0].accuracy is None


def test_build_without_data_gates_by_output_error(tmp_path: Path) -> None:
    report = improve.build(
        a_recipe(
            tmp_path,
            {"kind": "prune", "amount": 0.5},
            data={"evaluation": None, "metric": "relative_error"},
        )
    )
    pruned = report.steps[1]
    assert pruned.verdict is Verdict.REVERTED
    assert pruned.accuracy is None
    assert pruned.output_error is not None
    assert pruned.output_error > 0.005
    assert "relative output error, budget 0.005" in pruned.reason


def test_build_marks_steps_as_not_measured_when_there_is_no_device(tmp_path: Path) -> None:
    foreign = "rpi4" if resolve("host").arch == "x86_64" else "x86-64-v3"
    report = improve.build(a_recipe(tmp_path, {"kind": "int8"}, target={"name": foreign}))
    int8 = report.steps[1]
    assert int8.verdict is Verdict.NOT_MEASURED
    assert int8.reason.startswith("no device; weights ")
    assert int8.latency_ms is None
    assert int8.accuracy == pytest.approx(0.99, abs=0.01)
    assert report.baselines.onnxruntime is None
