from __future__ import annotations

import pytest

from hone.profiling import roofline_bench
from hone.profiling.roofline import Level, Peak, Roofline


@pytest.fixture
def package_file(tiny, tmp_path):
    path = tmp_path / "tiny.hone"
    tiny.package().save(path)
    return path


@pytest.fixture
def model_file(tmp_path):
    from hone import models

    path = tmp_path / "mlp.onnx"
    path.write_bytes(models.build("mlp").SerializeToString())
    return path


def limits(*, quiet: bool) -> Roofline:
    return Roofline(
        threads=2,
        peaks={"float32": Peak(instruction="256-bit multiply-add", operations_per_second=1e11)},
        levels=(
            Level(name="memory", capacity_bytes=None, footprint_bytes=1, bytes_per_second=2e10),
        ),
        quiet=quiet,
    )


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose limits need no measurement."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(roofline_bench, "measure", lambda *_, **__: limits(quiet=True))


def test_shows_the_kernels_of_a_package(run, package_file):
    shown = run("profile", package_file, "--seconds", "0.001s")
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert lines[0].split() == [
        "kernel", "layers", "rule", "type", "calls", "ms", "share", "GFLOP/s", "moved",
        "roofline", "bound",
    ]  # fmt: skip
    scale = next(line for line in lines if line.startswith("scale"))
    assert "conv_1 relu_1" in scale
    assert scale.split()[-2:] == ["-", "-"]
    assert any(line.startswith("virtual machine ") for line in lines)
    assert not any(line.startswith("machine ") for line in lines)


def test_package_json_leaves_out_what_it_cannot_know(run, package_file):
    data = run("profile", package_file, "--seconds", "0.001s", "--json").data
    assert (data["schema"], data["kind"], data["roofline"]) == ("hone.profile/1", "package", None)
    assert [row["kernel"] for row in data["kernels"]] == ["scale", "successor"]
    assert {row["gflops"] for row in data["kernels"]} == {None}
    assert data["totals"]["runs"] > 0


@pytest.mark.usefixtures("machine")
def test_model_json_knows_operations_and_limits(run, model_file):
    data = run("profile", model_file, "--seconds", "0.001s", "--threads", "1", "--json").data
    assert (data["kind"], data["threads"]) == ("model", 1)
    assert all(row["operations"] > 0 and row["rule"] for row in data["kernels"])
    assert data["roofline"]["peaks"]["float32"]["operations_per_second"] == 1e11


@pytest.mark.usefixtures("machine")
def test_model_table_names_the_limits(run, model_file):
    shown = run("profile", model_file, "--seconds", "0.001s")
    assert "float32 100 GFLOP/s (256-bit multiply-add)" in shown.out
    assert "memory 20 GB/s" in shown.out
    assert "warning" not in shown.err


def test_warns_when_the_machine_was_busy(run, model_file, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(roofline_bench, "measure", lambda *_, **__: limits(quiet=False))
    shown = run("profile", model_file, "--seconds", "0.001s")
    assert "its limits may be too low" in shown.err


def test_refuses_shapes_of_a_package(run, package_file):
    shown = run("profile", package_file, "--shape", "x:[1]")
    assert shown.code == 2
    assert "the shapes of a package are fixed" in shown.err


@pytest.mark.parametrize("name", ["no.onnx", "no.hone"])
def test_missing_file_is_an_error(run, tmp_path, name):
    shown = run("profile", tmp_path / name)
    assert (shown.code, shown.out) == (2, "")
