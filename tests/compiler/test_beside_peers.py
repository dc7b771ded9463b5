"""Versions of a model beside peers, some of which do not run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from hone import beside_peers
from hone.errors import ToolchainError
from hone.measure import LEAST_ROUNDS, Rounds
from hone.peers import PeerInfo
from hone.progress import silent

ROUNDS = Rounds(rounds=2, runs=2, warmup=1)


def measured(names: list[str], precision: str = "fp32") -> beside_peers.BesidePeers:
    return beside_peers.measure_beside_peers(
        {"baseline": lambda: None, "final": lambda: None},
        "final",
        names=names,
        source=onnx.ModelProto(),
        inputs={"x": np.zeros(1)},
        threads=1,
        precision=precision,
        rounds=ROUNDS,
        progress=silent(),
    )


def test_versions_are_measured_with_a_note_when_a_peer_refuses_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str, *_: object, **__: object) -> None:
        raise ToolchainError(f"{name}: Fail: this model is not for me")

    monkeypatch.setattr(beside_peers, "Peer", refuse)
    found = measured(["onnxruntime"])
    assert len(found.measured.seconds["baseline"]) >= LEAST_ROUNDS
    assert found.peers == ()
    assert found.notes == (
        "not compared with onnxruntime: onnxruntime: Fail: this model is not for me",
    )


def test_peers_get_the_precision_and_enough_rounds_to_compare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fake:
        def __init__(self, name: str, *_: object, threads: int, precision: str) -> None:
            self.info = PeerInfo(name=name, version="1", threads=threads, precision=precision)

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def block(self, runs: int) -> list[float]:
            return [1.0] * runs

    monkeypatch.setattr(beside_peers, "Peer", Fake)
    found = measured(["openvino"], "bf16")
    assert [peer.precision for peer in found.peers] == ["bf16"]
    assert len(found.measured.seconds["openvino"]) >= LEAST_ROUNDS
    assert found.notes == ()
