from __future__ import annotations

from hone import bench, models


def test_the_model_of_a_package_is_found_among_files_that_are_none(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.onnx").write_text("no model")
    (tmp_path / "b.onnx").mkdir()
    assert bench._model_of(tiny.package(), near=tmp_path / "tiny.hone") is None
    proto = models.build("mlp").SerializeToString()
    (tmp_path / "c.onnx").write_bytes(proto)
    assert bench._model_of(tiny.package(), near=tmp_path / "tiny.hone") is None
