"""What a build makes of a peer that does not run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from hone import improve
from hone.errors import ToolchainError
from hone.measure import Rounds
from hone.progress import silent


def test_a_build_says_so_and_goes_on_when_a_peer_refuses_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str, *_: object, **__: object) -> None:
        raise ToolchainError(f"{name}: Fail: this model is not for me")

    monkeypatch.setattr(improve, "Peer", refuse)
    build = improve._Build.__new__(improve._Build)
    build.recipe = SimpleNamespace(measure=SimpleNamespace(baselines=["onnxruntime"]))
    build.model = SimpleNamespace(source="the source")
    build.evaluation = SimpleNamespace(sample=lambda _index: {"x": np.zeros(1)})
    build.measurable, build.threads, build.notes = True, 1, []
    build.rounds, build.progress = Rounds(rounds=2, runs=2, warmup=1), silent()
    runner = SimpleNamespace(prepare=lambda _inputs: lambda: None)
    row = SimpleNamespace(name="baseline", version=SimpleNamespace(runner=runner))

    measured, peers = build._measure_all([row])

    assert measured is not None
    assert measured.latency("baseline") is not None
    assert peers == {}
    assert build.notes == [
        "not compared with onnxruntime: onnxruntime: Fail: this model is not for me"
    ]
