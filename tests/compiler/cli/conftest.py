"""The command line in this process, with stand-ins for what others test."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

import hone
from hone.cli import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch) -> Callable[..., Outcome]:
    """Run ``hone`` with arguments."""
    for name in ("HONE_DEBUG", "HONE_THREADS", "HONE_TARGET", "HONE_JSON"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Outcome:
        code = main.run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def replace_module(monkeypatch) -> Callable[..., None]:
    """Put a stand-in in the place of a module of hone, so that the real one is not imported."""

    def replace(name: str, **members: object) -> None:
        stand_in = SimpleNamespace(**members)
        monkeypatch.setitem(sys.modules, f"hone.{name}", stand_in)
        monkeypatch.setattr(hone, name, stand_in, raising=False)

    return replace
