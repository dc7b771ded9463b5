"""What every test needs: threads fixed before TVM is loaded, telemetry off, seeded inputs."""

from __future__ import annotations

import os

# TVM reads it once, at load time, and would take half the cores otherwise.
os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)
