"""What every test needs: telemetry off, seeded inputs."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import pytest

import hone  # noqa: F401  (fixes TVM's threads before anything loads TVM)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regen", action="store_true", help="rewrite the reference files instead of comparing"
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)
