"""What every test needs: telemetry off, Ctrl-C heard, seeded inputs."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import pytest

import hone  # noqa: F401  (fixes TVM's threads before anything loads TVM)
from hone.targets.target import Target


def pytest_configure() -> None:
    # A shell that starts a command in the background has it ignore SIGINT, which tests send.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regen", action="store_true", help="rewrite the reference files instead of comparing"
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)


@pytest.fixture(params=["host", "x86-64-v3"])
def target(request: pytest.FixtureRequest) -> Target:
    """Each target whose code this machine may run; skips the one that it cannot."""
    # Not above: tests of the command line need no compiler.
    from hone.assembling import runs_here
    from hone.targets.target import resolve

    resolved = resolve(request.param)
    if not runs_here(resolved):
        pytest.skip(f"this machine cannot run code for {request.param}")
    return resolved


@pytest.fixture(scope="session")
def amx(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """AMX tiles, the processor's own or emulated; skips with the reason where there are none."""
    name = "amx_emulator"
    path = Path(__file__).parent / name / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    try:
        with module.tiles(tmp_path_factory.mktemp(name)) as tiles:
            yield tiles
    except module.Unavailable as reason:
        pytest.skip(str(reason))
