from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def arm_emulator(tmp_path_factory: pytest.TempPathFactory):
    """Runs libraries for 64-bit ARM; skips with the reason where that cannot be done."""
    module = _load(Path(__file__).parent / "arm" / "arm_emulator.py")
    try:
        return module.build(tmp_path_factory.mktemp("arm"))
    except module.Unavailable as reason:
        pytest.skip(str(reason))
