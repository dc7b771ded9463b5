from __future__ import annotations

import os

import hone
from hone import bench, models
from hone.measure import Rounds


def test_the_model_of_a_package_is_found_among_files_that_are_none(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.onnx").write_text("no model")
    (tmp_path / "b.onnx").mkdir()
    assert bench._model_of(tiny.package(), near=tmp_path / "tiny.hone") is None
    proto = models.build("mlp").SerializeToString()
    (tmp_path / "c.onnx").write_bytes(proto)
    assert bench._model_of(tiny.package(), near=tmp_path / "tiny.hone") is None


def test_everybody_runs_on_the_threads_that_there_are(tmp_path):
    path = tmp_path / "mlp.onnx"
    path.write_bytes(models.build("mlp").SerializeToString())
    result = bench.bench([path], threads=1000, rounds=Rounds(rounds=1, runs=1, warmup=0))
    assert result.threads == len(os.sched_getaffinity(0))


def test_the_model_of_a_package_is_found_below_the_current_folder(tmp_path, monkeypatch):
    proto = models.build("mlp")
    folder = tmp_path / "nets" / "trained"
    folder.mkdir(parents=True)
    (folder / "mlp.onnx").write_bytes(proto.SerializeToString())
    package = hone.compile(hone.load(folder / "mlp.onnx"), threads=1)
    monkeypatch.chdir(tmp_path)
    found = bench._model_of(package, near=tmp_path / "out" / "mlp.hone")
    assert found is not None
    assert found.origin.sha256 == package.manifest.provenance.source_sha256
